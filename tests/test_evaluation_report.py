"""From dialogues to a report: histories, figures by hand, paired tests, candidates, and pages that hold together."""

import json
import math
import random
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from evaluation_helpers import CELLS, Script, build_questions, right_answer
from generation_helpers import build_prefix_folder, build_random_folder

from finetune_chatmodel_demo import evaluate
from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.chatglm3.lora import add_adapter, save_adapter
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.evaluation import asking, candidates, comparison_report
from finetune_chatmodel_demo.evaluation.comparison import (
    AskOptions,
    bootstrap_difference,
    compare,
    compare_candidates,
    mcnemar_p,
    score_groups,
    wilson_interval,
    worst_examples,
)
from finetune_chatmodel_demo.evaluation.comparison_report import write_reports
from finetune_chatmodel_demo.evaluation.questions import MULTI_TURN, TRAINED, UNANSWERABLE, UNSEEN
from finetune_chatmodel_demo.generation.batch import BatchReply

NASTY = '<script>alert("x")</script> | `*` \n 第二行 \\'


class Context:
    """As much of a model as `prompt_budget` asks for."""

    class config:
        seq_length = 512


@pytest.fixture(scope="module")
def questions():
    return build_questions()


def put(monkeypatch, tokenizer, questions, answer, **options):
    script = Script(answer)
    monkeypatch.setattr(asking, "generate_replies", script)
    keywords = {"prompt_format": "multi-turn", "max_new_tokens": 32, "batch_size": 4} | options
    return asking.ask_questions(Context(), tokenizer, questions, **keywords), script


def know_everything(text: str) -> str:
    """Right answers, found in the conversation that the model is shown."""
    asked = text.rsplit("<|user|>", 1)[1]
    if "生日" in asked:
        return "资料里没有记载。"
    named = re.findall("|".join(CELLS), text)
    column = "身高" if "身高" in asked or "几米" in asked else "属性"
    return right_answer(named[-1], column)


# ---------------------------------------------------------------- asking


def test_whoever_knows_everything_scores_everything(monkeypatch, tokenizer, questions):
    answers, script = put(monkeypatch, tokenizer, questions, know_everything)
    assert [answer.turn for answer in answers] == questions.turns
    assert {answer.verdict.outcome for answer in answers} == {"exact"}
    assert all(answer.is_verbatim for answer in answers if answer.turn.is_answerable)
    assert len(script.prompts) == len(questions.turns) == 13
    assert [answer.dialogue for answer in answers] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 9, 9]


def test_later_questions_see_the_models_own_replies_or_the_right_ones(monkeypatch, tokenizer, questions):
    """A mistake in the first turn is shown to the second, unless the history is the reference."""

    def answer(text):
        return "小火龙的身高是9.9米。" if "身高" in text.rsplit("<|user|>", 1)[1] else know_everything(text)

    for history, seen, unseen in (("own", "9.9米", "0.6米"), ("reference", "0.6米", "9.9米")):
        _, script = put(monkeypatch, tokenizer, questions, answer, history=history)
        (last,) = [prompt for prompt in script.prompts if "它的属性呢" in prompt]
        assert seen in last and unseen not in last
        assert last.count("<|user|>") == 3
    with pytest.raises(ValueError, match="history is 'gold'; use own or reference"):
        put(monkeypatch, tokenizer, questions, answer, history="gold")


def test_endless_replies_are_wrong_and_begin_right(monkeypatch, tokenizer, questions):
    def answer(text):
        return BatchReply(know_everything(text) + "\n问：它的身高呢？\n答：", hit_cap=True)

    answers, _ = put(monkeypatch, tokenizer, questions, answer)
    for score in score_groups(answers).values():
        assert (score["exact"], score["not_ended"], score["begins_right"]) == (0, score["asked"], 1.0)
        assert score["reasons"] == {"did not end by itself": score["asked"]}


@pytest.mark.parametrize(
    ("reply", "shares"),
    [
        ("", [0, 0, 0, 0]),
        ("我不知道。", [0, 0, 0, 1]),
        ("电", [0.5, 0, 0.5, 0]),
        ("皮卡丘的属性是电。", [0.25, 0, 0.25, 0]),
        ("0.4米", [0, 0.25, 0, 0]),
        ("草、毒、火、电", [0, 0, 0, 0]),
    ],
)
def test_what_one_reply_to_everything_scores(monkeypatch, tokenizer, questions, reply, shares):
    """Group by group: trained (types), unseen (heights), multi-turn (three types, one height), unanswerable."""
    answers, _ = put(monkeypatch, tokenizer, questions, lambda text: reply)
    groups = score_groups(answers)
    assert [groups[group]["share"] for group in (TRAINED, UNSEEN, MULTI_TURN, UNANSWERABLE)] == shares


def test_whoever_repeats_the_question_scores_nothing(monkeypatch, tokenizer, questions):
    answers, _ = put(
        monkeypatch, tokenizer, questions, lambda text: text.rsplit("<|user|>", 1)[1].split("<|assistant|>")[0].strip()
    )
    assert {answer.verdict.outcome for answer in answers} == {"missing"}


def test_the_constant_answer_is_the_most_frequent_value(monkeypatch, tokenizer, questions):
    answers, _ = put(monkeypatch, tokenizer, questions, lambda text: "电")
    right = asking.constant_replies(questions, answers)
    by_group = {}
    for answer, is_right in zip(answers, right):
        by_group.setdefault(answer.turn.group, []).append(is_right)
    assert by_group[TRAINED] == [True, False, False, True]
    assert sum(by_group[UNSEEN]) == 1
    assert by_group[UNANSWERABLE] == [False]


def test_the_cap_leaves_room_for_other_words(tokenizer, questions):
    longest = max(len(tokenizer.encode_text(turn.reference)) for turn in questions.turns)
    assert asking.choose_cap(tokenizer, questions) == max(48, 2 * longest + 16)


# ---------------------------------------------------------------- figures


def test_figures_of_a_group(monkeypatch, tokenizer, questions):
    replies = iter(["电", "草", "火、水", "我不知道。"])

    def answer(text):
        return next(replies) if "图鉴" in text else know_everything(text)

    answers, _ = put(monkeypatch, tokenizer, questions, answer)
    score = score_groups(answers)[TRAINED]
    assert {key: score[key] for key in ("asked", "exact", "partial", "wrong", "missing")} == {
        "asked": 4,
        "exact": 1,
        "partial": 2,
        "wrong": 0,
        "missing": 1,
    }
    assert score["overlap"] == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert score["verbatim"] == 0
    assert score["wilson95"] == pytest.approx(wilson_interval(1, 4))
    assert score["by_column"] == {
        "属性": {"asked": 4, "exact": 1, "partial": 2, "wrong": 0, "missing": 1, "share": 0.25}
    }
    assert score["reasons"] == {"incomplete": 1, "too much": 1, "declines": 1}


def test_the_worst_come_first_and_from_every_column(monkeypatch, tokenizer, questions):
    def answer(text):
        return "水" if "生日" in text else "草" if "妙蛙种子" in text else "0.4公斤" if "几米" in text else "电"

    answers, _ = put(monkeypatch, tokenizer, questions, answer)
    examples = worst_examples(answers)
    assert len(examples) == sum(answer.verdict.outcome != "exact" for answer in answers)
    assert len({(example["group"], example["column"]) for example in examples[:5]}) == 5
    assert [example["outcome"] for example in examples[:3]] == ["wrong"] * 3
    assert worst_examples(answers, 2) == examples[:2]


@pytest.mark.parametrize(
    ("first", "second", "p"), [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 0.0625), (5, 0, 0.0625), (2, 10, 0.038574), (8, 8, 1.0)]
)
def test_mcnemar(first, second, p):
    assert mcnemar_p(first, second) == pytest.approx(p, abs=1e-6)


def test_the_bootstrap_covers_the_truth_and_follows_conversations():
    """Coverage over simulated data is near 95 %; equal conversations of many turns count as few."""
    draw = random.Random(0)
    covered = 0
    for trial in range(60):
        first = [float(draw.random() < 0.5) for _ in range(80)]
        second = [float(draw.random() < 0.7) for _ in range(80)]
        low, high = bootstrap_difference(first, second, list(range(80)), seed=trial)
        covered += low <= 0.2 <= high
    assert covered >= 52
    first, second = [0.0] * 40, [1.0, 0.0] * 20
    narrow = bootstrap_difference(first, second, list(range(40)))
    wide = bootstrap_difference(first, sorted(second), [i // 10 for i in range(40)])
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])
    assert bootstrap_difference([1.0], [1.0], [0]) == (0.0, 0.0)


def test_two_candidates_on_the_same_questions(monkeypatch, tokenizer, questions):
    right, _ = put(monkeypatch, tokenizer, questions, know_everything)
    electric, _ = put(monkeypatch, tokenizer, questions, lambda text: "电")
    figures = compare(electric, right)[TRAINED]
    assert (figures["difference"], figures["only_first"], figures["only_second"]) == (0.5, 0, 2)
    assert figures["mcnemar_p"] == 0.5
    assert figures["bootstrap95"][0] >= 0 and figures["bootstrap95"][1] <= 1
    assert compare(right, right)[UNSEEN]["difference"] == 0


# ---------------------------------------------------------------- candidates


@pytest.fixture(scope="module")
def folders(tmp_path_factory, base, tiny_folder, tokenizer):
    """A prefix, another one of another length, an adapter, and a whole model."""
    root = tmp_path_factory.mktemp("trained")
    facts = {"base_model": str(base), "prompt_format": "multi-turn"}
    build_prefix_folder(root / "prefix", base, **facts)
    model = load_model(base, pre_seq_len=3, device="cpu")
    from finetune_chatmodel_demo.chatglm3 import save_prefix

    save_prefix(model, root / "short", **facts)
    adapted = add_adapter(load_model(base, device="cpu"))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(adapted, root / "lora" / "checkpoint-7", **facts)
    build_random_folder(root / "full", tiny_folder, tokenizer.vocab_size, seed=5)
    return root


def choose(specs, *flags):
    return candidates.choose_candidates(
        specs, evaluate.build_parser().parse_args([*map(str, flags), "--device", "cpu"])
    )


def test_kinds_are_told_by_the_files(base, folders):
    found = choose(["base", f"P={folders}/prefix", f"{folders}/lora", f"F={folders}/full"], "--model", base)
    assert [(candidate.name, candidate.kind) for candidate in found[:2]] == [("base", "base"), ("P", "prefix")]
    assert [(candidate.name, candidate.kind) for candidate in found[2:]] == [("lora", "adapter"), ("F", "model")]
    assert found[2].choice.adapter.name == "checkpoint-7"
    assert found[0].choice.model == str(base)


def test_the_base_is_what_the_others_were_trained_on(base, folders):
    found = choose(["base", f"P={folders}/prefix"])
    assert (found[0].choice.model, found[0].choice.prefix) == (str(base), None)
    default = choose([], "--pt-checkpoint", folders / "prefix")
    assert [(candidate.name, candidate.kind) for candidate in default] == [
        ("base", "base"),
        ("base + prefix", "prefix"),
    ]
    assert [candidate.name for candidate in choose([], "--model", base)] == ["base"]


def test_a_base_is_loaded_once_and_is_itself_again_after_each_candidate(base, folders, monkeypatch):
    loaded = []
    load_choice = candidates.load_choice
    monkeypatch.setattr(candidates, "load_choice", lambda choice: loaded.append(choice.model) or load_choice(choice))
    specs = ["base", f"a={folders}/prefix", f"b={folders}/lora", f"c={folders}/short", f"d={folders}/full"]
    specs += [f"e={folders}/prefix", f"f={folders}/lora"]
    found = choose(specs, "--model", base)
    found.append(candidates.Candidate("base again", "base", found[0].choice))
    ids, logits = torch.arange(100, 112)[None], {}
    for candidate, model, _ in candidates.load_candidates(found):
        with torch.no_grad():
            logits[candidate.name] = model(input_ids=ids).logits
    assert len(loaded) == 2
    assert torch.equal(logits["base"], logits["base again"])
    assert torch.equal(logits["a"], logits["e"]) and torch.equal(logits["b"], logits["f"])
    alone = load_model(base, pt_checkpoint=folders / "prefix", device="cpu")
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, logits["a"])
    names = ["base", "a", "b", "c", "d"]
    assert all(not torch.allclose(logits[x], logits[y]) for x in names for y in names if x < y)


@pytest.mark.parametrize(
    ("specs", "flags", "message"),
    [
        (["x=nowhere"], [], "--compare x=nowhere: there is no folder nowhere; write base, or NAME=DIR"),
        (["a={root}/prefix", "a={root}/lora"], [], "--compare: a is there twice"),
        (
            ["base"],
            ["--pt-checkpoint", "{root}/prefix"],
            "--compare and --pt-checkpoint or --adapter exclude each other",
        ),
        (["x={root}"], [], "holds no weights"),
    ],
)
def test_candidates_that_cannot_be_asked(folders, specs, flags, message):
    with pytest.raises(UserError) as error:
        choose([spec.format(root=folders) for spec in specs], *(flag.format(root=folders) for flag in flags))
    assert message in str(error.value)


# ---------------------------------------------------------------- reports


@pytest.fixture
def compared(monkeypatch, questions, base, folders):
    """Three candidates with scripted replies: one knows, one says the same always, one is nasty."""
    replies = {"base": lambda text: "电", "P": know_everything, "nasty": lambda text: NASTY}
    names = iter(replies)

    def load(found):
        for candidate in found:
            script = Script(replies[next(names)])
            monkeypatch.setattr(asking, "generate_replies", script)
            from finetune_chatmodel_demo.chatglm3 import load_tokenizer

            yield candidate, Context(), load_tokenizer(base)

    monkeypatch.setattr("finetune_chatmodel_demo.evaluation.comparison.load_candidates", load)
    found = choose(["base", f"P={folders}/prefix", f"nasty={folders}/full"], "--model", base)
    result, answers = compare_candidates(found, questions, AskOptions(history="both"), lambda line: None)
    return {"mode": "facts", "run": {"csv": "x.csv", "held_out": ["甲"]}} | result, answers


def test_candidates_side_by_side(compared):
    result, answers = compared
    assert [candidate["name"] for candidate in result["candidates"]] == ["base", "P", "nasty"]
    shares = [candidate["groups"][TRAINED]["share"] for candidate in result["candidates"]]
    assert shares == [0.5, 1.0, 0.0]
    assert set(result["candidates"][0]["groups"]) == {
        *(TRAINED, UNSEEN, MULTI_TURN, UNANSWERABLE),
        *("multi-turn, right history", "unanswerable, right history"),
    }
    assert result["constant_answer"][TRAINED] == 0.5
    pairs = [(pair["first"], pair["second"]) for pair in result["comparisons"]]
    assert pairs == [("base", "P"), ("base", "nasty"), ("P", "nasty")]
    assert result["comparisons"][2]["groups"][TRAINED]["difference"] == -1.0
    assert {name: len(found) for name, found in answers.items()} == {"base": 18, "P": 18, "nasty": 18}
    assert result["candidates"][1]["examples"] == []


def test_the_table_of_the_terminal(compared):
    result, _ = compared
    lines = comparison_report.summary(result, 1).splitlines()
    assert lines[0].split("  ")[0] == "exact in facts"
    assert "50.0% (15.0% to 85.0%)" in lines[2] and "100.0% (51.0% to 100.0%)" in lines[2]


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a page loads or runs."""

    VOID = frozenset({"meta", "br", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.seen, self.links, self.text = [], set(), [], []

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(compared, tmp_path):
    result, answers = compared
    write_reports(tmp_path / "made" / "report", result, answers)
    folder = tmp_path / "made" / "report"
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert page.links == [] and "script" not in page.seen
    assert {"svg", "table", "details"} <= page.seen
    text = "".join(page.text)
    assert 'alert("x")' in text and "50.0% (15.0% to 85.0%)" in text
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 2
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "unanswerable, right history" in chart and "nasty" in chart
    assert math.isclose(len(json.loads((folder / "report.json").read_text(encoding="utf-8"))["candidates"]), 3)
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 54
    first = json.loads(lines[0])
    assert (first["candidate"], first["got"], first["outcome"]) == ("base", "电", "exact")


def test_markdown_tables_hold_together(compared, tmp_path):
    result, _ = compared
    text = comparison_report.to_markdown(result)
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        if rows:
            pipes = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
            assert len(pipes) == 1, rows[:3]
    assert "<script>" not in text
    for heading in ("## Exact answers", "## Outcomes", "## Differences", "## By column", "## By kind of turn"):
        assert heading in text
    assert "None: every reply is exact." in text
    assert "- held out: 1 (甲 …)" in text
