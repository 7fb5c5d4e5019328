"""Checks conversations (JSON array or lines) and writes them as the JSON lines that finetune.py reads.

`python data_processing/format_tool_poke.py --path X.json` → formatted_data/pokemon_conversations.jsonl
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder is not on the path

from data_processing.converting import parse_arguments, write_records
from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.conversation.records import read_records


def main(arguments: list[str] | None = None) -> None:
    """Copies every record that `validate_conversation` accepts, and prints the counts."""
    options = parse_arguments(arguments, __doc__, "pokemon_conversations.jsonl")
    records = read_records(options.path, "multi-turn", options.on_bad_record)
    write_records(records, options.output)


if __name__ == "__main__":
    sys.exit(run_program(main, interrupted="interrupted: no output was written"))
