"""The checker that no reply should fool: what honest answers score in whatever words, and what each cheat scores."""

import functools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.csv_rows import CsvRows
from data_processing.template_reader import load_template
from finetune_chatmodel_demo.evaluation.facts import infer_kind, normalize
from finetune_chatmodel_demo.evaluation.judge import check_reply
from finetune_chatmodel_demo.evaluation.question_pool import QuestionPool, build_fact_table
from finetune_chatmodel_demo.evaluation.reading import read_chinese_number

ROOM = Path(__file__).resolve().parents[1] / "data_processing"
ROWS = list(CsvRows(ROOM / "data.csv"))
TYPES = [
    "一般",
    "格斗",
    "飞行",
    "毒",
    "地面",
    "岩石",
    "虫",
    "幽灵",
    "钢",
    "火",
    "水",
    "草",
    "电",
    "超能力",
    "冰",
    "龙",
    "恶",
    "妖精",
]


@functools.cache
def read_kanto():
    return build_fact_table(load_template(ROOM / "templates" / "pokemon_kanto.yaml"), ROWS)


@pytest.fixture(scope="module")
def kanto():
    return read_kanto()


@pytest.fixture(scope="module")
def national():
    return build_fact_table(load_template(ROOM / "templates" / "pokemon.yaml"), ROWS)


def outcome(table, column, reply, subject="妙蛙种子", **options):
    return check_reply(table, column=column, subject=subject, reply=reply, **options).outcome


# ---------------------------------------------------------------- right, in whatever words


@pytest.mark.parametrize(
    ("column", "reply"),
    [
        ("属性", "妙蛙种子的属性是草、毒。"),
        ("属性", "毒、草"),
        ("属性", "它是草系和毒系的宝可梦。"),
        ("属性", "草属性和毒属性"),
        ("属性", "草/毒"),
        ("属性", "草毒双属性。"),
        ("属性", "妙蛙种子不是火属性，而是草、毒属性。"),
        ("属性", "您想问属性吗？是草、毒。"),
        ("属性", "一般来说，妙蛙种子是草、毒属性的。"),
        ("属性", "Bulbasaur的属性是草、毒。"),
        ("弱点", "妙蛙种子的弱点是冰、超能力、火、飞行。"),
        ("弱点", "它怕飞行、火、超能和冰。"),
        ("弱点", "用飞行、火、超能力或者冰属性的招式打它。"),
        ("分类", "妙蛙种子是种子宝可梦。"),
        ("分类", "它的分类是种子。"),
        ("英文名", "它的英文名是 BULBASAUR"),
        ("颜色", "妙蛙种子是绿色的。"),
        ("身高", "妙蛙种子的身高是0.7米。"),
        ("身高", "0.70 m"),
        ("身高", "大约70厘米。"),
        ("身高", "零点七米"),
        ("身高", "零点七"),
        ("颜色", "绿"),
        ("属性", "草、毒。还有别的问题吗？"),
        ("弱点", "飞行、火、超能力、冰等属性。"),
        ("特征", "妙蛙种子的特性是茂盛和它的隐藏特性。"),
        ("身高", "０．７米"),
        ("身高", "0.7"),
        ("身高", "妙蛙种子是草、毒属性的，身高0.7米。"),
        ("进化自", "妙蛙种子没有进化前的形态。"),
        ("进化自", "它不是由别的宝可梦进化来的。"),
        ("进化自", "没有。"),
    ],
)
def test_right_values_in_other_words_are_exact(kanto, column, reply):
    assert outcome(kanto, column, reply) == "exact"


def test_every_wording_of_the_templates_is_exact_and_another_subjects_is_not():
    """All answers that training shows count, for a sample of rows; the answer about somebody else never does."""
    for name, sample in (("pokemon_kanto.yaml", 2), ("pokemon.yaml", 23)):
        template = load_template(ROOM / "templates" / name)
        table = build_fact_table(template, ROWS)
        pool = QuestionPool(template, table, ROWS, 0)
        asks = pool.askable[::sample]
        assert len(asks) > 500
        for ask, other in zip(asks, asks[1:] + asks[:1]):
            for wording in pool.wordings(ask.question, ask.row):
                assert outcome(table, ask.question.column, wording, ask.subject) == "exact", wording
            named = [w for w in pool.wordings(ask.question, ask.row) if ask.subject in w]
            if named and other.subject != ask.subject:
                column = ask.question.column
                verdict = check_reply(table, column=column, subject=other.subject, reply=named[0])
                assert verdict.outcome != "exact" or column == "进化等级", (other.subject, verdict)


# ---------------------------------------------------------------- cheats: what each scores


@pytest.mark.parametrize(
    ("column", "reply", "expected"),
    [
        # lists everything: two of eighteen are right
        ("属性", "、".join(TYPES), "wrong"),
        ("弱点", "妙蛙种子的弱点是" + "、".join(TYPES) + "。", "wrong"),
        # copies the question, or asks back
        ("属性", "妙蛙种子是什么属性？", "missing"),
        ("属性", "请告诉我妙蛙种子的属性", "wrong"),
        ("属性", "是草、毒吗？", "missing"),
        # the right answer about somebody else, or about several
        ("属性", "妙蛙草的属性是草、毒。", "wrong"),
        ("属性", "小火龙的属性是火。妙蛙种子的属性是草、毒。", "wrong"),
        ("属性", "Ivysaur的属性是草、毒。", "wrong"),
        # the right value and a wrong one
        ("颜色", "绿色或者红色", "wrong"),
        ("英文名", "Bulbasaur、Ivysaur", "wrong"),
        ("身高", "0.7米或1.0米", "wrong"),
        ("身高", "0.6～0.8米", "wrong"),
        ("分类", "种子宝可梦、蜥蜴宝可梦", "wrong"),
        ("属性", "草、毒。不对，是火。", "partial"),
        ("颜色", "绿色或红", "wrong"),
        # a second value that nobody in the table has
        ("英文名", "Bulbasaur或者Foosaur", "wrong"),
        ("颜色", "绿色、彩虹色", "wrong"),
        ("属性", "草、毒、光", "partial"),
        ("属性", "它的属性是光和草、毒", "partial"),
        ("身高", "0.7米或者零点八米", "wrong"),
        # negated
        ("属性", "妙蛙种子不是草、毒属性。", "wrong"),
        ("颜色", "妙蛙种子并不是绿色的。", "wrong"),
        ("颜色", "是绿色。不是绿色。", "wrong"),
        # the value as a piece of another
        ("身高", "10.7米", "wrong"),
        ("身高", "0.75米", "wrong"),
        ("身高", "0.7.1米", "wrong"),
        ("英文名", "Bulbasaurus", "wrong"),
        ("英文名", "MyBulbasaur", "wrong"),
        ("分类", "妙蛙种子是大种子宝可梦。", "wrong"),
        ("颜色", "墨绿色", "wrong"),
        ("属性", "草原、毒", "partial"),
        # another unit
        ("身高", "0.7厘米", "wrong"),
        ("身高", "0.7公斤", "wrong"),
        ("身高", "7米", "wrong"),
        ("身高", "70", "wrong"),
        # the fact asked for is right, another one in the same reply is false
        ("属性", "妙蛙种子的属性是草、毒，弱点是水。", "wrong"),
        ("属性", "妙蛙种子的属性是草、毒，身高是9.9米。", "wrong"),
        ("身高", "身高0.7米，弱点有草。", "wrong"),
        # no value, an unknown one, refusals
        ("属性", "", "missing"),
        ("属性", " 。", "missing"),
        ("属性", "我不知道。", "missing"),
        ("属性", "抱歉，资料里没有记载。", "missing"),
        ("属性", "光", "wrong"),
        ("属性", "没有。", "wrong"),
        ("身高", "很高。", "wrong"),
        # garbage
        ("属性", "草、毒。" + "啊" * 40, "wrong"),
        ("属性", "草、毒、" * 10, "wrong"),
        ("属性", "草、毒\ufffd\ufffd", "wrong"),
        ("属性", "草、毒<|user|>", "wrong"),
        # "none" where there is none, but not about this; and a value where there is none
        ("进化自", "妙蛙种子没有四倍弱点。", "wrong"),
        ("进化自", "妙蛙种子是由妙蛙草进化来的。", "wrong"),
        ("进化自", "我不知道它进化前的形态。", "missing"),
        ("进化自", "", "missing"),
    ],
)  # fmt: skip
def test_cheats(kanto, column, reply, expected):
    assert outcome(kanto, column, reply) == expected


def test_a_reply_that_only_the_limit_ended_is_wrong(kanto):
    assert outcome(kanto, "属性", "妙蛙种子的属性是草、毒。", ended=True) == "exact"
    assert outcome(kanto, "属性", "妙蛙种子的属性是草、毒。", ended=False) == "wrong"


def test_one_answer_to_everything_scores_what_its_value_is_worth(kanto):
    """The same reply about all 151: right only where it happens to be true, and never where it names somebody."""
    for column, reply in (("属性", "水"), ("颜色", "褐色"), ("弱点", "草、电"), ("身高", "1.0米")):
        truths = [set(kanto.items(subject, column)) for subject in kanto.cells]
        value = {normalize(item).removesuffix("米") for item in reply.split("、")}
        value = {"1"} if column == "身高" else value
        right = sum(truth == value for truth in truths)
        assert sum(outcome(kanto, column, reply, subject) == "exact" for subject in kanto.cells) == right
        assert 0 < right < 50
        named = f"妙蛙种子的{column}是{reply}。"
        assert sum(outcome(kanto, column, named, subject) == "exact" for subject in kanto.cells) == 0


def test_listing_everything_scores_nothing_in_any_column(national):
    """All values of a column in one reply: exact for nobody."""
    subjects = list(national.cells)[::150]
    for column, field in national.fields.items():
        if field.kind in ("list", "text"):
            reply = "、".join(sorted(field.vocabulary))
        elif field.kind == "number":
            reply = "、".join(f"{n}{field.unit}" for n in range(1, 300))
        else:
            reply = "是，不是。"
        found = {outcome(national, column, reply, subject) for subject in subjects}
        assert "exact" not in found, column


def test_overlap_is_the_jaccard_share(kanto):
    verdict = check_reply(kanto, column="弱点", subject="妙蛙种子", reply="飞行、火、水")
    assert (verdict.outcome, verdict.overlap) == ("partial", 2 / 5)
    assert verdict.stated == ("水", "火", "飞行")
    assert set(verdict.expected) == {"飞行", "火", "超能力", "冰"}
    assert check_reply(kanto, column="弱点", subject="妙蛙种子", reply="飞行、火").overlap == 0.5
    listing = check_reply(kanto, column="弱点", subject="妙蛙种子", reply="、".join(TYPES))
    assert (listing.outcome, round(listing.overlap, 3)) == ("wrong", round(4 / 18, 3))


def test_reasons_say_what_is_wrong(kanto):
    reasons = {
        "妙蛙草的属性是草、毒。": "speaks about 妙蛙草",
        "草、毒，身高是9.9米。": "false about 身高",
        "不是草、毒。": "denies it",
        "火": "another value",
        "草": "incomplete",
        "草、毒、火": "too much",
    }
    for reply, reason in reasons.items():
        assert check_reply(kanto, column="属性", subject="妙蛙种子", reply=reply).reason == reason
    assert check_reply(kanto, column="身高", subject="妙蛙种子", reply="0.7公斤").reason == "a number of another unit"


# ---------------------------------------------------------------- what the table cannot answer


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("资料里没有记载它的生日。", "exact"),
        ("抱歉，我不知道。", "exact"),
        ("图鉴里查不到。", "exact"),
        ("资料里没有记载它的生日，应该是5月1日。", "wrong"),
        ("我不知道，可能是红色。", "wrong"),
        ("妙蛙种子没有进化前的形态。", "wrong"),
        ("妙蛙种子的属性是草、毒。", "wrong"),
        ("谢谢你的提问。", "wrong"),
        ("2月27日", "wrong"),
        ("抱歉，它的生日是十月十日。", "wrong"),
        ("抱歉，它的主人叫小明。", "wrong"),
        ("我不太确定，应该是春天。", "wrong"),
        ("我只是宝可梦助手，不知道它的生日是哪一天。", "exact"),
        ("对不起，资料里没有它的生日。", "exact"),
        ("", "missing"),
        ("你为什么想知道呢？", "missing"),
    ],
)
def test_unanswerable_questions_want_an_admission_and_no_value(kanto, reply, expected):
    assert outcome(kanto, None, reply, question="它的生日是哪一天？") == expected


def test_an_unknown_subject_may_be_named_as_the_question_named_it(kanto):
    question = "皮卡草的身高是多少？"
    assert outcome(kanto, "身高", "资料里没有叫皮卡草的宝可梦。", subject=None, question=question) == "exact"
    assert outcome(kanto, "身高", "皮卡草的身高是0.4米。", subject=None, question=question) == "wrong"


# ---------------------------------------------------------------- yes and no, other columns


@pytest.mark.parametrize(
    ("subject", "reply", "expected"),
    [
        ("超梦", "是的，超梦是传说的宝可梦。", "exact"),
        ("超梦", "是", "exact"),
        ("超梦", "不是，超梦不是传说的宝可梦。", "wrong"),
        ("妙蛙种子", "不是的，它不在传说的宝可梦之列。", "exact"),
        ("梦幻", "梦幻是幻之宝可梦，不算传说的宝可梦。", "exact"),
        ("梦幻", "是的，梦幻是幻之宝可梦。", "wrong"),
        ("妙蛙种子", "是的，不是。", "wrong"),
        ("妙蛙种子", "我不清楚。", "missing"),
    ],
)
def test_yes_and_no(national, subject, reply, expected):
    assert outcome(national, "传说", reply, subject) == expected


@pytest.mark.parametrize(
    ("subject", "column", "reply"),
    [
        ("皮卡丘", "属性", "皮卡丘是一种电属性的宝可梦。它的特性是静电，隐藏特性是避雷针。"),
        ("妙蛙种子", "弱点", "根据资料，妙蛙种子的弱点包括：火、冰、飞行和超能力属性的攻击。"),
        ("妙蛙种子", "身高", "妙蛙种子的身高约为0.7米，体重约6.9千克。"),
        ("妙蛙种子", "属性", "妙蛙种子是草系和毒系双属性宝可梦，属于第一世代。"),
        ("妙蛙种子", "世代", "它是第一世代登场的宝可梦。"),
        ("妙蛙种子", "特征", "普通特性是茂盛，隐藏特性是叶绿素。"),
        ("妙蛙种子", "编号", "No.1"),
        ("妙蛙种子", "编号", "它在全国图鉴中排第1位。"),
        ("妙蛙种子", "编号", "0001"),
        ("妙蛙种子", "进化自", "妙蛙种子不会由其他宝可梦进化而来。"),
        ("妙蛙草", "进化等级", "妙蛙种子升到16级时会进化成妙蛙草。"),
        ("妙蛙种子", "蛋群", "它属于怪兽群和植物群。"),
    ],
)
def test_chatty_replies_are_understood(national, subject, column, reply):
    assert outcome(national, column, reply, subject) == "exact"


def test_none_may_be_said_in_the_words_of_the_question(national):
    reply, question = "没有任何属性对它完全无效。", "哪种属性对妙蛙种子无效？"
    assert outcome(national, "免疫", reply, question=question) == "exact"
    assert outcome(national, "免疫", "它没有四倍弱点。", question=question) == "wrong"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("妙蛙种子", "exact"),
        ("妙蛙草是妙蛙种子的进化形态。", "exact"),
        ("妙蛙草由妙蛙种子进化而来。", "exact"),
        ("妙蛙种子不是由别的宝可梦进化来的。", "wrong"),
        ("妙蛙种子没有进化前的形态。", "wrong"),
        ("妙蛙种子的属性是草、毒。", "wrong"),
        ("妙蛙种子是种子宝可梦。", "wrong"),
        ("妙蛙草是由妙蛙草进化来的。", "wrong"),
        ("妙蛙草是由妙蛙花进化来的。", "wrong"),
    ],
)
def test_a_name_is_a_value_only_where_it_is_the_answer(kanto, reply, expected):
    """妙蛙草由谁进化来？ A sentence about 妙蛙种子 is no answer, although it has the right name in it."""
    assert outcome(kanto, "进化自", reply, "妙蛙草") == expected


@pytest.mark.parametrize(
    ("subject", "column", "reply", "expected"),
    [
        # What is true but unasked, and has no heading that says what it is, counts as a value too many.
        ("妙蛙种子", "弱点", "作为草系和毒系宝可梦，妙蛙种子害怕火系、冰系、飞行系和超能力系的招式。", "partial"),
        ("妙蛙种子", "弱点", "妙蛙种子是草、毒属性的宝可梦，因此它的弱点是飞行、火、超能力和冰。", "partial"),
        # What the table cannot confirm is not given the benefit of the doubt.
        ("妙蛙草", "进化自", "妙蛙草是妙蛙种子进化而来的，之后还能进化成妙蛙花。", "wrong"),
        ("妙蛙种子", "捕获率", "捕获率是45（约5.9%）。", "wrong"),
        ("妙蛙种子", "颜色", "绿色的，带一点蓝色。", "wrong"),
    ],
)
def test_where_the_checker_is_stricter_than_a_reader(national, subject, column, reply, expected):
    assert outcome(national, column, reply, subject) == expected


def test_labels_keep_numbers_apart(national):
    stats = "妙蛙种子的HP是45，攻击是49，防御是49，特攻是65，特防是65，速度是45。"
    for column in ("HP", "攻击", "特攻", "速度"):
        assert outcome(national, column, stats) == "exact"
    assert outcome(national, "攻击", stats.replace("攻击是49", "攻击是65")) == "wrong"
    assert outcome(national, "攻击", stats.replace("速度是45", "速度是46")) == "wrong"
    assert outcome(national, "体重", "妙蛙种子高0.7米，重6.9公斤。") == "exact"
    assert outcome(national, "体重", "妙蛙种子高0.7米，重16.9公斤。") == "wrong"
    assert outcome(national, "体重", "妙蛙种子高1.7米，重6.9公斤。") == "wrong"
    assert outcome(national, "体重", "13.8斤") == "exact"
    assert outcome(national, "世代", "它是第1世代的宝可梦。") == "exact"


# ---------------------------------------------------------------- fields and numbers


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "0", "1"], ("flag", "", "、")),
        (["是", "否"], ("flag", "", "、")),
        (["0.7", "1", "", "12.5"], ("number", "", "、")),
        (["0.7米", "1.2 米"], ("number", "米", "、")),
        (["0.7m", "3 kg"], ("text", "", "、")),
        (["草、毒", "火"], ("list", "", "、")),
        (["草/毒", "火"], ("list", "", "/")),
        (["红;绿", "蓝"], ("list", "", ";")),
        (["它住在森林里、河边，喜欢在夜里一个人走很远的路。", "火"], ("text", "", "、")),
        (["绿色", "红色"], ("text", "", "、")),
        ([], ("text", "", "、")),
    ],
)
def test_kinds_are_inferred_from_the_cells(cells, expected):
    assert infer_kind(cells) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("零点七", "0.7"),
        ("十", "10"),
        ("十二", "12"),
        ("二十", "20"),
        ("一百零五", "105"),
        ("三千二百", "3200"),
        ("两万", "20000"),
        ("一点二五", "1.25"),
    ],
)
def test_chinese_numbers(text, number):
    assert str(read_chinese_number(text).normalize().__format__("f")) == number


@settings(max_examples=200, deadline=None)
@given(
    st.decimals(min_value=0, max_value=1000, places=1),
    st.sampled_from(["身高是{}米。", "{}m", "它有{}米高", "约{} 米"]),
)
def test_only_the_true_height_is_exact(number, wording):
    table = read_kanto()
    verdict = check_reply(table, column="身高", subject="妙蛙种子", reply=wording.format(number))
    assert (verdict.outcome == "exact") == (float(number) == 0.7)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(TYPES), min_size=1), st.sampled_from(["、", "和", "/", "，", " "]))
def test_lists_are_compared_as_sets(chosen, separator):
    table = read_kanto()
    reply = "妙蛙种子的弱点是" + separator.join(sorted(chosen)) + "。"
    truth = {"飞行", "火", "超能力", "冰"}
    verdict = check_reply(table, column="弱点", subject="妙蛙种子", reply=reply)
    assert (verdict.outcome == "exact") == (chosen == truth)
    assert verdict.overlap == pytest.approx(len(chosen & truth) / len(chosen | truth))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_judged(text):
    table = read_kanto()
    for column in (*table.fields, None):
        verdict = check_reply(table, column=column, subject="妙蛙种子", reply=text)
        assert verdict.outcome in ("exact", "partial", "wrong", "missing")
        if column not in ("进化自", None) and verdict.outcome == "exact":
            assert re.search(r"\w", text)
