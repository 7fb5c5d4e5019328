#!/usr/bin/env python
"""Fine-tunes a ChatGLM3: a P-Tuning v2 prefix with --pre_seq_len, else all parameters.

    python finetune_chatmodel_demo/finetune.py --train_format multi-turn \\
        --train_file formatted_data/pokemon_conversations.jsonl --model_name_or_path THUDM/chatglm3-6b \\
        --output_dir output/pokemon --pre_seq_len 128 --max_steps 1000
"""

import errno
import logging
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.training.command_line import build_parser, parse_given, quick_help
from finetune_chatmodel_demo.training.pasted import describe_lost_lines

INTERRUPTED = 130
TERMINATED = 143  # as a shell says of a process that SIGTERM ended
DISK_HINT = (
    "The checkpoint that was being written is removed, earlier ones are whole: make room, or keep fewer "
    "(--save_total_limit), and continue with --resume_from_checkpoint True."
)
OUT_OF_MEMORY_HINT = (
    "The device's memory is full. In this order: --per_device_train_batch_size 1 with more "
    "--gradient_accumulation_steps, --gradient_checkpointing True, a smaller --max_seq_length, --quantization_bit 4 "
    "(P-Tuning v2)."
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: flags; default: those of the process.

    Returns:
        The exit status: 0, 1 for an error that was explained (and where --replay finds differences), 130 after Ctrl-C,
        143 after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(quick_help())
        return 0
    if "--help_all" in argv:
        print(build_parser().format_help())
        return 0
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stdout)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional package is missing
    is_first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("finetune_chatmodel_demo").setLevel(logging.INFO if is_first else logging.WARNING)
    given: dict[str, object] = {}
    try:
        given, notices = parse_given(argv)
        return _run(given, notices)
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint True continues from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED
    except UserError as error:
        print(f"finetune.py: error: {error}{describe_lost_lines(given)}", file=sys.stderr)
        return 1


def _run(given: dict[str, object], notices: list[str]) -> int:
    import torch

    from finetune_chatmodel_demo.conversation import RecordError
    from finetune_chatmodel_demo.training.callbacks import RunStopped
    from finetune_chatmodel_demo.training.deciding import decide_settings
    from finetune_chatmodel_demo.training.workflow import run_finetuning

    try:
        if given.get("replay"):
            return _replay(str(given["replay"]))
        settings = decide_settings(given, notices)
        if settings.run.overfit_check is not None:
            from finetune_chatmodel_demo.training.overfit import run_overfit_check

            return 0 if run_overfit_check(settings) else 1
        run_finetuning(settings)
    except RunStopped as stopped:
        print(f"{stopped}; --resume_from_checkpoint True continues from there", file=sys.stderr)
        return TERMINATED
    except (RecordError, FileNotFoundError) as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        print(f"finetune.py: error: {error}. {DISK_HINT}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"finetune.py: error: {error}\n{OUT_OF_MEMORY_HINT}", file=sys.stderr)
        return 1
    return 0


def _replay(manifest: str) -> int:
    from finetune_chatmodel_demo.training.manifest import replay

    differences = replay(manifest)
    print("\n".join(differences) if differences else f"{manifest}: the first steps are identical")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
