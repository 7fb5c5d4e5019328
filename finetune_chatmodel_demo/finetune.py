#!/usr/bin/env python
"""Fine-tunes a ChatGLM3: a P-Tuning v2 prefix with --pre_seq_len, else all parameters.

    python finetune_chatmodel_demo/finetune.py --train_format multi-turn \\
        --train_file formatted_data/pokemon_conversations.jsonl --model_name_or_path THUDM/chatglm3-6b \\
        --output_dir output/pokemon --pre_seq_len 128 --max_steps 1000
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder's names are no modules

from finetune_chatmodel_demo.common.cli import EXIT_NO, EXIT_TERMINATED, log_to, run_program
from finetune_chatmodel_demo.training.command_line import build_parser, describe_lost_lines, parse_given

DISK_ADVICE = (
    "the checkpoint that was being written is removed, earlier ones are whole: make room, or keep fewer "
    "(--save_total_limit), and continue with --resume_from_checkpoint True"
)
OUT_OF_MEMORY_ADVICE = (
    "in this order: --per_device_train_batch_size 1 with more --gradient_accumulation_steps, --gradient_checkpointing "
    "True, a smaller --max_seq_length, --quantization_bit 4 (P-Tuning v2)"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: flags; default: those of the process.

    Returns:
        The exit status; see `run_program`. 1: --replay finds differences, or --overfit_check fails. 143: after SIGTERM.
    """
    argv = sys.argv[1:] if argv is None else argv
    given: dict[str, Any] = {}

    def work() -> int:
        if not argv or {"--help", "-h", "--help_all"} & {*argv}:
            print(build_parser(with_trainer="--help_all" in argv).format_help())
            return 0
        options, notices = parse_given(argv)
        given.update(options)
        log_to(sys.stdout)
        return _run(given, notices)

    return run_program(
        work,
        out_of_memory_advice=OUT_OF_MEMORY_ADVICE,
        disk_advice=DISK_ADVICE,
        interrupted="interrupted; --resume_from_checkpoint True continues from the newest checkpoint",
        hint=lambda: describe_lost_lines(given),
    )


def _run(given: dict[str, Any], notices: list[str]) -> int:
    from finetune_chatmodel_demo.training.callbacks import RunStopped
    from finetune_chatmodel_demo.training.deciding import decide_settings
    from finetune_chatmodel_demo.training.workflow import run_finetuning

    if given.get("replay"):
        return _replay(given)
    settings = decide_settings(given, notices)
    if settings.run.overfit_check is not None:
        from finetune_chatmodel_demo.training.overfit import run_overfit_check

        return 0 if run_overfit_check(settings) else EXIT_NO
    try:
        run_finetuning(settings)
    except RunStopped as stopped:
        print(f"{stopped}; --resume_from_checkpoint True continues from there", file=sys.stderr)
        return EXIT_TERMINATED
    return 0


def _replay(given: dict[str, Any]) -> int:
    from finetune_chatmodel_demo.training.manifest import replay

    differences = replay(given["replay"], given)
    print("\n".join(differences) if differences else f"{given['replay']}: the first steps are identical")
    return EXIT_NO if differences else 0


if __name__ == "__main__":
    sys.exit(main())
