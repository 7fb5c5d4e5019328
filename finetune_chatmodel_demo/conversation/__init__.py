"""From data files to rows of token ids: reading and validating records, rendering, truncating, collating.

This room stands on the ground: it is handed a tokenizer and knows no model. See `inspect_data.py`.
"""

from finetune_chatmodel_demo.conversation.collating import PadCollator
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.records import (
    RecordError,
    RecordFile,
    RecordSource,
    read_records,
    validate_conversation,
    validate_input_output,
)
from finetune_chatmodel_demo.conversation.render import (
    IGNORED_LABEL,
    PROMPT_FORMATS,
    TEMPLATES,
    Rendering,
    render_conversation,
    render_input_output,
    render_prompt,
    truncate,
)
from finetune_chatmodel_demo.conversation.rows import DatasetReport, Rows
from finetune_chatmodel_demo.conversation.stage_data import StageData, build_stage_data
from finetune_chatmodel_demo.conversation.tokenizing import build_dataset

__all__ = [
    "IGNORED_LABEL",
    "PROMPT_FORMATS",
    "TEMPLATES",
    "DataArguments",
    "DatasetReport",
    "PadCollator",
    "RecordError",
    "RecordFile",
    "RecordSource",
    "Rendering",
    "Rows",
    "StageData",
    "build_dataset",
    "build_stage_data",
    "read_records",
    "render_conversation",
    "render_input_output",
    "render_prompt",
    "truncate",
    "validate_conversation",
    "validate_input_output",
]
