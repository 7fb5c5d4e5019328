"""The report of `--overfit_check`: which replies could not be learned by heart, and why that may be."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.training.arguments import FREEZE, FULL, LORA, P_TUNING
from finetune_chatmodel_demo.training.overfitting import Contradiction, Outcome
from finetune_chatmodel_demo.training.replies import Reply
from finetune_chatmodel_demo.training.run_logs import publish_text
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.trends import measure_improvement

REPORT_FILE = "overfit_check.json"
MOST_SHOWN = 5
LONGEST_TEXT = 80
STILL_FALLING = 0.05  # share by which the loss fell over the last third of the steps
NOT_MOVED = 0.1  # share by which it should fall at least when a few rows are learned by heart
MORE_CAPACITY = {
    P_TUNING: "a longer prefix (--pre_seq_len)",
    LORA: "a larger --lora_rank",
    FREEZE: "more layers (--freeze_trainable_layers)",
    FULL: "rows that the base model can tell apart",
}


def publish_report(
    outcome: Outcome, contradictions: Sequence[Contradiction], rows: Any, tokenizer: Any, settings: Settings
) -> dict[str, Any]:
    """Prints the report, and writes it into --output_dir where that was given.

    Args:
        outcome: of the training.
        contradictions: in all rows.
        rows: the data set, with `where(row)`.
        tokenizer: turns ids into text.
        settings: the run.

    Returns:
        The report as overfit_check.json has it.
    """
    report = build_report(outcome, contradictions, rows, tokenizer, settings)
    print("\n".join(describe(report)), flush=True)
    folder = settings.given.get("output_dir")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        publish_text(Path(folder) / REPORT_FILE, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
        print(f"report: {Path(folder) / REPORT_FILE}", flush=True)
    return report


def build_report(
    outcome: Outcome, contradictions: Sequence[Contradiction], rows: Any, tokenizer: Any, settings: Settings
) -> dict[str, Any]:
    """Everything that was found, for programs."""
    failed = [
        {
            "row": reply.row,
            "where": rows.where(reply.row),
            "question": last_question(tokenizer, reply),
            "expected": read(tokenizer, reply.expected_ids),
            "got": read(tokenizer, ids),
            "was_cut": not reply.is_whole,
        }
        for reply, ids, is_exact in zip(outcome.replies, outcome.written, outcome.is_exact)
        if not is_exact
    ]
    return {
        "passed": outcome.passed,
        "rows": len({reply.row for reply in outcome.replies}),
        "replies": len(outcome.replies),
        "reproduced": sum(outcome.is_exact),
        "method": settings.method,
        "learning_rate": outcome.learning_rate,
        "steps": len(outcome.losses),
        "most_steps": outcome.most_steps,
        "first_loss": round(outcome.losses[0], 4),
        "last_loss": round(outcome.losses[-1], 4),
        "seconds": round(outcome.seconds, 1),
        "failed": failed,
        "contradictions": [_describe_contradiction(found, rows, tokenizer) for found in contradictions],
        "cut_rows": [rows.where(row) for row in sorted({reply.row for reply in outcome.replies if not reply.is_whole})],
        "causes": [] if outcome.passed else find_causes(outcome, contradictions, settings),
    }


def find_causes(outcome: Outcome, contradictions: Sequence[Contradiction], settings: Settings) -> list[str]:
    """Likely causes of a failure, the likeliest first."""
    failed = {reply.row for reply, is_exact in zip(outcome.replies, outcome.is_exact) if not is_exact}
    causes = []
    own = [found for found in contradictions if found.rows & failed]
    if own:
        causes.append(
            f"contradictory answers: {len(own)} prompts of the data have several replies, and no model can give more "
            "than one of them; make the questions differ, or keep one reply"
        )
    cut = sum(not reply.is_whole for reply, is_exact in zip(outcome.replies, outcome.is_exact) if not is_exact)
    if cut:
        causes.append(f"{cut} replies are cut off by the length limit; raise --max_seq_length or shorten the rows")
    if len(outcome.losses) >= 12:
        whole, end = (
            measure_improvement(outcome.losses),
            measure_improvement(outcome.losses[len(outcome.losses) // 2 :]),
        )
        rate = f"--learning_rate {outcome.learning_rate:g}"
        if whole.share < NOT_MOVED:
            causes.append(
                f"the loss has hardly moved ({whole.before:.3f} → {whole.now:.3f}): {rate} is too small, or so large "
                f"that nothing is learned; try {outcome.learning_rate * 10:g} and {outcome.learning_rate / 10:g}"
            )
        elif end.share > STILL_FALLING and not own:
            causes.append(
                f"not finished: the loss is still falling; give more steps (--max_steps {2 * outcome.most_steps}), or "
                f"a larger learning rate than {outcome.learning_rate:g}"
            )
        elif not own:
            causes.append(
                f"too little room: the loss stays at {end.now:.3f}; give {MORE_CAPACITY[settings.method]}, or fewer "
                "rows"
            )
    return causes


def describe(report: dict[str, Any]) -> list[str]:
    """The report in lines, for people."""
    lines = [
        f"overfit check {'passed' if report['passed'] else 'FAILED'}: {report['reproduced']} of {report['replies']} "
        f"replies of {report['rows']} rows are reproduced after {report['steps']} steps "
        f"({report['method']}, learning rate {report['learning_rate']:g}, {report['seconds']:g} s; "
        f"loss {report['first_loss']:.3f} → {report['last_loss']:.3f})"
    ]
    for failed in report["failed"][:MOST_SHOWN]:
        lines += [
            f"  row {failed['row']} ({failed['where']})" + (", cut by the length limit" if failed["was_cut"] else ""),
            f"    asked     {shorten(failed['question'])}",
            f"    expected  {shorten(failed['expected'])}",
            f"    got       {shorten(failed['got'])}",
        ]
    if len(report["failed"]) > MOST_SHOWN:
        lines.append(f"  … and {len(report['failed']) - MOST_SHOWN} more")
    for found in report["contradictions"][:MOST_SHOWN]:
        lines.append(f"contradiction: {shorten(found['question'])!r} has {len(found['replies'])} replies")
        lines += [f"    {shorten(reply['text'])!r} in {', '.join(reply['where'])}" for reply in found["replies"]]
    if len(report["contradictions"]) > MOST_SHOWN:
        lines.append(f"  … and {len(report['contradictions']) - MOST_SHOWN} more prompts with several replies")
    lines += [f"likely cause: {cause}" for cause in report["causes"]]
    return lines


def _describe_contradiction(found: Contradiction, rows: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "question": last_question(tokenizer, Reply(0, found.prompt_ids, (), True)),
        "replies": [
            {"text": read(tokenizer, ids), "where": [rows.where(row) for row in places[:MOST_SHOWN]]}
            for ids, places in found.rows_of_reply.items()
        ],
    }


def last_question(tokenizer: Any, reply: Reply) -> str:
    """What the user said last before a reply."""
    ids, starts = list(reply.prompt_ids), {}
    for role in ("<|user|>", "<|assistant|>"):
        token = tokenizer.get_command(role)
        starts[role] = [place for place, found in enumerate(ids) if found == token]
    if starts["<|user|>"]:
        start = starts["<|user|>"][-1]
        end = next((place for place in starts["<|assistant|>"] if place > start), len(ids))
        ids = ids[start + 1 : end]
    return read(tokenizer, ids)


def read(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of ids, without control tokens."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def shorten(text: str) -> str:
    """One line of at most 80 characters."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= LONGEST_TEXT else line[: LONGEST_TEXT - 1] + "…"
