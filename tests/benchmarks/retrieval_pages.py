"""Pages on Pokémon with six sections each, pages on other things, and questions whose passages are known.

Only the title names a page's subject, as in real manuals. Questions share words with the passage (`same_words`), name
the Pokémon and paraphrase what is asked (`paraphrased`), or are about something that no page has (`unanswerable`).
"""

import csv
import random
from pathlib import Path

from finetune_chatmodel_demo.retrieval.measuring import LabelledQuestion

CSV = Path(__file__).resolve().parents[2] / "data_processing" / "data.csv"
# Section → its sentence (a cell that is empty reads 无), questions in its words, questions in others.
SECTIONS: dict[str, tuple[str, list[str], list[str]]] = {
    "概况": (
        "分类为{分类}，全国图鉴编号为{编号}，英文名写作{英文名}，在{世代}登场。身体呈{颜色}，蛋群是{蛋群}。",
        ["{姓名}的编号是多少？", "{姓名}的分类是什么？", "{姓名}的蛋群是哪些？"],
        ["{姓名}外表是什么颜色？", "{姓名}用英语怎么说？", "{姓名}第几代才有？"],
    ),
    "属性与弱点": (
        "属性为{属性}。弱点是{弱点}，四倍弱点是{四倍弱点}。它能抵抗{抵抗}，免疫{免疫}。",
        ["{姓名}的属性是什么？", "{姓名}有哪些弱点？", "{姓名}能抵抗什么？"],
        ["{姓名}怕什么？", "用哪一系打{姓名}最疼？", "{姓名}不吃哪些招？"],
    ),
    "体型": (
        "身高{身高}米，体重{体重}千克，捕获率为{捕获率}。",
        ["{姓名}的身高是多少？", "{姓名}的体重是多少千克？", "{姓名}的捕获率是多少？"],
        ["{姓名}有多高？", "{姓名}有多少公斤？", "{姓名}好抓吗？"],
    ),
    "特性": (
        "普通特性是{特征}，隐藏特性是{隐藏特性}。",
        ["{姓名}的普通特性是什么？", "{姓名}的隐藏特性是什么？"],
        ["{姓名}天生有什么本领？", "{姓名}的梦特是哪个？"],
    ),
    "种族值": (
        "HP {HP}，攻击{攻击}，防御{防御}，特攻{特攻}，特防{特防}，速度{速度}。",
        ["{姓名}的速度种族值是多少？", "{姓名}的攻击是多少？"],
        ["{姓名}跑得快不快？", "{姓名}血量厚吗？"],
    ),
    "进化": (
        "它由{进化自}进化而来，所需等级为{进化等级}。",
        ["{姓名}由谁进化而来？", "{姓名}进化的等级是多少？"],
        ["{姓名}小时候是什么？", "{姓名}是从哪一只变来的？"],
    ),
}
OTHER_THINGS = ["雨伞", "水壶", "台灯", "自行车", "键盘", "沙发", "相机", "耳机", "冰箱", "吉他", "帐篷", "背包"]
OTHER_SENTENCES = [
    "本{物}自购买之日起保修{数}个月，人为损坏除外。",
    "{物}的标价为{数}元，会员按九折结算。",
    "清洁{物}时请用软布，不要使用酒精，每{数}天一次即可。",
    "仓库里还有{数}件{物}，下周补货。",
]
UNANSWERABLE = [
    "巴黎铁塔有多高？",
    "明天会下雪吗？",
    "番茄炒蛋怎么做？",
    "西游记的作者是谁？",
    "亚古兽的弱点是什么？",
    "加布兽的身高是多少？",
    "孙悟空的体重是多少？",
    "机器猫的隐藏特性是什么？",
    "怎样学会游泳？",
    "黄金现在什么价？",
    "长江有多长？",
    "感冒了吃什么药？",
    "什么是相对论？",
    "上一届奥运会在哪里举行？",
    "蝙蝠侠由谁进化而来？",
    "巴达兽的属性是什么？",
    "名侦探柯南的速度是多少？",
    "月亮上有人吗？",
    "一英里等于多少公里？",
    "去拉萨的火车几点开？",
    "手机怎么录屏？",
    "库洛米的编号是多少？",
    "派大星是什么颜色？",
    "木星有几颗卫星？",
    "电动车充一次电能跑多远？",
    "什么叫存款准备金？",
    "向日葵是谁画的？",
    "路飞的攻击是多少？",
    "圆的面积怎么算？",
    "比丘兽进化的等级是多少？",
]


def read_rows(limit: int | None = None) -> list[dict[str, str]]:
    """Rows of data.csv; empty cells read 无."""
    with CSV.open(encoding="utf-8-sig", newline="") as file:
        rows = [{key: value or "无" for key, value in row.items()} for row in csv.DictReader(file)]
    return rows[:limit]


def write_pages(folder: Path, rows: list[dict[str, str]], others: int, seed: int = 0) -> None:
    """Writes a Markdown page for each row, and `others` pages of four sentences on other things."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        parts = [f"# {name}\n\n{sentence.format(**row)}\n" for name, (sentence, _, _) in SECTIONS.items()]
        (folder / f"{row['姓名'].replace('/', '_')}.md").write_text("\n".join(parts), encoding="utf-8")
    draw = random.Random(seed)
    for number in range(others):
        thing = f"{draw.choice(OTHER_THINGS)}{number}型"
        parts = [
            f"# 第{place}条\n\n{sentence.format(物=thing, 数=draw.randint(2, 999))}\n"
            for place, sentence in enumerate(OTHER_SENTENCES, 1)
        ]
        (folder / f"手册{number}.md").write_text("\n".join(parts), encoding="utf-8")


def ask(kind: str, rows: list[dict[str, str]], count: int, seed: int = 1) -> list[LabelledQuestion]:
    """Questions of a kind, drawn from all rows and sections."""
    if kind == "unanswerable":
        return [LabelledQuestion(question) for question in UNANSWERABLE]
    draw = random.Random(seed)
    questions = []
    for _ in range(count):
        row, (sentence, same, other) = draw.choice(rows), draw.choice(list(SECTIONS.values()))
        wording = draw.choice(same if kind == "same_words" else other)
        file = f"/{row['姓名'].replace('/', '_')}.md"
        questions.append(LabelledQuestion(wording.format(**row), file, sentence.format(**row)))
    return questions
