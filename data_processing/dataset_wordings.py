"""The wordings of the data sets that `make_datasets.py` generates beside the conversations of pokemon_kanto.yaml.

`{姓名}` and the like are columns of data.csv. No sentence of the documents stands in the corpus of
`THUDM/chatglm3-tiny`, so that training on them has something to teach.
"""

# Documents for pre-training: an opening, one sentence of each column in changing order, an end.
DOCUMENT_OPENINGS = (
    "《关都野外手册》里有一页专门写{姓名}。",
    "训练家的笔记本翻到了{姓名}这一页。",
    "这一章的主角叫作{姓名}。",
)
DOCUMENT_SENTENCES = {
    "英文名": ("海外的训练家把它记作{英文名}。", "在外文版手册中，它的条目写成{英文名}。"),
    "分类": ("研究者将它列入{分类}。", "学者按照习性给它的名号是{分类}。"),
    "属性": ("它凭借{属性}的力量立足。", "它体内流动着{属性}的能量。"),
    "颜色": ("从远处望去，{颜色}是它最显眼的标志。", "它的体表以{颜色}为主。"),
    "身高": ("成年个体的身长约为{身高}米。", "若让它站直，尺子会停在{身高}米的刻度。"),
    "弱点": ("遇到{弱点}的攻势，它往往会吃亏。", "{弱点}的招式能让它很快败下阵来。"),
    "特征": ("战斗中，它常常展现{特征}。", "它与生俱来的本事名为{特征}。"),
    "进化自": ("它由{进化自}成长而来。", "它还小的时候，大家叫它{进化自}。"),
}
DOCUMENT_MISSING = {"进化自": ("它没有更早的形态。", "它一出生就是现在的模样。")}
DOCUMENT_ENDINGS = ("关于{姓名}的记录到此结束。", "{姓名}的这一页就写到这里。")

# Tool calls. The argument is called query: as 宝可梦= the tiny model had not learned the name after 300 steps, as
# query= it has after 120. The tool answers with all of its attributes: name → the column that holds it, and the unit.
TOOL = {"name": "pokedex", "description": "图鉴", "parameters": {"query": "宝可梦的名字"}}
TOOL_ATTRIBUTES = {"属性": ("属性", ""), "特性": ("特征", ""), "身高": ("身高", "米"), "体重": ("体重", "公斤")}
TOOL_QUESTIONS = {
    "train": (
        "请用图鉴查一下{name}的{attribute}。",
        "{name}的{attribute}是什么？请查图鉴。",
        "帮我查{name}的{attribute}。",
        "图鉴里{name}的{attribute}写着什么？",
    ),
    "validation": ("我想知道{name}的{attribute}，请查图鉴。", "查一查{name}的{attribute}。"),
}
TOOL_ANSWER = "{name}的{attribute}是{value}。"
