"""What the tests of the evaluation room share: a small table of facts, dialogues about it, scripted replies."""

from finetune_chatmodel_demo.evaluation.facts import FactTable, build_field, normalized_names
from finetune_chatmodel_demo.evaluation.judge import check_reply
from finetune_chatmodel_demo.evaluation.questions import (
    MULTI_TURN,
    TRAINED,
    UNANSWERABLE,
    UNSEEN,
    Dialogue,
    QuestionSet,
    Turn,
)
from finetune_chatmodel_demo.generation.batch import BatchReply

CELLS = {
    "皮卡丘": {"属性": "电", "身高": "0.4"},
    "妙蛙种子": {"属性": "草、毒", "身高": "0.7"},
    "小火龙": {"属性": "火", "身高": "0.6"},
    "雷丘": {"属性": "电", "身高": "0.8"},
}


def build_table() -> FactTable:
    """Four Pokémon, a list and a number with a unit."""
    units = {"属性": "", "身高": "米"}
    fields = {
        column: build_field(column, [cells[column] for cells in CELLS.values()], unit=unit)
        for column, unit in units.items()
    }
    return FactTable(fields, CELLS, normalized_names({name: name for name in CELLS}))


def right_answer(subject: str, column: str) -> str:
    return f"{subject}的{column}是{CELLS[subject][column]}{'米' if column == '身高' else ''}。"


def ask(subject: str, column: str, group: str = TRAINED, kind: str = "opening", text: str | None = None) -> Turn:
    reply = right_answer(subject, column)
    return Turn(text or f"{subject}的{column}？", group, kind, subject, column, reply, (reply,))


def build_questions() -> QuestionSet:
    """Single questions, unseen ones, a conversation of three turns and one with an unanswerable question."""
    dialogues = [
        *(Dialogue("图鉴", (ask(subject, "属性"),)) for subject in CELLS),
        *(Dialogue(None, (ask(subject, "身高", UNSEEN, text=f"{subject}有几米？"),)) for subject in CELLS),
        Dialogue(
            None,
            (
                ask("皮卡丘", "属性", MULTI_TURN),
                ask("小火龙", "身高", MULTI_TURN, "second subject"),
                ask("小火龙", "属性", MULTI_TURN, "pronoun after the change", "它的属性呢？"),
            ),
        ),
        Dialogue(
            None,
            (
                ask("雷丘", "属性", MULTI_TURN),
                Turn("它的生日呢？", UNANSWERABLE, "unknown column", "雷丘", None, "资料里没有记载。"),
            ),
        ),
    ]
    questions = QuestionSet(build_table(), tuple(dialogues), {"seed": 0, "held_out": []})
    for turn in questions.turns:
        verdict = check_reply(questions.table, column=turn.column, subject=turn.subject, reply=turn.reference)
        assert verdict.outcome == "exact"
    return questions


class Script:
    """In place of `generate_replies`: the reply to each prompt is what `answer` makes of the rendered conversation.

    Attributes:
        prompts: every prompt that was answered, as text.
    """

    def __init__(self, answer) -> None:
        self.answer, self.prompts = answer, []

    def __call__(self, model, tokenizer, prompts, **options) -> list[BatchReply]:
        replies = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            self.prompts.append(text)
            reply = self.answer(text)
            replies.append(reply if isinstance(reply, BatchReply) else BatchReply(reply, hit_cap=False))
        return replies
