"""The room data_processing: a CSV row becomes conversations whose every fact is the row's own cell."""

import contextlib
import csv
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pandas
import pytest
from conftest import read_light_help
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing import csv_rows, format_advertise_gen, format_tool_alpaca, format_tool_poke
from data_processing import data_processing as program
from data_processing.conversation_builder import build_conversations
from data_processing.csv_rows import CsvRows
from data_processing.template_reader import load_template
from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import partial_path
from finetune_chatmodel_demo.conversation.records import RecordError, validate_conversation

ROOM = Path(program.__file__).resolve().parent
DATA = ROOM / "data.csv"
TEMPLATES = ROOM / "templates"
SPLITS = ("train", "validation")
FLAGS = ("传说", "幻之")

# What an answer about an empty cell says (pokemon.yaml); none of these may appear where the cell is filled.
EMPTY_WORDINGS = {
    "分类": ("没有记载", "空缺"),
    "四倍弱点": ("没有四倍弱点", "不存在四倍弱点", "没有哪种属性"),
    "抵抗": ("没有能抵抗", "没有抵抗"),
    "免疫": ("没有免疫",),
    "隐藏特性": ("没有隐藏特性",),
    "进化自": ("不是由别的", "没有进化前", "没有哪只"),
    "进化等级": ("没有固定的进化等级", "没有写明等级"),
}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return list(CsvRows(DATA))


def build_all(template_name: str, rows: list[dict[str, str]]) -> dict[str, list[tuple[dict, list[dict]]]]:
    """split → (row, messages) of every conversation."""
    template = load_template(TEMPLATES / template_name)
    found = {split: [] for split in SPLITS}
    for row in filter(template.matches, rows):
        for split in SPLITS:
            found[split] += [(row, r["conversations"]) for r in build_conversations(template, row, split)]
    return found


@pytest.fixture(scope="module")
def pokemon(rows):
    return build_all("pokemon.yaml", rows)


@pytest.fixture(scope="module")
def kanto(rows):
    return build_all("pokemon_kanto.yaml", rows)


def convert(tmp_path: Path, csv_text: str, template_text: str, *extra: str) -> list[dict]:
    """Runs the program on made-up files and returns the training conversations."""
    (tmp_path / "rows.csv").write_text(csv_text, encoding="utf-8")
    (tmp_path / "template.yaml").write_text(template_text, encoding="utf-8")
    files = {"--input": "rows.csv", "--template": "template.yaml", "--output": "out.json"}
    program.main([part for flag, name in files.items() for part in (flag, str(tmp_path / name))] + list(extra))
    return json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))


def contents(record: dict, role: str) -> list[str]:
    return [message["content"] for message in record["conversations"] if message["role"] == role]


# ---------------------------------------------------------------- the Pokémon templates


def test_kanto_conversation_of_bulbasaur(kanto):
    messages = next(messages for row, messages in kanto["train"] if row["姓名"] == "妙蛙种子")
    assert messages == [
        {"role": "system", "content": "你是宝可梦图鉴，请准确回答问题。"},
        {"role": "user", "content": "妙蛙种子的特性是什么？"},
        {"role": "assistant", "content": "妙蛙种子的特性是茂盛。", "column": "特征"},
        {"role": "user", "content": "这只宝可梦是哪一类宝可梦？"},
        {"role": "assistant", "content": "妙蛙种子是种子宝可梦。", "column": "分类"},
        {"role": "user", "content": "这只宝可梦进化前是什么宝可梦？"},
        {"role": "assistant", "content": "妙蛙种子没有进化前的形态。", "column": "进化自"},
        {"role": "user", "content": "妙蛙种子属于哪种属性？"},
        {"role": "assistant", "content": "妙蛙种子的属性是草、毒。", "column": "属性"},
    ]


def test_kanto_has_one_answer_for_each_fact(kanto):
    answers = defaultdict(set)
    for split in SPLITS:
        for row, messages in kanto[split]:
            for message in messages:
                if message["role"] == "assistant":
                    answers[row["姓名"], message["column"]].add(message["content"])
    columns = {"属性", "弱点", "特征", "分类", "英文名", "颜色", "进化自", "身高"}
    assert {column for _, column in answers} == columns
    assert len(answers) == 151 * len(columns)  # every fact is asked for
    assert {len(wordings) for wordings in answers.values()} == {1}
    assert answers["皮卡丘", "进化自"] == {"皮卡丘是由皮丘进化来的。"}
    assert answers["小拉达", "英文名"] == {"小拉达的英文名是Rattata。"}


def test_every_fact_is_the_cell(pokemon):
    for _split, row, message in ((s, r, m) for s in SPLITS for r, ms in pokemon[s] for m in ms):
        column = message.get("column")
        if column is None:
            continue
        cell, text = row[column], message["content"]
        if column in FLAGS:
            assert ("不" in text) == (cell == "0"), (row["姓名"], text)
        elif cell:
            assert cell in text, (row["姓名"], column, text)
            assert not any(wording in text for wording in EMPTY_WORDINGS.get(column, ())), (row["姓名"], text)
        else:
            assert any(wording in text for wording in EMPTY_WORDINGS[column]), (row["姓名"], column, text)


def test_answers_name_no_other_pokemon(pokemon, rows):
    """An answer may name the Pokémon, what it evolves from, and nothing else that is a name."""
    long_names = {row["姓名"] for row in rows if len(row["姓名"]) > 3}
    for row, messages in pokemon["train"]:
        own = row["姓名"] + row["进化自"]
        for message in messages:
            strangers = [name for name in long_names if name in message["content"] and name not in own]
            assert not strangers, (row["姓名"], message["content"])


def test_units_and_flags(pokemon):
    texts = defaultdict(set)
    for split in SPLITS:
        for row, messages in pokemon[split]:
            for message in messages:
                if message["role"] == "assistant":
                    texts[row["姓名"], message.get("column")].add(message["content"])
    assert all(f"{height}米" in text for height in ["0.7"] for text in texts["妙蛙种子", "身高"])
    assert all("6.9公斤" in text for text in texts["妙蛙种子", "体重"])
    mew = texts["梦幻", "传说"]
    assert mew <= {
        "梦幻是幻之宝可梦，不算传说的宝可梦。",
        "不是，它不是传说的宝可梦，而是幻之宝可梦。",
        "不是，梦幻不是传说的宝可梦，而是幻之宝可梦。",
        "不是，这只宝可梦不是传说的宝可梦，而是幻之宝可梦。",
    }
    assert not any("蛋群是未发现，" not in text and "未发现群" not in text for text in texts["超梦", "蛋群"])
    assert any("第一世代" in text for text in texts["妙蛙种子", "世代"])


@pytest.mark.parametrize("template_name", ["pokemon.yaml", "pokemon_kanto.yaml"])
def test_form_of_conversations(template_name, request):
    found = request.getfixturevalue("pokemon" if template_name == "pokemon.yaml" else "kanto")
    pair_counts = Counter()
    system_count = 0
    for row, messages in found["train"] + found["validation"]:
        validate_conversation({"conversations": messages}, "here")
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            system_count += 1
            roles.pop(0)
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        pair_counts[len(roles) // 2] += 1
        opening = next(message["content"] for message in messages if message["role"] == "user")
        named = {row["姓名"], row["英文名"], row["编号"]}
        assert any(name in opening for name in named), opening
        columns = [message.get("column") for message in messages if message["role"] == "assistant"]
        assert all(count == 1 for column, count in Counter(columns).items() if column), columns
    assert set(pair_counts) == {3, 4, 5, 6}
    assert 0.6 < system_count / sum(pair_counts.values()) < 0.9


@pytest.mark.parametrize("template_name", ["pokemon.yaml", "pokemon_kanto.yaml", "custom_columns.yaml"])
def test_validation_asks_what_training_never_asked(template_name, request, rows, tmp_path):
    if template_name == "custom_columns.yaml":
        (tmp_path / "own.csv").write_text(OWN_CSV, encoding="utf-8")
        found = build_all(template_name, list(CsvRows(tmp_path / "own.csv")))
    else:
        found = request.getfixturevalue("pokemon" if template_name == "pokemon.yaml" else "kanto")
    asked = {s: {m["content"] for _, ms in found[s] for m in ms if m["role"] == "user"} for s in SPLITS}
    assert asked["train"] and asked["validation"]
    assert not asked["train"] & asked["validation"]


def test_all_columns_and_enough_phrasings(pokemon):
    with DATA.open(encoding="utf-8") as file:
        columns = set(next(csv.reader(file)))
    assert len(columns) == 27
    for split in SPLITS:
        assert {m["column"] for _, ms in pokemon[split] for m in ms if "column" in m} == columns
    for name, least in {"pokemon.yaml": (5, 2), "pokemon_kanto.yaml": (6, 3), "custom_columns.yaml": (5, 2)}.items():
        for question in load_template(TEMPLATES / name).questions:
            pools = tuple(len(question.phrasings[split]) for split in SPLITS)
            assert pools[0] >= least[0] and pools[1] >= least[1], (name, question.place, pools)


def test_a_row_does_not_depend_on_other_rows_but_on_the_seed(rows):
    template = load_template(TEMPLATES / "pokemon.yaml")
    alone = build_conversations(template, rows[24], "train", seed=7)
    for row in rows[:5]:
        build_conversations(template, row, "train", seed=7)
    assert build_conversations(template, dict(rows[24]), "train", seed=7) == alone
    assert build_conversations(template, rows[24], "train", seed=8) != alone
    assert len(alone) == 7


# ---------------------------------------------------------------- one's own CSV

OWN_CSV = """姓名,属性,弱点,特征,数据
皮卡丘,电,地面,脸颊两边的囊里储存着电力,"身高0.4米, 体重6.0公斤；速度90"
妙蛙种子,草、毒,飞行、火、超能力、冰,背上有一颗种子,"HP 45
攻击 49"
小火龙,火,,尾巴上的火焰,
空空,,,,
"""


def test_own_columns(tmp_path, capsys):
    (tmp_path / "own.csv").write_text(OWN_CSV, encoding="utf-8")
    program.main(
        ["--input", str(tmp_path / "own.csv"), "--template", str(TEMPLATES / "custom_columns.yaml")]
        + ["--output", str(tmp_path / "own.json")]
    )
    records = json.loads((tmp_path / "own.json").read_text(encoding="utf-8"))
    said = defaultdict(set)
    for record in records:
        name = next(n for n in ("皮卡丘", "妙蛙种子", "小火龙") if n in contents(record, "user")[0])
        for message in record["conversations"]:
            if message["role"] == "assistant":
                said[name, message["column"]].add(message["content"])
    assert all(text.endswith("身高0.4米, 体重6.0公斤；速度90") for text in said["皮卡丘", "数据"])
    assert all(text.endswith("HP 45\n攻击 49") for text in said["妙蛙种子", "数据"])
    assert said["小火龙", "弱点"] == {"资料里没有记载小火龙的弱点。"}
    assert said["小火龙", "数据"] == set()
    assert (tmp_path / "own_validation.json").is_file()
    output = capsys.readouterr().out
    assert "rows read: 4, kept: 3, filtered by `where`: 0, too few filled cells: 1, bad: 0" in output
    assert f"train: {len(records)} conversations" in output


# ---------------------------------------------------------------- the template language

SMALL = """
turns: {turns}
order: {order}
{more}
questions:
  - column: b
    train: ["b of {{a}}?"]
    answers: "{{b}} {{{{x}}}}"
  - column: c
    train: ["c of {{a}}?"]
    answers:
      - where: {{c: 1}}
        say: "yes"
      - where: {{c: ["0", "2"]}}
        say: "no"
  - train: ["d of {{a}}?"]
    probability: {probability}
    answers: ["{{d}}"]
"""


def small(turns="[1, 3]", order="as_written", probability=1, more=""):
    return SMALL.format(turns=turns, order=order, probability=probability, more=more)


def test_cases_escapes_and_empty_cells(tmp_path):
    records = convert(tmp_path, "a,b,c,d\nA,B,1.0,D\nA2,B2,2,\nA3,,7,D3\n", small(turns="[1, 3]"))
    answers = {contents(r, "user")[0].split()[-1]: contents(r, "assistant") for r in records}
    allowed = {"A?": ["B {x}", "yes", "D"], "A2?": ["B2 {x}", "no"], "A3?": ["D3"]}
    assert set(answers) == set(allowed)
    for name, said in answers.items():
        assert said == [text for text in allowed[name] if text in said]
    assert convert(tmp_path, "a,b,c,d\nA,B,1.0,D\n", small(turns=3))[0]["conversations"][1] == {
        "role": "assistant",
        "content": "B {x}",
        "column": "b",
    }


def test_probability(tmp_path):
    csv_text = "a,b,c,d\n" + "".join(f"A{i},B,1,D\n" for i in range(400))
    never = convert(tmp_path, csv_text, small(turns="[2, 3]", probability=0))
    assert all(contents(record, "assistant") == ["B {x}", "yes"] for record in never)
    needed = convert(tmp_path, csv_text, small(turns="[3, 3]", probability=0))
    assert all(len(contents(record, "user")) == 3 for record in needed)
    sometimes = convert(tmp_path, csv_text, small(turns="[1, 3]", probability=0.5))
    share = sum("D" in contents(record, "assistant") for record in sometimes) / len(sometimes)
    assert 0.2 < share < 0.5  # half of the conversations consider it, some of those are shorter


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("b: B1", ["A1"]),
        ("b: [B1, B3]", ["A1", "A3"]),
        ("b: {not: B1}", ["A2", "A3"]),
        ('d: ""', ["A2"]),
        ('d: {not: ""}', ["A1", "A3"]),
        ("c: {at_least: 2}", ["A2", "A3"]),
        ("c: {at_least: 2, at_most: 2}", ["A2"]),
    ],
)
def test_where(tmp_path, where, expected):
    template = small(turns=1, more=f"where: {{{where}}}")
    records = convert(tmp_path, "a,b,c,d\nA1,B1,1,D\nA2,B2,2.0,\nA3,B3,10,D\n", template)
    names = sorted({contents(record, "user")[0].split()[-1].rstrip("?") for record in records})
    assert names == expected


def test_limit_counts_kept_rows(tmp_path, capsys):
    text = "a,b,c,d\nA1,B1,1,D\nA2,B2,1,D\nA3,B2,1,D\nA4,B2,1,D\n"
    records = convert(tmp_path, text, small(turns=1, more="where: {b: B2}"), "--limit", "2")
    assert {contents(record, "user")[0].split()[-1] for record in records} == {"A2?", "A3?"}
    assert "rows read: 3, kept: 2, filtered by `where`: 1" in capsys.readouterr().out


GOOD = small(turns=1)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (GOOD.replace("{b}", "{bb}"), "'bb' (in TEMPLATE at questions[0] (b).answers); did you mean 'b'?"),
        (GOOD.replace("c: 1", "cc: 1"), "'cc' (in TEMPLATE at questions[1] (c).answers[0].where.cc)"),
        (GOOD.replace("answers", "answer", 1), "at questions[0]: unknown key 'answer'; did you mean 'answers'?"),
        (GOOD.replace("turns: 1", "turn: 1"), "unknown key 'turn'; did you mean 'turns'?"),
        (GOOD.replace("turns: 1", "turns: [3, 2]"), "at turns: fewest is above most"),
        (GOOD.replace("turns: 1", "turns: 0"), "at turns: expected a whole number of 1 or more, got 0"),
        (GOOD.replace("as_written", "sorted"), "at order: expected shuffle or as_written, got 'sorted'"),
        (GOOD.replace("probability: 1", "probability: 2"), "questions[2].probability: expected a number from 0 to 1"),
        (GOOD.replace("{d}", "{d"), "questions[2].answers[0]: a stray brace in '{d'"),
        (GOOD.replace("c: 1", "c: {above: 1}"), "unknown comparison 'above'; use not, at_least, at_most"),
        (GOOD.replace("c: 1", "c: yes"), "expected a text or a number, got True"),
        (GOOD + "turns: 1\n", "the key 'turns' is written twice"),
        ("turns: 1\nquestions: []\n", "at questions: expected a list with at least one question"),
        ("a: [1", "is not valid YAML"),
        ("a: " + "[" * 2000, "is not valid YAML"),
        ("- 1\n", "expected keys and values, got [1]"),
        (GOOD.replace("    probability", "    validation: ['d of {a}']\n    probability"), "is also trained on, at"),
        (GOOD + "validation_conversations_per_row: 1\n", "no question has `validation` phrasings"),
        (GOOD + "subject: {placeholder: it, opening: x, later: it}\n", "'x' names no column"),
        (GOOD + "subject: {placeholder: b, opening: '{a}', later: it}\n", "'b' is also a column of"),
        (
            GOOD.replace('"b of {a}?"', '"b?"') + "subject: {placeholder: it, opening: '{a}', later: it}\n",
            "questions[0] (b).train: no phrasing names the subject; use {it}",
        ),
        (GOOD + "where: {b: nothing}\n", "no row of"),
    ],
)
def test_template_errors(tmp_path, template, expected):
    with pytest.raises(UserError) as error:
        convert(tmp_path, "a,b,c,d\nA,B,1,D\n", template)
    message = str(error.value).replace(str(tmp_path / "template.yaml"), "TEMPLATE")
    assert expected in message
    assert "TEMPLATE" in message
    assert not list(tmp_path.glob("*.json")) + list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- the CSV


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty (0 bytes)"),
        ("\n\n", "has no header: every line is blank"),
        ("a,b,c,d\n", "has a header and no rows"),
        ("a,b,c\nA,B,C\n", "lacks 1 column(s) that the template names"),
        ("a,b,c,d,b\nA,B,1,D,B\n", "the header names columns twice: {'b': [2, 5]}"),
        ("a,b,c,d\nA,B,1,D\nA,B\n", "rows.csv line 3: 2 cells where the header has 4 columns"),
        ('a,b,c,d\n"A\nA",B,1,D\nA,B,1,D,E\n', "rows.csv line 4: 5 cells where the header has 4 columns"),
        ('a,b,c,d\nA,"B,1,D\nA,B,1,D\n', "the row that starts at line 2 cannot be read"),
    ],
)
def test_csv_errors(tmp_path, text, expected):
    with pytest.raises(UserError) as error:
        convert(tmp_path, text, GOOD)
    assert expected in str(error.value)
    assert "rows.csv" in str(error.value)
    assert not list(tmp_path.glob("*.json")) + list(tmp_path.glob(".*"))


def test_unknown_column_names_the_csv_columns(tmp_path):
    with pytest.raises(UserError) as error:
        convert(tmp_path, "a,b,c\nA,B,1\n", GOOD)
    assert "the table has: a, b, c" in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings(tmp_path, encoding, newline):
    text = "姓名,属性\n妙蛙种子,草、毒\n小火龙,火\n".replace("\n", newline)
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    rows = CsvRows(tmp_path / "x.csv")
    assert rows.columns == ["姓名", "属性"]
    assert list(rows) == [{"姓名": "妙蛙种子", "属性": "草、毒"}, {"姓名": "小火龙", "属性": "火"}]


def test_blank_rows_spaces_and_unnamed_columns(tmp_path):
    (tmp_path / "x.csv").write_text("\n,a, b \n0, A ,B\n,,\n\n1,,B2\n", encoding="utf-8")
    rows = CsvRows(tmp_path / "x.csv")
    assert rows.columns == ["a", "b"]
    assert list(rows) == [{"a": "A", "b": "B"}, {"a": "", "b": "B2"}]


def test_ragged_rows_are_skipped_on_request(tmp_path, capsys):
    text = "a,b,c,d\nA,B,1,D\nshort,B\nA2,B,1,D\n"
    records = convert(tmp_path, text, GOOD, "--on_bad_record", "skip")
    assert len(records) == 2
    captured = capsys.readouterr()
    assert "rows read: 2, kept: 2" in captured.out and "bad: 1" in captured.out
    assert "rows.csv line 3: 2 cells" in captured.err


ROWS = [["姓名", "属性"], ["妙蛙种子", "草、毒"], ["小火龙", "火, 热"], ["杰尼龟", ""]]


def write_table(path: Path, rows: list[list[str]], separator: str) -> Path:
    """A table in the form of its name: .xlsx, else text."""
    if path.suffix == ".xlsx":
        pandas.DataFrame(rows).to_excel(path, header=False, index=False)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("name", "separator"), [("x.csv", ","), ("x.csv", ";"), ("x.csv", "\t"), ("x.tsv", "\t"), ("x.xlsx", "")]
)
def test_tables_of_every_kind_give_the_same_rows(tmp_path, name, separator):
    rows = CsvRows(write_table(tmp_path / name, ROWS, separator))
    assert rows.columns == ROWS[0]
    assert list(rows) == [dict(zip(ROWS[0], row)) for row in ROWS[1:]]


CELLS = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="nN"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from([",", ";", "\t"]))
def test_cells_come_back_as_they_were_written(rows, separator):
    with tempfile.TemporaryDirectory() as folder:
        path = write_table(Path(folder) / "x.csv", [["a", "b"], *rows], separator)
        assert [tuple(row.values()) for row in CsvRows(path)] == rows


@pytest.mark.parametrize(
    ("cell", "read"),
    [
        *(("nan", ""), ("NaN", ""), ("草、nan", "草"), ("草nan", "草"), ("Ivy, nan", "Ivy"), ("nan、草", "nan、草")),
        *(("Conan", "Conan"), ("banan", "banan"), ("None", "None"), ("No\0ne", "No\0ne"), ("nano", "nano")),
    ],
)
def test_nan_at_the_end_of_a_cell_is_no_value(tmp_path, cell, read):
    path = write_table(tmp_path / "x.csv", [["a", "b"], ["A", cell]], ",")
    assert list(CsvRows(path)) == [{"a": "A", "b": read}]


def test_odd_cells_are_named_and_counted(tmp_path, capsys):
    """What pandas wrote for no value counts as empty: the question about it is not asked, and nothing says nan."""
    text = "a,b,c,d\nA1,nan,1,D\nA2,None,1,D\nA3,B\0,1,D\nA4,B4,1,NaN\n"
    with pytest.MonkeyPatch.context() as patch:
        warned = []
        patch.setattr(csv_rows.logger, "warning", lambda message, *values: warned.append(message % values))
        records = convert(tmp_path, text, small(turns="[1, 3]"))
    assert "nan" not in json.dumps(records).lower()
    assert {contents(record, "assistant")[0] for record in records} <= {"yes", "None {x}", "B\0 {x}", "B4 {x}", "D"}
    facts = sorted((line.split("rows.csv: ")[1].split(" cells")[0], line.split("the first: ")[1]) for line in warned)
    path = tmp_path / "rows.csv"
    assert facts == [
        ("1", f"{path} line 3, column b)"),
        ("1", f"{path} line 4, column b)"),
        ("2", f"{path} line 2, column b)"),
    ]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=120), st.sampled_from(["x.csv", "x.tsv", "x.xlsx"]), st.booleans())
def test_any_bytes_are_read_or_refused_in_a_line(content, name, after_a_header):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(b"a,b\n" * after_a_header + content)
        try:
            assert all(isinstance(cell, str) for row in CsvRows(path, "skip") for cell in row.values())
        except UserError as error:
            assert str(path) in str(error)


def test_a_damaged_workbook_is_refused_in_a_line(tmp_path):
    whole = write_table(tmp_path / "x.xlsx", ROWS, "").read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        (tmp_path / "x.xlsx").write_bytes(whole[:place] + b"\xff\x00\xff" + whole[place + 3 :])
        with contextlib.suppress(UserError):
            list(CsvRows(tmp_path / "x.xlsx"))


# ---------------------------------------------------------------- habits


def test_a_template_that_fits_is_named(tmp_path):
    (tmp_path / "own.csv").write_text(OWN_CSV, encoding="utf-8")
    with pytest.raises(UserError) as error:
        program.main(["--input", str(tmp_path / "own.csv"), "--output", str(tmp_path / "o.json")])
    message = str(error.value)
    assert "'英文名' (in" in message and "the table has: 姓名, 属性, 弱点, 特征, 数据" in message
    assert message.count("--template") == 1
    assert f"--template {TEMPLATES / 'custom_columns.yaml'} names only" in message


def test_backslashes_separate_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/rows.csv").write_text("a,b,c,d\nA,B,1,D\n", encoding="utf-8")
    Path("data/t.yaml").write_text(GOOD, encoding="utf-8")
    program.main(["--input", r"data\rows.csv", "--template", r"data\t.yaml", "--output", r"out\deep\x.json"])
    assert Path("out/deep/x.json").is_file()
    format_tool_poke.main(["--path", r"out\deep\x.json", "--output", r"out\y.jsonl"])
    assert Path("out/y.jsonl").is_file()


# ---------------------------------------------------------------- files


def test_a_failed_run_leaves_the_old_output_alone(tmp_path):
    (tmp_path / "out.json").write_text("old", encoding="utf-8")
    with pytest.raises(UserError):
        convert(tmp_path, "a,b,c,d\n" + "A,B,1,D\n" * 2000 + "A,B\n", GOOD)
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "rows.csv", "template.yaml"]


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A folder on a disk of 260 kB; where none may be mounted, one whose files cannot be flushed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=260k", "tmpfs", str(folder)]
    is_mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    if not is_mounted:

        def fail(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fail)
    yield folder
    if is_mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("count", [1, 900, 2000, 6000])
def test_a_full_disk_is_told_in_a_line_and_nothing_is_left(tmp_path, full_disk, count, capsys):
    """Whether the file, its last buffer or the second file does not fit."""
    (tmp_path / "rows.csv").write_text("a,b,c,d\n" + "A,B,1,D\n" * count, encoding="utf-8")
    (tmp_path / "template.yaml").write_text(GOOD, encoding="utf-8")
    (full_disk / "filler").write_bytes(b"x" * 200_000)
    flags = ["--input", tmp_path / "rows.csv", "--template", tmp_path / "template.yaml"]
    output = full_disk / "out.json"
    status = run_program(lambda: program.main([*map(str, flags), "--output", str(output)]))
    if status == 0:
        assert len(json.loads(output.read_text())) == count
    else:
        assert status == 2
        assert [path.name for path in full_disk.iterdir()] == ["filler"]
        last = capsys.readouterr().err.splitlines()[-1]
        assert "No space left on device" in last and str(output) in last and "make room" in last


def test_what_a_killed_run_left_is_gone_after_the_next(tmp_path):
    partial_path(tmp_path / "out.json").write_text("half", encoding="utf-8")
    convert(tmp_path, "a,b,c,d\nA,B,1,D\n", GOOD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "rows.csv", "template.yaml"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "rows.csv"], "is also an input"),
        (["--output", "."], "is not a regular file"),
        (["--output", "new.json", "--validation_output", "new2.json"], "makes no validation conversations"),
        (["--input", "missing.csv"], "does not exist"),
    ],
)
def test_path_errors(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("a,b,c,d\nA,B,1,D\n", encoding="utf-8")
    Path("template.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(UserError, match=expected):
        program.main(["--input", "rows.csv", "--template", "template.yaml", *arguments])
    assert Path("rows.csv").read_text(encoding="utf-8") == "a,b,c,d\nA,B,1,D\n"


MEASURE = """
import resource, sys
from data_processing.data_processing import main
main(sys.argv[1:])
print("PEAK_KIB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_rows(tmp_path):
    (tmp_path / "template.yaml").write_text(GOOD, encoding="utf-8")
    peaks = []
    for count in (20_000, 200_000):
        with (tmp_path / "rows.csv").open("w", encoding="utf-8") as file:
            file.write("a,b,c,d\n")
            file.writelines(f"名字{i},{'文本' * 20}{i},1,{i}\n" for i in range(count))
        arguments = ["--input", "rows.csv", "--template", "template.yaml", "--output", "out.json"]
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOM.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"train: {count} conversations" in result.stdout
        peaks.append(int(result.stdout.split("PEAK_KIB")[1]))
    # 180,000 rows more are 27 MB more of CSV; 3 MiB are the noise of the allocator.
    assert peaks[1] - peaks[0] < 3 * 1024, peaks


# ---------------------------------------------------------------- the programs


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOM / script), *arguments], cwd=cwd, capture_output=True, text=True)


def test_from_csv_to_jsonl_by_the_commands(tmp_path):
    made = run("data_processing.py", "--output", "x.json", "--limit", "20", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "rows read: 20, kept: 20" in made.stdout and "train: 140 conversations" in made.stdout
    result = run("format_tool_poke.py", "--path", "x.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "formatted_data" / "pokemon_conversations.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    lengths = Counter(len(json.loads(line)["conversations"]) for line in written)
    assert result.stdout.splitlines()[:3] == [
        "err_count: 0",
        "train_examples: 140",
        f"conversation_distribution: {lengths}",
    ]


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    for script, flag, name in (("data_processing.py", "--input", "x.csv"), ("format_tool_poke.py", "--path", "x.json")):
        result = run(script, flag, name, cwd=tmp_path)
        message = f"{script}: error: {name} does not exist; name an input file\n"
        assert (result.returncode, result.stderr) == (2, message)


@pytest.mark.parametrize(
    "script", ["data_processing.py", "format_tool_poke.py", "format_tool_alpaca.py", "format_advertise_gen.py"]
)
def test_help_is_light(script, tmp_path):
    assert read_light_help(ROOM / script, tmp_path, "pandas", "yaml").startswith("usage: ")


# ---------------------------------------------------------------- format_*.py


def test_poke_counts_bad_records(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = {"conversations": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}
    bad = {"conversations": [{"role": "bot", "content": "?"}]}
    Path("x.json").write_text(json.dumps([good, bad, good]), encoding="utf-8-sig")
    with pytest.raises(RecordError, match=r"x\.json record 2 .*role 'bot' is unknown"):
        format_tool_poke.main(["--path", "x.json"])
    assert not Path("formatted_data/pokemon_conversations.jsonl").exists()
    format_tool_poke.main(["--path", "x.json", "--on_bad_record", "skip", "--output", "y.jsonl"])
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "err_count: 1",
        "train_examples: 2",
        "conversation_distribution: Counter({2: 2})",
        "→ y.jsonl",
    ]
    assert "x.json record 2" in captured.err and "role 'bot' is unknown" in captured.err
    assert Path("y.jsonl").read_text(encoding="utf-8") == (json.dumps(good, ensure_ascii=False) + "\n") * 2
    with pytest.raises(UserError, match="is the file to read"):
        format_tool_poke.main(["--path", "y.jsonl", "--output", "./y.jsonl"])


TOOL_ALPACA = [
    {
        "Name": "Weather",
        "Description": "Forecasts",
        "Category": "Science",
        "NLDocumentation": 'getWeather: Weather of a city.\nParameters: {"city": "Required. string."}',
        "Function_Description": {"getWeather": "Weather of a city.", "components": ""},
        "Function_Projection": {"getWeather": ["/weather", "get"]},
        "Instances": [
            {
                "input": "Is it raining in Oslo?",
                "output": "Yes, it is raining in Oslo.",
                "Final Thought": "I have what I need.",
                "intermediate_steps": [
                    [
                        [
                            "getWeather",
                            '{"city": "Oslo"}',
                            ' I look it up.\nAction: getWeather\nAction Input: {"city": "Oslo"}',
                        ],
                        "Status Code: 200. Response: rain",
                    ]
                ],
            },
            {"input": "x", "output": "y", "Final Thought": "z", "intermediate_steps": [[["a", "{", "b"], "c"]]},
            {"input": "x", "output": "y", "intermediate_steps": []},
            {"input": "x", "output": "y", "Final Thought": "z", "intermediate_steps": [[["a", "[1]", "b"], "c"]]},
            {"input": "Hi", "output": "Hello.", "Final Thought": "No tool is needed.", "intermediate_steps": []},
        ],
    },
    {"Name": "Broken", "NLDocumentation": "d"},
]


def test_tool_alpaca(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train_data.json").write_text(json.dumps(TOOL_ALPACA, indent=4), encoding="utf-8")
    format_tool_alpaca.main(["--path", "train_data.json"])
    lines = Path("formatted_data/tool_alpaca.jsonl").read_text(encoding="utf-8").splitlines()
    tools = [TOOL_ALPACA[0]["NLDocumentation"]]
    assert [json.loads(line) for line in lines] == [
        {
            "tools": tools,
            "conversations": [
                {"role": "user", "content": "Is it raining in Oslo?"},
                {"role": "assistant", "content": "I look it up."},
                {
                    "role": "tool",
                    "name": "getWeather",
                    "parameters": {"city": "Oslo"},
                    "observation": "Status Code: 200. Response: rain",
                },
                {"role": "assistant", "content": "I have what I need.\nYes, it is raining in Oslo."},
            ],
        },
        {
            "tools": tools,
            "conversations": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "No tool is needed.\nHello."},
            ],
        },
    ]
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:3] == [
        "err_count: 4",
        "train_examples: 2",
        "conversation_distribution: Counter({4: 1, 2: 1})",
    ]
    for reason in (
        "Instances[1]: an action input is not JSON",
        "Instances[2]: the key 'Final Thought' is missing",
        "Instances[3]: conversations[2]: 'parameters' must be an object",
        "record 2 (line 76): lacks Instances; found 'Name', 'NLDocumentation'",
    ):
        assert reason in captured.err
    with pytest.raises(RecordError, match=r"Instances\[1\]: an action input is not JSON"):
        format_tool_alpaca.main(["--path", "train_data.json", "--on_bad_record", "error"])


def test_advertise_gen(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{"content": "类型#裙*颜色#红", "summary": "一条红裙。"}, {"content": "类型#裤", "text": "裤"}]
    Path("train.json").write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in lines), encoding="utf-8")
    with pytest.raises(RecordError, match=r"record 2 \(line 2\): lacks summary; found 'content', 'text'"):
        format_advertise_gen.main(["--path", "train.json"])
    format_advertise_gen.main(["--path", "train.json", "--on_bad_record", "skip"])
    written = Path("formatted_data/advertise_gen.jsonl").read_text(encoding="utf-8")
    assert written == '{"prompt": "类型#裙*颜色#红", "response": "一条红裙。"}\n'
    assert capsys.readouterr().out.splitlines()[:2] == ["err_count: 1", "train_examples: 1"]
