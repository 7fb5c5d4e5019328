#!/usr/bin/env python
"""Says before a run what it will need: memory of each GPU part by part, of the host, disk, steps; loads nothing.

    python finetune_chatmodel_demo/plan_memory.py --model_name_or_path 6b --pre_seq_len 128 --max_seq_length 2048 \\
        --per_device_train_batch_size 1 --gradient_accumulation_steps 16 --gpu_memory "RTX 4090"
    python finetune_chatmodel_demo/plan_memory.py finetune_chatmodel_demo/configs/sft_full.yaml --gpus 4 --gpu_memory 80

Takes finetune.py's flags or settings file. --model_name_or_path is a folder with config.json (weights are not read), or
the word 6b.
"""

import argparse
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

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
        0; 1 for an error that was explained; 2 where the run does not fit.
    """
    options, rest = build_parser().parse_known_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional package is missing
    from finetune_chatmodel_demo.training.command_line import parse_given

    try:
        given, notices = parse_given(rest)
        for name in ("gpus", "rows", "row_tokens"):
            if getattr(options, name) is not None and getattr(options, name) < 1:
                raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
        if options.supervised is not None and options.supervised < 0:
            raise UserError(f"--supervised is {options.supervised}; it must be 0 or more")
        return _plan(given, notices, options)
    except UserError as error:
        print(f"plan_memory.py: error: {error}", file=sys.stderr)
        return 1


def _plan(given: dict[str, object], notices: list[str], options: argparse.Namespace) -> int:
    import json

    from finetune_chatmodel_demo.training.plan_report import describe_plan, plan_as_json
    from finetune_chatmodel_demo.training.remedies import read_gpu_memory
    from finetune_chatmodel_demo.training.run_plan import make_plan

    plan = make_plan(
        given,
        gpus=options.gpus,
        rows=options.rows,
        tokens=options.row_tokens,
        supervised=options.supervised,
        is_cuda=not (options.cpu or given.get("use_cpu")),
    )
    limit = read_gpu_memory(options.gpu_memory) if options.gpu_memory else None
    if options.json:
        print(json.dumps(plan_as_json(plan, limit), indent=2, ensure_ascii=False))
    else:
        print(describe_plan(plan, limit))
        for notice in notices:
            print(f"note: {notice}")
    return 2 if limit is not None and plan.memory.total > limit else 0


if __name__ == "__main__":
    sys.exit(main())
