"""ToolAlpaca's train_data.json → conversations with tool calls, as the original demo maps them.

`python data_processing/format_tool_alpaca.py --path ToolAlpaca/data/train_data.json` → formatted_data/tool_alpaca.jsonl

Each entry of the data set is one API with many instances; each instance becomes one record:

    NLDocumentation                          → "tools": [text]
    input                                    → user
    each of intermediate_steps, [[action, action input, agent's output], observation]:
      agent's output up to "Action:"         → assistant (the thought)
      action, action input (JSON), observation → tool with name, parameters, observation
    Final Thought + newline + output         → assistant

Instances that break this form (an action input that is no JSON object, no final thought) are counted and left out,
as the original does; `--on_bad_record error` stops at the first.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder is not on the path

import json
from collections.abc import Iterator
from typing import Any

from data_processing.converting import ConvertedRecords, parse_arguments, write_records
from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.conversation.records import RecordError, validate_conversation


def convert(entry: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """The records of one API; a RecordError for each instance that breaks the form."""
    if not isinstance(entry["Instances"], list):
        yield where, RecordError(f"{where}: 'Instances' must be a list, got {type(entry['Instances']).__name__}")
        return
    for i, instance in enumerate(entry["Instances"]):
        here = f"{where} Instances[{i}]"
        try:
            record = {"tools": [entry["NLDocumentation"]], "conversations": list(convert_instance(instance))}
        except json.JSONDecodeError as error:
            record = RecordError(f"{here}: an action input is not JSON ({error}): {error.doc[:60]!r}")
        except KeyError as error:
            record = RecordError(f"{here}: the key {error} is missing")
        except (TypeError, ValueError, AttributeError) as error:
            record = RecordError(f"{here}: not in ToolAlpaca's form ({error})")
        yield here, record


def convert_instance(instance: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The messages of one instance."""
    yield {"role": "user", "content": instance["input"]}
    for (name, parameters, output), observation in instance["intermediate_steps"]:
        yield {"role": "assistant", "content": output.split("Action:")[0].strip()}
        yield {"role": "tool", "name": name, "parameters": json.loads(parameters), "observation": observation}
    yield {"role": "assistant", "content": instance["Final Thought"] + "\n" + instance["output"]}


def main(arguments: list[str] | None = None) -> None:
    """Converts every instance, and prints the counts."""
    options = parse_arguments(arguments, __doc__, "tool_alpaca.jsonl", on_bad_record="skip")
    keys = ("NLDocumentation", "Instances")
    records = ConvertedRecords(options.path, keys, convert, validate_conversation, options.on_bad_record)
    write_records(records, options.output)


if __name__ == "__main__":
    sys.exit(run_program(main, interrupted="interrupted: no output was written"))
