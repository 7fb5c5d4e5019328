"""Checks conversations (JSON array or lines) and writes them as the JSON lines that finetune.py reads.

`python data_processing/format_tool_poke.py --path X.json` → formatted_data/pokemon_conversations.jsonl
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_processing.common import parse_format_arguments, run_entry, write_records
from finetune_chatmodel_demo.conversation.records import read_records


def main(arguments: list[str] | None = None) -> None:
    """Copies every record that `validate_conversation` accepts, and prints the counts."""
    options = parse_format_arguments(arguments, __doc__, "pokemon_conversations.jsonl")
    records = read_records(options.path, "multi-turn", options.on_bad_record)
    write_records(records, options.output)


if __name__ == "__main__":
    run_entry(main)
