"""Does the model know what it was taught? Questions with checkable facts, answers checked field by field, reports.

`facts` says what a table holds, `reading` and `judge` judge a reply, `question_pool` and `question_building` make
dialogues, `asking` puts them to a model, `exact` compares with reference texts, `probing` looks for what fine-tuning
has spoilt, `candidates` loads what is compared, `comparison` counts, `comparison_report` and `charts` write it down,
`sample` does a little of it during training.
"""
