#!/usr/bin/env python
"""Says before a run what it will need: memory of each GPU part by part, of the host, disk, steps; loads nothing.

    python finetune_chatmodel_demo/plan_memory.py --model_name_or_path 6b --pre_seq_len 128 --max_seq_length 2048 \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --gpu_memory "RTX 4090"
    python finetune_chatmodel_demo/plan_memory.py finetune_chatmodel_demo/configs/sft_full.yaml --gpus 4 --gpu_memory 80

Takes finetune.py's flags or settings file. --model_name_or_path is a folder with config.json (weights are not read), or
the word 6b.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder's own are not modules

from finetune_chatmodel_demo.common.cli import EXIT_NO, run_program
from finetune_chatmodel_demo.common.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The flags beside finetune.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="plan_memory.py [SETTINGS.yaml] [finetune.py's flags] [--gpus N] [--gpu_memory GB|NAME] [--rows N]",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="GPUs that train together (1)")
    add("--gpu_memory", metavar="GB|NAME", help='memory of each: 24, "RTX 4090", A100-80GB, …; says whether it fits')
    add("--rows", "--rows_per_epoch", type=int, metavar="N", help="rows of the training data: steps and epochs")
    add("--row_tokens", type=int, metavar="N", help="tokens of the longest row (--max_seq_length)")
    add("--supervised", type=int, metavar="N", help="its supervised tokens (all of them)")
    add("--cpu", action="store_true", help="plan a run on the CPU")
    add("--json", action="store_true", help="print JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Prints the plan.

    Returns:
        0; 1 where the run does not fit; 2 for an error that was explained.
    """
    return run_program(lambda: _plan(argv))


def _plan(argv: list[str] | None) -> int:
    options, rest = build_parser().parse_known_args(argv)
    for name, least in (("gpus", 1), ("rows", 1), ("row_tokens", 1), ("supervised", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be {least} or more")
    from finetune_chatmodel_demo.training.command_line import parse_given

    given, notices = parse_given(rest)
    from finetune_chatmodel_demo.training.run_plan import describe_plan, make_plan, plan_as_json, read_gpu_memory

    limit = read_gpu_memory(options.gpu_memory) if options.gpu_memory else None
    plan = make_plan(
        given,
        gpus=options.gpus,
        rows=options.rows,
        tokens=options.row_tokens,
        supervised=options.supervised,
        is_cuda=not (options.cpu or given.get("use_cpu")),
    )
    if options.json:
        print(json.dumps(plan_as_json(plan, limit), indent=2, ensure_ascii=False))
    else:
        print(describe_plan(plan, limit))
        for notice in notices:
            print(f"note: {notice}")
    return EXIT_NO if limit is not None and plan.memory.total > limit else 0


if __name__ == "__main__":
    sys.exit(main())
