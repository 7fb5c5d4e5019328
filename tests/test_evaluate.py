"""evaluate.py: the two ways of asking, exact shares of base and prefix, the JSON, and what it says of mistakes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from adapter_helpers import make_adapter
from conftest import REPOSITORY
from conversation_helpers import message, write_jsonl
from wcwidth import wcswidth

from finetune_chatmodel_demo import evaluate
from finetune_chatmodel_demo.conversation.render import render_prompt
from finetune_chatmodel_demo.evaluation import exact
from finetune_chatmodel_demo.evaluation.comparison import wilson_interval
from finetune_chatmodel_demo.evaluation.exact import (
    Question,
    longest_reply_needed,
    read_questions,
    score_questions,
)
from finetune_chatmodel_demo.generation.batch import generate_replies

CAP = 12
CSV = REPOSITORY / "data_processing" / "data.csv"
KANTO = REPOSITORY / "data_processing" / "templates" / "pokemon_kanto.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory, prefix_model, tokenizer):
    """Ten conversations of two questions. The prefix's true answers to eight first and five second questions, the
    base's to two first ones; everything else is wrong."""
    names = ["皮卡丘", "妙蛙种子", "小火龙", "杰尼龟", "喵", "伊布", "雷丘", "可达鸭", "胖丁", "卡比兽"]
    records = []
    for i, name in enumerate(names):
        opening = [message("system", "图鉴"), message("user", f"{name}的属性？")]
        if i < 8:
            first = answer(prefix_model, tokenizer, opening)
        else:
            with prefix_model.prefix_disabled():
                first = answer(prefix_model, tokenizer, opening)
        talk = [*opening, message("assistant", f" {first}\n", column="属性"), message("user", "它的弱点？")]
        second = answer(prefix_model, tokenizer, talk) if i < 5 else "不知道"
        talk += [message("assistant", second, column="弱点"), message("user", "谢谢"), message("assistant", "再见")]
        records.append({"conversations": talk})
    return write_jsonl(tmp_path_factory.mktemp("data") / "pokemon.jsonl", records)


def answer(model, tokenizer, messages):
    prompt = render_prompt(tokenizer, messages)
    (reply,) = generate_replies(model, tokenizer, [prompt], max_new_tokens=CAP, batch_size=1)
    assert reply.text.strip() == reply.text != ""
    return reply.text


def run(capsys, *flags):
    code = evaluate.main([*map(str, flags)])
    return (code, *capsys.readouterr())


def test_shares_are_counted_exactly(capsys, tmp_path, data, base, prefix):
    output = tmp_path / "scores.json"
    flags = [
        "--pt-checkpoint",
        prefix,
        "--data",
        f"trained phrasings={data}",
        "--max-new-tokens",
        CAP,
        "--batch-size",
        3,
    ]
    code, out, _ = run(capsys, *flags, "--output", output, "--device", "cpu")
    assert code == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    (file,) = result["files"]
    assert (file["name"], file["path"], file["questions_in_file"]) == ("trained phrasings", str(data), 20)
    with_prefix, without = file["scores"]["base + prefix"], file["scores"]["base"]
    assert (with_prefix["asked"], with_prefix["exact"], with_prefix["share"]) == (20, 13, 0.65)
    assert with_prefix["by_column"] == {
        "属性": {"asked": 10, "exact": 8, "share": 0.8},
        "弱点": {"asked": 10, "exact": 5, "share": 0.5},
    }
    assert without["by_column"]["属性"] == {"asked": 10, "exact": 2, "share": 0.2}
    assert without["exact"] == 2
    assert with_prefix["wilson95"] == pytest.approx([0.4329, 0.8188], abs=1e-4)
    assert len(with_prefix["wrong"]) == 7
    assert with_prefix["wrong"][0]["question"] == "它的弱点？"
    assert with_prefix["wrong"][0]["expected"] == "不知道"
    assert with_prefix["hit_cap"] <= 20
    assert (result["model"], result["pt_checkpoint"]) == (str(base), str(prefix))
    lines = out.splitlines()
    assert lines[0].split() == ["exact", "answers", "base", "base", "+", "prefix", "questions"]
    assert re.split("  +", lines[2]) == [
        *("trained phrasings", "10.0% (2.8% to 30.1%)", "65.0% (43.3% to 81.9%)", "20")
    ]
    assert "trained phrasings, base + prefix, wrong (弱点): 它的弱点？" in out
    assert out.count("expected '不知道'") == 3


def test_without_a_prefix_there_is_one_column(capsys, tmp_path, data, base):
    output = tmp_path / "scores.json"
    flags = ["--model", base, "--data", data, "--max_new_tokens", CAP, "--examples", 0, "--output", output]
    code, out, _ = run(capsys, *flags)
    assert code == 0
    (file,) = json.loads(output.read_text(encoding="utf-8"))["files"]
    assert file["name"] == "pokemon"
    assert {name: score["exact"] for name, score in file["scores"].items()} == {"model": 2}
    assert "expected" not in out


def test_an_adapter_is_compared_with_its_base(capsys, tmp_path, data, base):
    adapter = make_adapter(tmp_path / "adapter", base, prompt_format="multi-turn")
    output = tmp_path / "out.json"
    flags = ["--data", data, "--max-new-tokens", CAP, "--device", "cpu"]
    code, out, _ = run(capsys, "--adapter", adapter, *flags, "--output", output)
    assert code == 0
    assert "base + adapter" in out.splitlines()[0]
    result = json.loads(output.read_text(encoding="utf-8"))
    assert (result["adapter"], result["pt_checkpoint"]) == (str(adapter), None)
    (scores,) = [file["scores"] for file in result["files"]]
    assert list(scores) == ["base", "base + adapter"]
    alone = tmp_path / "alone.json"
    run(capsys, "--model", base, *flags, "--output", alone)
    expected = json.loads(alone.read_text(encoding="utf-8"))["files"][0]["scores"]["model"]
    assert scores["base"] == expected and expected["exact"] == 2
    got = [[example["got"] for example in scores[name]["wrong"]] for name in scores]
    assert got[0] != got[1]


def test_the_sample_is_seeded_and_keeps_the_order_of_the_file(data):
    every, found = read_questions(data)
    assert (len(every), found) == (20, 20)
    sample, found = read_questions(data, 6, seed=1)
    assert (len(sample), found) == (6, 20)
    places = [every.index(question) for question in sample]
    assert places == sorted(places)
    assert read_questions(data, 6, seed=1)[0] == sample
    assert read_questions(data, 6, seed=2)[0] != sample
    assert read_questions(data, 50)[0] == every


def test_the_sample_is_fair(tmp_path):
    record = {"conversations": [message("user", "?"), message("assistant", "!", column="c")] * 10}
    path = write_jsonl(tmp_path / "f.jsonl", [record])
    every = read_questions(path)[0]
    counts = [0] * 10
    for seed in range(600):
        for question in read_questions(path, 2, seed)[0]:
            counts[every.index(question)] += 1
    assert sum(counts) == 1200
    assert all(80 < count < 160 for count in counts), counts


def test_gold_history_and_tools_come_before_a_question(tmp_path):
    tools = [{"name": "query"}]
    call = {"role": "tool", "name": "query", "parameters": {}, "observation": "电"}
    talk = [message("user", "？"), call, message("assistant", " 电 ", column="属性"), message("assistant", "没有列")]
    path = write_jsonl(tmp_path / "f.jsonl", [{"tools": tools, "conversations": talk}])
    assert read_questions(path)[0] == [Question("属性", talk[:2], tools, "电")]


def test_replies_that_hit_the_cap_are_counted(prefix_model, tokenizer):
    question = Question("属性", [message("user", "皮卡丘？")], None, "x")
    score = score_questions(
        prefix_model, tokenizer, [question], prompt_format="multi-turn", max_new_tokens=1, batch_size=1
    )
    assert (score["exact"], score["hit_cap"]) == (0, 1)


def test_the_default_cap_lets_every_right_reply_end(tokenizer, data):
    questions = read_questions(data)[0]
    cap = longest_reply_needed(tokenizer, questions)
    lengths = [len(tokenizer.build_single_message("assistant", "", question.expected)) for question in questions]
    assert max(lengths) < cap < max(lengths) + 16


@pytest.mark.parametrize(
    ("exact", "asked", "interval"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962)), (1, 1, (0.2065, 1.0))],
)
def test_wilson_intervals(exact, asked, interval):
    assert wilson_interval(exact, asked) == pytest.approx(interval, abs=1e-4)


def test_wilson_needs_trials():
    with pytest.raises(ValueError, match="0 successes in 0 trials"):
        wilson_interval(0, 0)


def test_names_of_files(tmp_path):
    path = tmp_path / "a=b.jsonl"
    path.touch()
    assert exact.split_data(str(path)) == ("a=b", str(path))
    assert exact.split_data("unseen phrasings=x/y.jsonl") == ("unseen phrasings", "x/y.jsonl")
    assert exact.split_data("x/y.jsonl") == ("y", "x/y.jsonl")


def test_tables_align_wide_characters():
    score = {"asked": 4, "share": 0.5, "wilson95": [0.1, 0.9]}
    files = [{"name": name, "scores": {"model": score}} for name in ("见过的问法", "x")]
    lines = exact.shares_table({"files": files}).splitlines()
    assert [re.split("  +", line.strip()) for line in (lines[0], *lines[2:])] == [
        ["exact answers", "model", "questions"],
        ["见过的问法", "50.0% (10.0% to 90.0%)", "4"],
        ["x", "50.0% (10.0% to 90.0%)", "4"],
    ]
    assert len({wcswidth(line.split("50.0%")[0]) for line in lines[2:]}) == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ([], "give one of --csv, --questions_file and --data (got none)"),
        (
            ["--data", "{data}", "--csv", "x.csv"],
            "give one of --csv, --questions_file and --data (got --csv and --data)",
        ),
        (["--data", "{data}", "--report", "x"], "--report goes with --csv, not with --data"),
        (["--questions_file", "{data}", "--hold_out", "0.2"], "--hold_out goes with --csv, not with --questions_file"),
        (["--csv", "x.csv"], "--csv needs --template"),
        (["--csv", "x.csv", "--template", "{kanto}"], "x.csv does not exist"),
        (["--csv", "{csv}", "--template", "{kanto}", "--groups", "seen"], "unknown group of questions 'seen'"),
        (["--questions_file", "{data}"], "is no question file"),
        (["--csv", "{csv}", "--template", "{kanto}", "--probes", "{data}"], "is no probe file"),
        (["--csv", "{csv}", "--template", "{kanto}", "--hold_out", "1"], "expected a share from 0 to below 1"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "{no_questions}"], "has no questions: none of its assistant messages has a 'column' key"),
        (["--data", "a={data}", "--data", "a={data}"], "--data: a is there twice; name the files"),
        (["--data", "{data}", "--max-questions", "0"], "max_questions is 0; it must be at least 1"),
        (["--data", "{data}", "--batch-size", "0"], "batch_size is 0; it must be at least 1"),
        (["--data", "{data}", "--output", "{missing}/x.json"], "there is no folder"),
        (["--data", "{data}", "--output", "{folder}"], "is a folder; name another"),
        (["--csv", "{csv}", "--template", "{kanto}", "--report", "{data}"], "is a file; name another"),
        (["--data", "{odd_column}"], "record 1: conversations[1]: 'column' must be a text, got 5"),
        (["--data", "{unasked}"], "record 1: conversations[0] has a 'column', and no question before it"),
        (["--data", "{silent}"], "has no questions"),
        (["--questions_file", "{folder}"], "is no file"),
    ],
)
def test_mistakes(capsys, tmp_path, data, base, flags, error):
    talk = [message("user", "？"), message("assistant", "！")]
    no_questions = write_jsonl(tmp_path / "plain.jsonl", [{"conversations": talk}])
    places = {"folder": tmp_path} | {
        name: write_jsonl(tmp_path / f"{name}.jsonl", [{"conversations": messages}])
        for name, messages in {
            "odd_column": [message("user", "？"), message("assistant", "！", column=5)],
            "unasked": [message("assistant", "！", column="c")],
            "silent": [message("user", "？"), message("assistant", " ", column="c")],
        }.items()
    }
    places |= {"data": data, "no_questions": no_questions, "missing": tmp_path / "missing", "csv": CSV, "kanto": KANTO}
    code, out, err = run(capsys, "--model", base, *(flag.format(**places) for flag in flags))
    assert (code, out) == (2, "")
    assert error in err.splitlines()[-1]


# ---------------------------------------------------------------- --csv: against the facts


def test_questions_from_the_csv(capsys, tmp_path, base, prefix):
    """The whole way on a random model: nothing is right, everything is counted, all files are there."""
    report, output = tmp_path / "report", tmp_path / "facts.json"
    flags = ["--csv", CSV, "--template", KANTO, "--max_questions", 12, "--hold_out", 0.2, "--max-new-tokens", 6]
    flags += ["--pt-checkpoint", prefix, "--report", report, "--output", output, "--history", "both"]
    code, out, err = run(capsys, *flags, "--device", "cpu", "--seed", 5)
    assert code == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result == json.loads((report / "report.json").read_text(encoding="utf-8"))
    assert [(candidate["name"], candidate["kind"]) for candidate in result["candidates"]] == [
        ("base", "base"),
        ("base + prefix", "prefix"),
    ]
    groups = result["candidates"][1]["groups"]
    assert list(groups)[:4] == [
        *("trained phrasings", "unseen phrasings"),
        *("held out, trained phrasings", "held out, unseen phrasings"),
    ]
    assert {"multi-turn", "unanswerable", "multi-turn, right history", "unanswerable, right history"} <= set(groups)
    for score in groups.values():
        assert score["asked"] == sum(score[outcome] for outcome in ("exact", "partial", "wrong", "missing"))
        assert score["share"] == 0
    assert result["run"]["held_out"] and result["run"]["fields"]["身高"] == "number 米"
    assert set(result["candidates"][0]["probes"]) == {"perplexity", "obedience"}
    assert out.splitlines()[0].startswith("exact in facts")
    assert f"report: {report / 'report.html'}" in err
    assert (report / "report.md").read_text(encoding="utf-8").startswith("# Evaluation")


def test_question_files_are_asked_and_candidates_are_named(capsys, tmp_path, base, prefix):
    from data_processing import question_builder

    questions, output = tmp_path / "q.json", tmp_path / "facts.json"
    question_builder.main(["--template", str(KANTO), "--output", str(questions), "--questions", "4"])
    flags = ["--questions_file", questions, "--groups", "unseen phrasings", "--max_new_tokens", 4, "--probes", "none"]
    flags += ["--compare", "base", "--compare", f"mine={prefix}", "--output", output, "--examples", 0]
    code, out, _ = run(capsys, *flags, "--device", "cpu")
    assert code == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert [candidate["name"] for candidate in result["candidates"]] == ["base", "mine"]
    assert list(result["candidates"][0]["groups"]) == ["unseen phrasings"]
    assert result["comparisons"][0]["groups"]["unseen phrasings"]["mcnemar_p"] == 1.0
    assert "probes" not in result["candidates"][0]
    assert "got" not in out


def test_candidates_on_conversation_files(capsys, tmp_path, data, base, prefix):
    output = tmp_path / "scores.json"
    flags = ["--data", f"x={data}", "--compare", "base", "--compare", f"mine={prefix}", "--max-new-tokens", CAP]
    code, _, _ = run(capsys, *flags, "--output", output, "--device", "cpu")
    assert code == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {name: score["exact"] for name, score in result["files"][0]["scores"].items()} == {"base": 2, "mine": 13}
    assert [candidate["kind"] for candidate in result["candidates"]] == ["base", "prefix"]


def test_the_folder_alone_says_what_is_missing(tmp_path, base, data):
    """Copied without data_processing: --csv says so, --data works."""
    shutil.copytree(REPOSITORY / "finetune_chatmodel_demo", tmp_path / "finetune_chatmodel_demo")
    program = [sys.executable, str(tmp_path / "finetune_chatmodel_demo" / "evaluate.py"), "--model", str(base)]

    def call(*flags):
        return subprocess.run([*program, *map(str, flags)], capture_output=True, text=True, cwd=tmp_path, timeout=300)

    asked = call("--csv", CSV, "--template", KANTO)
    assert asked.returncode == 2
    last = asked.stderr.splitlines()[-1]
    assert last.startswith("evaluate.py: error: --csv needs this project's folder data_processing, which is not at")
    asked = call("--data", data, "--max-new-tokens", "4", "--max-questions", "2", "--device", "cpu")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.splitlines()[0].split() == ["exact", "answers", "model", "questions"]
