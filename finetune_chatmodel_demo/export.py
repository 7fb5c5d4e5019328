"""Turns what training left into what others read: whole models of the official layout, prefixes and adapters in
either form.

    python finetune_chatmodel_demo/export.py --adapter output/pokemon_lora --output output/pokemon_merged
    python finetune_chatmodel_demo/export.py --model output/full --output output/full_fp16 --dtype float16
    python finetune_chatmodel_demo/export.py --pt-checkpoint output/pokemon --output prefix --to official
    python finetune_chatmodel_demo/export.py --adapter output/pokemon_lora --output lora_for_the_original --to official

What was written is read again, in a fresh load, and its logits on fixed prompts are compared with those of the model
before; only then does the output get its name. Exit codes: 0, 1 when the comparison fails, 2 for a mistake in what was
given (one line on standard error), 130 after Ctrl-C. Nothing half-written stays behind.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a script: find the package, and let nothing in its folder shadow an installed one
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if entry != str(_folder))]

from finetune_chatmodel_demo.generation.errors import run_and_explain
from finetune_chatmodel_demo.generation.exports import DTYPES, FORMS, export

EXIT_DIFFERENT = 1


def build_parser() -> argparse.ArgumentParser:
    """The command line; every flag is also accepted with underscores."""
    parser = argparse.ArgumentParser(
        description="Write a whole model in the official layout (with --adapter: merged), or convert a prefix or an "
        "adapter. The result is reloaded and compared before it gets its name.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", "--export_dir", required=True, type=Path, metavar="DIR", help="a new folder")
    add(
        "--model",
        "--model-name-or-path",
        "--model_name_or_path",
        metavar="DIR",
        help="base model, whole model, or the --output_dir of a run (default: the one that the checkpoint records)",
    )
    add(
        "--adapter",
        "--adapter-name-or-path",
        "--adapter_name_or_path",
        action="append",
        metavar="DIR",
        help="LoRA adapter to merge; several (repeat the flag, or a,b) are merged one after the other",
    )
    add("--pt-checkpoint", "--pt_checkpoint", metavar="DIR", help="prefix checkpoint to convert")
    add("--to", choices=FORMS, help="form of a converted prefix or adapter: this project's, the original code's, both")
    add(
        "--fold-projection",
        "--fold_projection",
        action="store_true",
        help="prefix: compute the MLP once and write a plain prefix",
    )
    add("--dtype", choices=DTYPES, help="of a whole model's weights (default: the base's)")
    add("--max-shard-size", "--max_shard_size", default="5GB", metavar="SIZE", help="of a weights file (5GB)")
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: the model's)")
    add("--device", default="cpu", help="where it is computed (cpu)")
    add("--low-memory", "--low_memory", action="store_true", help="load the base as it is stored, not in float32")
    add("--overwrite", action="store_true", help="replace an earlier result in --output")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code that the module docstring explains."""
    arguments = build_parser().parse_args(argv)
    try:
        return run_and_explain(lambda: export(arguments), out_of_memory_advice="use --device cpu")
    except Exception as error:
        if type(error).__name__ != "ComparisonError":  # its module imports torch, which --help must not
            raise
        print(f"error: {error}", file=sys.stderr)
        return EXIT_DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
