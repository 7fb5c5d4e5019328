"""The SentencePiece vocabulary of `THUDM/chatglm3-tiny`.

Names, types, abilities and other values are one piece each, and so are whole numbers up to 255: a fact is then one
look-up instead of a spelling exercise, which is what makes a model of four million parameters remember. Everything
else is a piece a character, and characters that are not listed fall back on bytes, so that no text is lost.

Exercised by `python THUDM/build_chatglm3_tiny.py`, which writes the vocabulary and trains the model.
"""

import io
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

LARGEST_WHOLE_NUMBER = 255

# Words that Chinese questions and answers about Pokémon are made of; one piece each.
WORDS = """
宝可梦 属性 弱点 四倍 抵抗 免疫 特性 特征 隐藏 身高 体重 攻击 防御 特攻 特防 特殊 速度 世代 颜色
蛋群 捕获率 捕获 捕捉 进化 等级 传说 幻之 分类 类别 编号 图鉴 英文名 英文 中文 名字 名称 能力 种族值
数值 物理 体力 生命 力量 什么 多少 哪些 哪个 哪种 哪类 几级 几代 怎么 怎样 为什么 是不是 有没有 没有
请问 请告诉 告诉 知道 想知道 说说 介绍 回答 问题 答案 资料 信息 数据 表格 记录 它的 它们 这只 那只
我们 你们 他们 大家 因为 所以 但是 如果 可以 时候 一只 一个 训练家 博士 老师 同学 小智 小霞 小刚
公斤 千克 厘米 公尺 对手 招式 效果 伤害 害怕 普通 系统 用户 助手 关于 之前 之后 第一 第二 第三 地区
关都 朋友 孩子 笔记 故事 旅行 学习 其中 以及 或者 并且 而且 不过 还有 另外 然后 最后 首先 现在 今天
"""

# The most frequent characters of written Chinese, so that ordinary sentences cost one piece a character.
FREQUENT_CHARACTERS = """
的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然
家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把
机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果
加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔
更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展
马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共
确传师观清今切院让识候带导争运笔句早晚跟究竟您请吧呢吗啊呀哦嗯谢帮忙换算称呼叫属哪怎谁位描述查询简短准确友善耐
心热情精通专业熟悉百科词典讲解详细列举填写空格划归哪怕最喜欢伙伴伤害倍怕克制擅长倾向遭遇对抗承受减半完全没用无
效吃亏小心携带拥有具备触发个子矮胖瘦轻沉公斤米厘千克来自诞生初次登场亮相涂红黄蓝绿紫黑白灰褐粉皮肤外观样子孵蛋
繁殖生育精灵球抓收服容易程度概率成功升到级后变成前身上一阶段神兽稀罕珍贵普通普遍存亡血条耐打快慢敏捷速先手出招
顺序拼音字母拉丁洋文写法读数码排行序列登记档案卡片测验考试题抢答选择判断正误对话聊天闲谈开始结束继续顺便
"""

PUNCTUATION = "，。、；：？！“”‘’（）《》〈〉【】—…·～％ !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
LATIN_AND_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


def whole_pieces(values: Iterable[str]) -> list[str]:
    """Strings of more than one character that become one piece each: words, whole numbers and the given values.

    Args:
        values: names and other values of the facts, lists already split at 、.

    Returns:
        Distinct pieces; their order (and so their ids) depends on nothing but the arguments.
    """
    numbers = [str(number) for number in range(10, LARGEST_WHOLE_NUMBER + 1)]
    distinct = dict.fromkeys([*WORDS.split(), *numbers, *values])
    return [piece for piece in distinct if len(piece) > 1 and not re.search(r"\s", piece)]


def train_vocabulary(texts: Iterable[str], values: Iterable[str]) -> bytes:
    """Train the SentencePiece model: whole pieces, then one piece a character, then bytes for the rest.

    Args:
        texts: text whose characters must have pieces of their own, besides the frequent ones.
        values: see `whole_pieces`.

    Returns:
        The bytes of a `tokenizer.model`. As in the official one, unknown, begin and end are 0, 1 and 2, the 256 bytes
        follow, a space goes before the text, and no text is normalised.
    """
    pieces = whole_pieces(values)
    texts = list(texts)
    characters = set("".join([FREQUENT_CHARACTERS, PUNCTUATION, LATIN_AND_DIGITS, *pieces, *texts]))
    characters = sorted(character for character in characters if not character.isspace())
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # Each character once: the trainer then orders equally frequent ones in one way on every machine.
        sentence_iterator=iter(characters),
        model_writer=written,
        model_type="char",
        vocab_size=3 + 256 + len(pieces) + len(characters) + 1,
        hard_vocab_limit=False,
        user_defined_symbols=pieces,
        required_chars="".join(characters),
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return written.getvalue()


def write_vocabulary(folder: Path, model: bytes) -> int:
    """Write `tokenizer.model` into the folder and return its number of pieces."""
    (folder / "tokenizer.model").write_bytes(model)
    return sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
