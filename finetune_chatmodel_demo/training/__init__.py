"""Fine-tuning: from the command line's flags to a finished checkpoint.

    python finetune_chatmodel_demo/finetune.py --help

`command_line` parses the flags of `arguments`, `settings` decides what they leave open, `checks` refuses what cannot
work. `workflow` builds the data, the model (`methods`: what of it is trained) and the trainer of the stage
(`stages/`), all on `trainer.RunTrainer`; `checkpoints` keeps folders whole.
"""
