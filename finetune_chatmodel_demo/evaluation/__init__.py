"""Does the model know what it was taught? Questions with checkable facts, answers checked field by field, reports.

`fields` and `facts` say what a table holds, `reading` and `fact_checking` judge a reply, `questions` and `asking` put
dialogues to a model, `scoring` and `statistics` count, `probing` looks for what fine-tuning has spoilt, `candidates`
loads what is compared, `report_*` write it down, `sample` does a little of it during training.
Start: `python finetune_chatmodel_demo/evaluate.py --csv …`.
"""
