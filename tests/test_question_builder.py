"""Questions out of a CSV and a template: answers are cells, wordings are trained or unseen as said, orders are new."""

import copy
import json
from collections import Counter
from pathlib import Path

import pytest

from data_processing import data_processing, question_builder
from data_processing.csv_rows import CsvRows
from data_processing.holding_out import is_held_out
from data_processing.template import normal_form
from data_processing.template_reader import load_template
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.evaluation.judge import check_reply
from finetune_chatmodel_demo.evaluation.question_building import BuildOptions, build_questions, read_and_build
from finetune_chatmodel_demo.evaluation.question_pool import build_fact_table
from finetune_chatmodel_demo.evaluation.questions import (
    GROUPS,
    HELD_OUT_TRAINED,
    HELD_OUT_UNSEEN,
    MULTI_TURN,
    TRAINED,
    UNANSWERABLE,
    UNSEEN,
    check_training_file,
    read_question_file,
    write_questions,
)

ROOM = Path(__file__).resolve().parents[1] / "data_processing"
DATA, KANTO = ROOM / "data.csv", ROOM / "templates" / "pokemon_kanto.yaml"
SHARE = 0.2


@pytest.fixture(scope="module")
def rows():
    return {row["姓名"]: row for row in CsvRows(DATA)}


@pytest.fixture(scope="module")
def kanto():
    return read_and_build(DATA, KANTO, BuildOptions(count=120, seed=3, hold_out=SHARE))


def turns_of(questions, group):
    found = [turn for turn in questions.turns if turn.group == group]
    assert found
    return found


# ---------------------------------------------------------------- what is asked


def test_every_group_has_its_questions_and_every_reference_is_the_cell(kanto, rows):
    counts = Counter(turn.group for turn in kanto.turns)
    assert set(counts) == set(GROUPS)
    assert all(counts[group] == 120 for group in (TRAINED, UNSEEN, HELD_OUT_TRAINED, HELD_OUT_UNSEEN))
    assert 120 <= counts[MULTI_TURN] <= 126
    assert counts[UNANSWERABLE] >= 20
    for turn in kanto.turns:
        if turn.is_answerable:
            cell = rows[turn.subject][turn.column]
            assert cell in turn.reference or (not cell and "没有" in turn.reference)
            reply = check_reply(kanto.table, column=turn.column, subject=turn.subject, reply=turn.reference)
            assert reply.outcome == "exact"


def test_columns_are_asked_equally_often_and_no_pair_twice(kanto):
    for group in (TRAINED, UNSEEN, HELD_OUT_TRAINED):
        turns = turns_of(kanto, group)
        assert set(Counter(turn.column for turn in turns).values()) == {15}
        assert len({(turn.subject, turn.column) for turn in turns}) == len(turns)


def test_wordings_are_trained_or_unseen_as_the_group_says(kanto):
    """Each question is a wording of its split with the name filled in, and of no other."""
    template = load_template(KANTO)
    pools = {
        split: {
            phrase.text.replace("{它}", "{}") for question in template.questions for phrase in question.phrasings[split]
        }
        for split in ("train", "validation")
    }
    for group, split in ((TRAINED, "train"), (UNSEEN, "validation"), (HELD_OUT_UNSEEN, "validation")):
        for turn in turns_of(kanto, group):
            assert turn.text.replace(turn.subject, "{}") in pools[split], turn.text


def test_a_question_never_contains_its_answer(kanto):
    for turn in kanto.turns:
        if turn.is_answerable:
            copied = turn.text.rstrip("？。")
            verdict = check_reply(kanto.table, column=turn.column, subject=turn.subject, reply=copied)
            assert verdict.outcome in ("wrong", "missing") and verdict.overlap == 0, turn.text


def test_held_out_subjects_are_asked_about_in_their_groups_alone(kanto):
    held_out = set(kanto.notes["held_out"])
    assert held_out == {name for name in kanto.table.cells if is_held_out(name, SHARE)}
    assert 20 < len(held_out) < 45
    for turn in kanto.turns:
        if turn.subject:
            assert (turn.subject in held_out) == turn.group.startswith("held out"), turn


def test_the_same_rows_are_held_out_of_the_training_data(kanto, tmp_path):
    for split in ("", "_validation"):
        assert not (tmp_path / f"out{split}.json").exists()
    data_processing.main(["--template", str(KANTO), "--output", str(tmp_path / "out.json"), "--hold_out", str(SHARE)])
    held_out = set(kanto.notes["held_out"])
    records = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert len(records) == 4 * (151 - len(held_out))
    overlaps = check_training_file(kanto, tmp_path / "out.json")
    assert {group: overlap.found for group, overlap in overlaps.items() if overlap.found} == {
        TRAINED: overlaps[TRAINED].found
    }
    assert (overlaps[UNSEEN].asked, overlaps[UNSEEN].found) == (120, 0)


def test_a_training_file_with_held_out_subjects_is_refused(kanto, tmp_path):
    data_processing.main(["--template", str(KANTO), "--output", str(tmp_path / "all.json")])
    with pytest.raises(UserError, match=r"all\.json: \d+ conversations are about subjects that are said to be"):
        check_training_file(kanto, tmp_path / "all.json")


def test_a_training_file_with_unseen_wordings_is_refused(kanto, tmp_path):
    turn = turns_of(kanto, UNSEEN)[0]
    talk = [{"role": "user", "content": turn.text}, {"role": "assistant", "content": turn.reference}]
    path = tmp_path / "leak.jsonl"
    path.write_text(json.dumps({"conversations": talk}, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(UserError, match="1 questions of the group 'unseen phrasings' are trained on to the letter"):
        check_training_file(kanto, path)


# ---------------------------------------------------------------- orders that training does not have


def test_conversations_have_an_order_that_training_does_not(kanto):
    """Longer than any training conversation, about two subjects, or with a question that has no answer."""
    most = load_template(KANTO).turns[1]
    kinds = Counter()
    for dialogue in kanto.dialogues:
        if not any(turn.group in (MULTI_TURN, UNANSWERABLE) for turn in dialogue.turns):
            continue
        subjects = {turn.subject for turn in dialogue.turns if turn.subject}
        is_new = (
            len(dialogue.turns) > most or len(subjects) > 1 or any(not turn.is_answerable for turn in dialogue.turns)
        )
        assert is_new, dialogue
        kinds.update(turn.kind for turn in dialogue.turns)
    assert set(kinds) == {
        "opening",
        "pronoun",
        "second subject",
        "pronoun after the change",
        "back to the first",
        "same question, second subject",
        "unknown column",
        "unknown subject",
        "after an unanswerable question",
    }


def test_pronouns_refer_back_to_the_subject_named_last(kanto):
    for dialogue in kanto.dialogues:
        named = None
        for turn in dialogue.turns:
            if "pronoun" in turn.kind or turn.kind == "unknown column":
                assert not any(name in turn.text for name in kanto.table.cells), turn.text
                assert turn.subject == named
            elif turn.subject and turn.subject in turn.text:
                named = turn.subject


def test_follow_ups_are_in_no_trained_wording(kanto):
    template = load_template(KANTO)
    trained = {
        normal_form(phrase, template.subject)
        for question in template.questions
        for phrase in question.phrasings["train"]
    }
    for turn in turns_of(kanto, MULTI_TURN):
        plain = turn.text.rstrip("？。")
        for way in ("这只宝可梦", "它", turn.subject):
            plain = plain.replace(way, "\0")
        assert plain not in trained, turn.text


def test_unanswerable_questions_are_about_nothing_in_the_table(kanto):
    for turn in turns_of(kanto, UNANSWERABLE):
        assert not turn.is_answerable
        verdict = check_reply(
            kanto.table, column=turn.column, subject=turn.subject, reply=turn.reference, question=turn.text
        )
        assert verdict.outcome == "exact"
        if turn.subject is None:
            assert not any(name in turn.text for name in kanto.table.cells), turn.text


def test_declared_unanswerable_questions_are_used(tmp_path, rows):
    text = KANTO.read_text(encoding="utf-8").replace("evaluation:", 'evaluation:\n  unanswerable: ["{它}喜欢吃什么？"]')
    path = tmp_path / "template.yaml"
    path.write_text(text, encoding="utf-8")
    questions = build_questions(load_template(path), list(rows.values()), BuildOptions(count=40))
    asked = {turn.text for turn in questions.turns if turn.kind == "unknown column"}
    assert asked and all(text.endswith("喜欢吃什么？") for text in asked)


# ---------------------------------------------------------------- reproducible, whole, for one's own CSV


def test_a_seed_decides_everything(rows):
    template = load_template(KANTO)
    first, again, other = (
        build_questions(template, list(rows.values()), BuildOptions(count=30, seed=seed)) for seed in (1, 1, 2)
    )
    assert first.dialogues == again.dialogues != other.dialogues


def test_a_question_file_keeps_everything(kanto, tmp_path):
    write_questions(kanto, tmp_path / "questions.json")
    read = read_question_file(tmp_path / "questions.json")
    assert read.dialogues == kanto.dialogues
    assert read.notes == kanto.notes
    assert read.table == kanto.table


def test_the_program_writes_one_and_says_what_it_took_columns_for(tmp_path, capsys):
    output = tmp_path / "made" / "questions.json"
    question_builder.main(
        ["--template", str(KANTO), "--output", str(output), "--questions", "8", "--show_fields", "--hold_out", "0.2"]
    )
    out = capsys.readouterr().out
    assert "身高: number, unit 米; called 身高" in out
    assert "弱点: list, separated by 、, 18 different items; called 弱点" in out
    assert "特征: list, separated by 、" in out and "called 特性、特征" in out
    assert "进化自: text" in out
    assert "held out: 38 subjects" in out
    assert len(read_question_file(output).turns) >= 40


OWN_CSV = """姓名,属性,弱点,特征,数据
皮卡丘,电,地面,尾巴像闪电,身高0.4米，体重6公斤
妙蛙种子,草、毒,飞行、火、超能力、冰,背上有种子,身高0.7米，体重6.9公斤
小火龙,火,地面、岩石、水,尾巴上有火焰,身高0.6米，体重8.5公斤
杰尼龟,水,草、电,,身高0.5米，体重9公斤
"""


def test_the_template_for_ones_own_csv(tmp_path):
    """Lists, free text and an empty cell of custom_columns.yaml; free text is compared clause by clause."""
    path = tmp_path / "mine.csv"
    path.write_text(OWN_CSV.replace(",身高", ',"身高').replace("公斤\n", '公斤"\n'), encoding="utf-8")
    questions = read_and_build(path, ROOM / "templates" / "custom_columns.yaml", BuildOptions(count=20))
    kinds = {column: field.kind for column, field in questions.table.fields.items()}
    assert kinds == {"属性": "list", "弱点": "list", "特征": "text", "数据": "list"}
    assert Counter(turn.group for turn in questions.turns)[TRAINED] == 15
    assert questions.notes["left_out"]["empty cells for which the template has no answer"] == 1

    def outcome(column, reply, subject="妙蛙种子"):
        return check_reply(questions.table, column=column, subject=subject, reply=reply).outcome

    assert outcome("数据", "妙蛙种子的数据如下：身高0.7米，体重6.9公斤") == "exact"
    assert outcome("数据", "体重6.9公斤，身高0.7米。") == "exact"
    assert outcome("数据", "妙蛙种子的数据如下：身高0.7米，体重8.5公斤") == "partial"
    assert outcome("数据", "身高0.4米，体重6公斤") == "wrong"
    assert outcome("特征", "它背上有种子。") == "exact"
    assert outcome("特征", "它尾巴上有火焰。") == "wrong"


def test_fields_can_be_declared(tmp_path):
    (tmp_path / "rows.csv").write_text("名,标签,分\n甲,红 绿,9\n乙,蓝,8\n丙,红,7\n", encoding="utf-8")
    (tmp_path / "t.yaml").write_text(
        """
turns: 1
evaluation:
  fields:
    标签: {kind: list, separator: " ", labels: [颜色标签], aliases: {朱: 红}}
    分: {unit: 分}
subject: {placeholder: 它, opening: "{名}", later: [它]}
questions:
  - {column: 标签, train: ["{它}的标签？"], answers: "{标签}"}
  - {column: 分, train: ["{它}几分？"], answers: "{分}分"}
""",
        encoding="utf-8",
    )
    questions = read_and_build(tmp_path / "rows.csv", tmp_path / "t.yaml", BuildOptions(count=6))
    field = questions.table.fields["标签"]
    assert (field.kind, field.separator, field.labels) == ("list", " ", ("颜色标签", "标签"))
    assert check_reply(questions.table, column="标签", subject="甲", reply="绿和朱").outcome == "exact"
    assert check_reply(questions.table, column="分", subject="甲", reply="9分").outcome == "exact"


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("fields: {姓名: {kind: text}}", "at evaluation.fields.姓名: no question has this column"),
        ("fields: {星座: {kind: text}}", "'星座' (in"),
        ("fields: {属性: {kind: nomber}}", "at evaluation.fields.属性.kind: expected number, list, text or flag"),
        ("fields: {属性: {kind: number}}", "column 属性 is declared a number, but a cell is not"),
        ("fields: {属性: {aliases: {光: 闪光}}}", "aliases of column 属性 stand for '闪光', which no cell holds"),
        ("fields: {属性: {labels: 系}}", "at evaluation.fields.属性.labels: expected a list of texts"),
        ("feilds: {}", "unknown key 'feilds'; did you mean 'fields'?"),
    ],
)
def test_mistakes_in_declarations_are_named(tmp_path, declared, message):
    text = KANTO.read_text(encoding="utf-8")
    start, end = text.index("evaluation:\n"), text.index("questions:\n")
    path = tmp_path / "template.yaml"
    path.write_text(f"{text[:start]}evaluation: {{{declared}}}\n{text[end:]}", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_and_build(DATA, path, BuildOptions(count=1))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(count=0), "the number of questions is 0"),
        (BuildOptions(hold_out=1.0), "expected a share from 0 to below 1"),
        (BuildOptions(groups=("seen",)), "unknown group of questions 'seen'; use trained phrasings"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(UserError, match=message):
        read_and_build(DATA, KANTO, options)


def test_files_that_are_no_question_files(tmp_path, kanto):
    path = tmp_path / "f.json"
    for text, message in (
        ("[]", "is no question file"),
        ("{", "is no question file"),
        ("[" * 3000, "is no question file"),
        ("1" * 5000, "is no question file"),
        ('{"format": "other"}', "expected a question file"),
        ('{"format": "chatglm3-questions-1", "facts": 1, "dialogues": [], "notes": {}}', "is no question file"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            read_question_file(path)
    with pytest.raises(FileNotFoundError, match=r"question_builder\.py"):
        read_question_file(tmp_path / "nowhere.json")
    write_questions(kanto, path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    subject = turns_of(kanto, TRAINED)[0].subject
    for change in (
        lambda data: data["facts"]["cells"].pop(subject),
        lambda data: data["facts"]["fields"].pop(),
        lambda data: data["dialogues"][0]["turns"][0].pop("text"),
        lambda data: data["dialogues"][0]["turns"][0].update(column="没有"),
        lambda data: data["dialogues"].clear(),
        lambda data: data["dialogues"][0]["turns"][0].update(reference=5),
        lambda data: data["facts"]["names"].update({subject: {}}),
        lambda data: data["facts"]["fields"][0].update(unit=None),
        lambda data: data["facts"]["fields"][0]["vocabulary"].append(1),
    ):
        damaged = copy.deepcopy(whole)
        change(damaged)
        path.write_text(json.dumps(damaged, ensure_ascii=False), encoding="utf-8")
        with pytest.raises(UserError, match=r"f\.json (is no question file|holds no question)"):
            read_question_file(path)


def test_rows_with_the_same_name_are_not_asked_about(rows):
    doubled = [*rows.values(), {**rows["皮卡丘"], "编号": "9999", "属性": "火"}]
    table = build_fact_table(load_template(KANTO), doubled)
    assert "皮卡丘" not in table.cells and "雷丘" in table.cells
