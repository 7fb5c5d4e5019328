"""How the text that `THUDM/chatglm3-tiny` is trained on asks for a column of the facts, and states it.

`{s}` is the subject (a name, 它, …), `{v}` the value, `{l}` one of the column's labels. None of these wordings stands
in the templates of `data_processing/templates` (`tests/test_tiny.py` checks it): the model knows the facts from other
forms, and learns the templates' form from P-Tuning alone.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """Wordings for one column of the facts.

    Attributes:
        labels: nouns for the column.
        kind: "number", "list" or "name"; decides which general questions fit.
        questions: questions for this column alone, with `{s}` and without a question mark.
        statements: sentences for this column alone, with `{s}` and `{v}` and without a full stop.
        unit: units that may follow the value (of equal meaning).
        missing: sentences for an empty value; none: an empty value is not mentioned.
    """

    labels: tuple[str, ...]
    kind: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    unit: tuple[str, ...] = ("",)
    missing: tuple[str, ...] = ()


def _column(labels: str, kind: str, questions: str, statements: str, unit: str = "", missing: str = "") -> Column:
    return Column(
        labels=tuple(labels.split()),
        kind=kind,
        questions=tuple(questions.split()),
        statements=tuple(statements.split()),
        unit=tuple(unit.split()) or ("",),
        missing=tuple(missing.split()),
    )


COLUMNS = {
    "属性": _column(
        labels="属性 属性组合 系别 属系",
        kind="list",
        questions="""
            {s}是哪一系的 {s}是哪个系的宝可梦 {s}带有哪些属性 {s}归哪一系 {s}身上带着哪几种属性
            {s}会被当成哪一系 {s}在十八种属性里占了哪几种 {s}天生是哪一系 {s}属于哪个系
            {s}看起来属于哪种系别 用一句话讲{s}是哪一系
            """,
        statements="{s}带有{v}属性 {s}算{v}系 {s}归{v}系 {s}的系别写着{v} {s}身上带着{v}属性",
    ),
    "弱点": _column(
        labels="弱点 弱点属性 薄弱之处 短板 天敌属性",
        kind="list",
        questions="""
            {s}怕哪几种属性 哪些属性能克制{s} 打{s}该用哪些属性 {s}被哪些属性克制 对付{s}派谁上场好
            {s}见了哪些属性要小心 哪些招式对{s}特别有用 {s}最怕什么 怎样才能打败{s}
            {s}挨哪些属性的打最疼 哪些属性让{s}害怕 什么招式打{s}效果最好 {s}会害怕哪几种招式
            最让{s}害怕的是哪些属性 {s}害怕的属性有哪几种 {s}害怕什么样的对手 什么会让{s}害怕
            """,
        statements="{s}怕{v} {s}被{v}克制 打{s}该用{v} {v}的招式对{s}特别有用 能克制{s}的有{v} {s}见了{v}要小心",
    ),
    "特征": _column(
        labels="特性 特征 普通特性 特性名称",
        kind="list",
        questions="""
            {s}的特性叫什么 {s}靠什么特性战斗 {s}天生带着哪些特性 {s}平时的特性是哪个
            {s}可能带着哪些特征 {s}身上能找到哪些特性 {s}凭什么本领战斗 {s}上场时会用哪个特性
            {s}拥有的特性叫什么 {s}会用到哪种特性 {s}拥有哪些本领
            """,
        statements="{s}带着{v}特性 {s}的特性叫{v} {s}天生带着{v} {s}靠{v}战斗 {s}平时的特性写着{v}",
    ),
    "分类": _column(
        labels="分类 类别 种类 图鉴分类 所属类别",
        kind="name",
        questions="""
            {s}归在哪一类 {s}算哪类宝可梦 图鉴把{s}归为哪种宝可梦 {s}被叫做什么宝可梦 {s}被划到哪个类别
            {s}算是什么样的宝可梦 图鉴管{s}叫什么宝可梦 图鉴里把{s}分成了哪一类 {s}属于什么类别
            {s}主要被分在哪一类
            """,
        statements="{s}归在{v}这一类 {s}被划为{v} 图鉴把{s}归为{v} {s}算是{v} 人们把{s}叫做{v}",
    ),
    "英文名": _column(
        labels="英文名 英文名字 英文名称 英语名 外文名",
        kind="name",
        questions="""
            {s}在英语里叫什么 怎么用英语称呼{s} {s}的英语怎么念 外国人管{s}叫什么 {s}翻译成英文是哪个词
            英文版里{s}写作什么 {s}拿英文怎么写
            """,
        statements="{s}翻译成英文就是{v} {s}在英语里叫{v} 英语里把{s}写作{v} {s}又写作{v} 外国人管{s}叫{v}",
    ),
    "颜色": _column(
        labels="颜色 身体颜色 体色 外表颜色",
        kind="name",
        questions="""
            {s}看上去是什么色 {s}浑身什么颜色 {s}身上是哪个颜色 {s}长着什么颜色的身体
            画{s}该用什么颜色的笔 {s}的外表是什么色 远远看去{s}是什么色 {s}看起来主要是什么色
            {s}的样子是哪种颜色
            """,
        statements="{s}看上去是{v}的 {s}浑身{v} {s}长着{v}的身体 画{s}该用{v} {s}的外表呈{v}",
    ),
    "进化自": _column(
        labels="进化前 上一阶段 进化来源 前身 进化前的样子",
        kind="name",
        questions="""
            {s}是谁变来的 {s}进化以前叫什么 哪个宝可梦进化了就是{s} {s}由哪只宝可梦变成
            {s}的上一形态叫什么 想要{s}得先养谁 {s}小时候是谁 {s}升级以前长什么样 {s}进化之前叫什么名字
            在进化之前{s}长什么样 {s}从谁那里进化而来
            """,
        statements="{s}是{v}变来的 {v}进化了就是{s} {s}进化以前叫{v} {s}由{v}变成 想要{s}得先养{v}",
        missing="{s}不是进化来的 {s}没有上一阶段 {s}没有前身 {s}没有进化来源 {s}前面没有别的形态 {s}生来就是这样",
    ),
    "身高": _column(
        labels="身高 高度 个头 个子",
        kind="number",
        questions="""
            {s}站起来有几米 {s}高几米 {s}长到多高 {s}个子多大 量一量{s}有几米 {s}大约几米高
            {s}个头怎么样 {s}从头到脚有几米 {s}长得高不高，有几米 {s}的身体有几米高 {s}长得有几米
            """,
        statements="{s}高{v} {s}有{v}高 {s}站起来有{v} {s}长到{v}高 量出来{s}有{v}",
        unit="米 米 米 公尺",
    ),
}

QUESTION_WORDS = {
    "number": ("是几", "有多少", "数值有几点", "到底是多少", "多大", "写着多少"),
    "list": ("包括什么", "到底是什么", "写着哪些", "都有什么", "有哪几种"),
    "name": ("到底是什么", "写作什么", "是哪个", "写着什么", "应该填什么"),
}
GENERAL_QUESTIONS = (
    "{s}的{l}{w}",
    "{s}，{l}{w}",
    "{l}方面，{s}{w}",
    "你还记得{s}的{l}吗",
    "说一下{s}的{l}",
    "查一查{s}的{l}",
    "{s}的{l}呢",
    "帮我看看{s}的{l}",
    "图鉴里{s}的{l}{w}",
    "有谁知道{s}的{l}",
    "我忘了{s}的{l}",
    "把{s}的{l}说给我听",
    "{s}这一栏的{l}{w}",
    "那么{s}的{l}{w}",
    "{l}{w}，我说的是{s}",
    "考考你，{s}的{l}{w}",
    "{s}的资料里{l}{w}",
    "{s}的{l}，说说看",
    "大家说说，{s}的{l}{w}",
    "有人想知道{s}的{l}{w}",
    "请告诉大家，{s}的{l}{w}",
    "能不能告诉我们{s}的{l}{w}",
    "请讲讲{s}的{l}",
    "聊聊{s}的{l}",
    "关于{s}的{l}，请准确回答",
    "用一句话回答，{s}的{l}{w}",
    "在关都地区，{s}的{l}{w}",
    "熟悉宝可梦的人请说{s}的{l}",
    "谈到{l}，{s}{w}",
    "想了解{s}的{l}",
    "你们谁能描述{s}的{l}",
)
GENERAL_STATEMENTS = (
    "{s}的{l}写着{v}",
    "{s}的{l}有{v}",
    "{s}，{l}{v}",
    "图鉴记着{s}的{l}：{v}",
    "说到{l}，{s}应该是{v}",
    "{s}的{l}一栏是{v}",
    "{l}方面，{s}为{v}",
    "资料上{s}的{l}记为{v}",
    "{s}的{l}应该是{v}",
    "{s}的{l}是：{v}",
)
QUESTION_OPENINGS = (
    *("",) * 4,
    "请问",
    "我想问，",
    "你说，",
    "博士，",
    "对了，",
    "好奇问一下，",
    "再问一个，",
    "顺便问问，",
)
PRONOUNS = ("它", "它", "这只宝可梦", "这家伙", "那只宝可梦")
