"""The text that `THUDM/chatglm3-tiny` is trained on, generated from `data_processing/data.csv`.

Every document states facts about one Pokémon or a few: cards, tables, prose, questions and answers in plain text,
dialogues in a story or a script, quizzes. None has a role token and none has the wording of the conversations that
`data_processing` makes. Look at some: `python THUDM/build_chatglm3_tiny.py --show 20`.
"""

import csv
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from tiny_wordings import (
    COLUMNS,
    GENERAL_QUESTIONS,
    GENERAL_STATEMENTS,
    PRONOUNS,
    QUESTION_OPENINGS,
    QUESTION_WORDS,
)

FACTS_FILE = Path(__file__).resolve().parent.parent / "data_processing" / "data.csv"
NAME_COLUMN = "姓名"
GENERATION_COLUMN = "世代"
FIRST_GENERATION = "第一世代"
# More than the model is trained on, so that it can be told about these without another vocabulary.
VOCABULARY_COLUMNS = ["姓名", "英文名", "分类", "属性", "弱点", "特征", "隐藏特性", "蛋群", "颜色", "世代", "进化自"]
CATEGORY_SUFFIX = "宝可梦"
NOTHING = "没有"

QUESTION_MARKS = (("问：", "答："), ("问题：", "回答："), ("Q：", "A："), ("提问 ", "解答 "), ("＞ ", "＝ "))
SPEAKERS = ["小智", "小霞", "小刚", "老师", "同学", "博士", "妈妈", "弟弟", "训练家", "店员", "小明", "小红"]
SAYING = ["说", "答道", "回答", "告诉他", "笑着说", "翻开图鉴说", "想了想说"]
ASKING = ["问", "又问", "问道", "追问", "好奇地问", "接着问"]
# Every value in a document stands between these two, which `plain_text` and the encoder take out again: the loss counts
# more on what has to be remembered than on which of many wordings came up.
VALUE_START, VALUE_END = "\x02", "\x03"
STORY_OPENINGS = (
    "",
    "",
    "故事：",
    "{0}去找{1}。",
    "这天{0}遇见{1}。",
    "{1}是熟悉宝可梦的人，{0}有问题要问。",
    "在关都地区，{0}和{1}一起旅行。",
    "{1}是博士的助手，回答总是很准确。",
    "{0}一句话也不说，翻了翻图鉴，然后看着{1}。",
    "关于宝可梦，{1}知道得很多。",
)
TITLES = ["资料卡", "图鉴卡片", "档案", "数据表", "登记表", "小笔记", "记录"]


def load_facts(path: Path = FACTS_FILE) -> list[dict[str, str]]:
    """Rows of the first generation's 151 Pokémon, as they stand in the CSV."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.DictReader(file) if row[GENERATION_COLUMN] == FIRST_GENERATION]


def fact_values(facts: list[dict[str, str]]) -> list[str]:
    """Names and values of the facts, lists split at 、: what becomes one piece each of the vocabulary."""
    values: dict[str, None] = {}
    for column in VOCABULARY_COLUMNS:
        for fact in facts:
            for value in fact[column].split("、"):
                values[value.removesuffix(CATEGORY_SUFFIX) if column == "分类" else value] = None
    return [value for value in values if value]


def mark(value: str) -> str:
    """Put the marks of a value around it."""
    return VALUE_START + value + VALUE_END


def plain_text(document: str) -> str:
    """The document without the marks of values."""
    return document.replace(VALUE_START, "").replace(VALUE_END, "")


class CorpusGenerator:
    """An endless, reproducible stream of documents about the given facts.

    Args:
        facts: rows of the CSV.
        seed: two generators with equal facts and seeds yield equal documents.
    """

    def __init__(self, facts: list[dict[str, str]], seed: int) -> None:
        self.facts = facts
        self.random = random.Random(seed)
        self.pool = facts
        self.queue: list[dict[str, str]] = []
        self.kinds: dict[Callable[[], str], tuple[int, int]] = {
            self.card: (45, 12),
            self.table: (10, 6),
            self.prose: (35, 16),
            self.plain_questions: (4, 24),
            self.script: (2, 14),
            self.story: (2, 12),
            self.quiz: (1, 10),
            self.cloze: (1, 6),
        }

    def document(self, dense: bool) -> str:
        """The next document.

        Args:
            dense: mostly cards and prose, with eight to ten tokens a fact, which is how the facts are learned; else
                mostly questions and dialogues, 25 tokens a fact and more, which teach to find them.
        """
        self.new_style()
        weights = [dense_share if dense else share for dense_share, share in self.kinds.values()]
        return self.random.choices(list(self.kinds), weights)[0]()

    def use_first(self, count: int | None) -> None:
        """Restrict the documents to the first `count` Pokémon; None: all."""
        pool = self.facts[:count]
        if len(pool) != len(self.pool):
            self.pool, self.queue = pool, []

    def next_fact(self) -> dict[str, str]:
        """A Pokémon; each comes once before any comes again, so that all are seen equally often."""
        if not self.queue:
            self.queue = self.random.sample(self.pool, len(self.pool))
        return self.queue.pop()

    def columns(self, fact: dict[str, str], count: int) -> list[str]:
        """Up to `count` distinct columns about which something can be said."""
        known = [column for column, wording in COLUMNS.items() if fact[column] or wording.missing]
        return self.random.sample(known, min(count, len(known)))

    def value(self, fact: dict[str, str], column: str) -> str:
        """The value with its unit, marked as such."""
        return mark(fact[column]) + self.random.choice(COLUMNS[column].unit)

    def new_style(self) -> None:
        """Choose the wordings of the next document: most keep to one label and one sentence form a column.

        Where the wording changed at every sentence, nothing before a sentence would tell how it goes on. Here the style
        can be taken from the context, which is what a prefix acts through.
        """
        self.labels = {column: self.random.choice(wording.labels) for column, wording in COLUMNS.items()}
        general = self.random.choice(GENERAL_STATEMENTS)
        is_general = self.random.random() < 0.5
        self.forms = {
            column: general if is_general else self.random.choice(wording.statements)
            for column, wording in COLUMNS.items()
        }
        self.keeps_style = self.random.random() < 0.75
        self.answer_style = self.random.choice(["value", "name", "name", "pronoun"])

    def label(self, column: str) -> str:
        """A noun for the column, in the document's style."""
        return self.labels[column] if self.keeps_style else self.random.choice(COLUMNS[column].labels)

    def statement(self, fact: dict[str, str], column: str, subject: str) -> str:
        """One sentence, without a full stop."""
        wording = COLUMNS[column]
        if not fact[column]:
            return mark(self.random.choice(wording.missing).format(s=subject))
        if self.keeps_style:
            form = self.forms[column]
        else:
            form = self.random.choice(wording.statements if self.random.random() < 0.5 else GENERAL_STATEMENTS)
        return form.format(s=subject, l=self.label(column), v=self.value(fact, column))

    def question(self, column: str, subject: str) -> str:
        """One question, in any wording: also within a document that keeps its style."""
        wording = COLUMNS[column]
        forms = wording.questions if self.random.random() < 0.55 else GENERAL_QUESTIONS
        word = self.random.choice(QUESTION_WORDS[wording.kind])
        form = self.random.choice(forms)
        text = form.format(s=subject, l=self.random.choice(wording.labels), w=word)
        return self.random.choice(QUESTION_OPENINGS) + text + self.random.choice("？？？?。")

    def answer(self, fact: dict[str, str], column: str) -> str:
        """An answer: the bare value, or a sentence with the name or a pronoun."""
        style = self.answer_style if self.keeps_style else self.random.choice(["value", "name", "name", "pronoun"])
        subject = "它" if style == "pronoun" else fact[NAME_COLUMN]
        if style == "value" and fact[column]:
            return self.value(fact, column) + self.random.choice(["", "。"])
        return self.statement(fact, column, subject) + "。"

    def exchange(self, least: int, most: int) -> Iterator[tuple[str, str]]:
        """Questions and answers about one Pokémon, named at first and then mostly by a pronoun."""
        fact = self.next_fact()
        named = False
        for column in self.columns(fact, self.random.randint(least, most)):
            name_again = not named or self.random.random() < 0.3
            subject = fact[NAME_COLUMN] if name_again else self.random.choice(PRONOUNS)
            named = True
            yield self.question(column, subject), self.answer(fact, column)

    def card(self) -> str:
        """Labels and values of one Pokémon, one a line or in a row."""
        fact = self.next_fact()
        colon = self.random.choice(["：", "：", " ", "＝", "｜", "是"])
        separator = self.random.choice(["\n", "\n", "；", "，", "｜"])
        fields = []
        for column in self.columns(fact, self.random.randint(4, len(COLUMNS))):
            value = self.value(fact, column) if fact[column] else mark(NOTHING)
            fields.append(self.label(column) + colon + value)
        title = self.random.choice(["{}", "【{}】", "名字：{}", "{}的" + self.random.choice(TITLES), "《{}》"])
        return separator.join([title.format(fact[NAME_COLUMN]), *fields])

    def table(self) -> str:
        """Some columns of some Pokémon, one row each."""
        columns = self.random.sample(list(COLUMNS), self.random.randint(2, 6))
        comma = self.random.choice([",", "｜", " "])
        lines = [comma.join(["名字", *(self.label(column) for column in columns)])]
        for _ in range(self.random.randint(2, 6)):
            fact = self.next_fact()
            lines.append(comma.join([fact[NAME_COLUMN], *(mark(fact[column] or NOTHING) for column in columns)]))
        return "\n".join(lines)

    def prose(self) -> str:
        """Sentences about one Pokémon."""
        fact = self.next_fact()
        sentences = []
        for position, column in enumerate(self.columns(fact, self.random.randint(3, 10))):
            name_it = position == 0 or self.random.random() < 0.4
            subject = fact[NAME_COLUMN] if name_it else self.random.choice(PRONOUNS)
            sentences.append(self.statement(fact, column, subject) + self.random.choice("。。，；"))
        return "".join(sentences)[:-1] + "。"

    def plain_questions(self) -> str:
        """Questions and answers in plain text, line by line."""
        ask, reply = self.random.choice(QUESTION_MARKS)
        lines = []
        for _ in range(self.random.randint(1, 2)):
            for question, answer in self.exchange(2, 6):
                lines += [ask + question, reply + answer]
        return "\n".join(lines)

    def script(self) -> str:
        """A dialogue, each line with its speaker."""
        asking, answering = self.random.sample(SPEAKERS, 2)
        lines = []
        for question, answer in self.exchange(3, 7):
            lines += [f"{asking}：{question}", f"{answering}：{answer}"]
        return "\n".join(lines)

    def story(self) -> str:
        """A dialogue inside a story."""
        asking, answering = self.random.sample(SPEAKERS, 2)
        parts = [self.random.choice(STORY_OPENINGS).format(asking, answering)]
        for question, answer in self.exchange(2, 5):
            parts.append(f"{asking}{self.random.choice(ASKING)}：“{question}”")
            parts.append(f"{answering}{self.random.choice(SAYING)}：“{answer}”")
        return "".join(parts)

    def quiz(self) -> str:
        """Numbered questions about different Pokémon with their answers."""
        lines = []
        for number in range(1, self.random.randint(3, 8)):
            for question, answer in self.exchange(1, 1):
                lines.append(f"{number}. {question}（{self.random.choice(['答案', '答', '正确答案'])}：{answer}）")
        return "\n".join(lines)

    def cloze(self) -> str:
        """Sentences with a gap, and what belongs there."""
        lines = []
        for _ in range(self.random.randint(2, 5)):
            fact = self.next_fact()
            column = self.random.choice([column for column in COLUMNS if fact[column]])
            form = self.random.choice(COLUMNS[column].statements + GENERAL_STATEMENTS)
            label = self.random.choice(COLUMNS[column].labels)
            gap = form.format(s=fact[NAME_COLUMN], l=label, v="（）")
            lines.append(f"填空：{gap}。空格里是{self.value(fact, column)}。")
        return "\n".join(lines)
