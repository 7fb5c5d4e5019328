"""Fine-tuning: from the command line's flags to a finished checkpoint.

    python finetune_chatmodel_demo/finetune.py --help

`arguments` parses the flags, `settings` decides what they leave open, `workflow` runs the training with
`trainer.ChatTrainer`, `checkpoints` keeps folders whole.
"""
