"""inspect_data.py: the real command on the embedded tokenizer, and the views that it prints."""

import html.parser
import itertools
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import read_light_help
from conversation_helpers import assistant, conversation, pair, user, write_jsonl

from finetune_chatmodel_demo import inspect_data
from finetune_chatmodel_demo.conversation import DataArguments, build_dataset, render_conversation, render_input_output
from finetune_chatmodel_demo.conversation.data_arguments import read_data_arguments
from finetune_chatmodel_demo.conversation.stage_data import build_stage_data
from finetune_chatmodel_demo.conversation.view import format_row, token_texts

PROGRAM = Path(inspect_data.__file__)
RECORDS = [
    {"conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (("皮卡丘<|user|>？", "电属性。\n<b>完"), ("妙蛙种子？", "草。"), ("小火龙？", "火。"))
]


@pytest.fixture
def data_file(tmp_path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS), encoding="utf-8")
    return path


@pytest.fixture
def inspect(tiny_folder, data_file, capsys):
    """Runs the program in this process; returns what it printed on stdout and stderr."""

    def run(*arguments: str) -> tuple[str, str]:
        inspect_data.main(["--train_file", str(data_file), "--tokenizer", str(tiny_folder), *arguments])
        return capsys.readouterr()

    return run


def test_json_lines_are_the_training_rows_and_nothing_else(inspect, tokenizer):
    stdout, stderr = inspect("--json")
    renderings = [render_conversation(tokenizer, record) for record in RECORDS]
    expected = [{"input_ids": rendering.input_ids, "labels": rendering.labels} for rendering in renderings]
    assert [json.loads(line) for line in stdout.splitlines()] == expected
    assert "supervised" in stderr
    assert [json.loads(line) for line in inspect("--json", "--row", "2", "0")[0].splitlines()] == [
        expected[2],
        expected[0],
    ]


def test_the_table_shows_every_token(inspect, tokenizer, data_file):
    stdout, _ = inspect("--row", "1", "2")
    row = render_conversation(tokenizer, RECORDS[1])
    table = stdout[stdout.index("position") :].splitlines()[1 : 1 + len(row.input_ids)]
    shown = [[int(word) for word in line.split()[:4]] for line in table]
    assert shown == [
        [position, token, label, int(label != -100)]
        for position, (token, label) in enumerate(zip(row.input_ids, row.labels))
    ]
    assert f"row 1 ({data_file} line 2): {len(row.input_ids)} tokens" in stdout
    assert f"row 2 ({data_file} line 3): " in stdout
    assert "\033" not in stdout, "no colours in a pipe"


def test_the_summary_counts(inspect, data_file):
    with open(data_file, "a", encoding="utf-8") as file:
        file.write('\n{"broken": 1}\n{"conversations": [{"role": "user", "content": "?"}]}\n')
    stdout, _ = inspect("--on_bad_record", "skip", "--validation_file", str(data_file))
    assert stdout.count(str(data_file)) == 5, "a summary and a bad record for each file, and the place of row 0"
    assert re.search(r"rows +3 of 5 records\n +dropped +1 bad records, 1 without a target\n +turns +6 \(2\.0 a", stdout)
    assert re.search(r"truncated +0 rows \(0\.0%\)", stdout)
    assert re.search(r"length +p50 \d+, p90 \d+, p95 \d+, p99 \d+, longest \d+", stdout)
    cut, _ = inspect("--on_bad_record", "skip", "--max_seq_length", "13", "--truncation_strategy", "official")
    assert re.search(r"truncated +[1-3] rows", cut) and "longest 13" in cut


class PageText(html.parser.HTMLParser):
    """Collects the text and the token spans of a page, and what it would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.spans, self.text, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "span" and "title" in attributes:
            self.spans.append(attributes["title"])

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained_and_escaped(inspect, tokenizer, tmp_path):
    stdout, _ = inspect("--html", str(tmp_path / "out.html"))
    assert f"3 rows written to {tmp_path / 'out.html'}" in stdout and "position" not in stdout
    source = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = PageText()
    page.feed(source)
    assert page.links == [] and "<b>" not in source and "url(" not in source
    rows = [render_conversation(tokenizer, record) for record in RECORDS]
    assert page.spans == [
        f"position {position}, id {token}, label {label}, mask {int(label != -100)}"
        for row in rows
        for position, (token, label) in enumerate(zip(row.input_ids, row.labels))
    ]
    assert "皮卡丘" in "".join(page.text)
    inspect("--html", str(tmp_path / "one.html"), "--row", "1")
    assert (tmp_path / "one.html").read_text(encoding="utf-8").count("<section>") == 1


def test_input_output_rows(tiny_folder, tokenizer, tmp_path, capsys):
    record = {"prompt": "类型#宝可梦", "response": "皮卡丘是宝可梦。"}
    path = tmp_path / "x.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    flags = ["--train_format", "input-output", "--validation_file", str(path), "--tokenizer", str(tiny_folder)]
    inspect_data.main([*flags, "--max_source_length", "5", "--max_target_length", "3", "--json"])
    expected = render_input_output(tokenizer, record, 5, 3, ends_cut_response=False)
    assert json.loads(capsys.readouterr().out) == {"input_ids": expected.input_ids, "labels": expected.labels}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--row", "3"], "--row 3 does not exist; .* has rows 0 to 2"),
        (["--max_target_length", "-1"], "--max_target_length is -1; it must be at least 1"),
        (["--train_file", "no.jsonl"], r"no\.jsonl does not exist"),
        (["--train_file", ""], "give --train_file or --validation_file"),
        (["--tokenizer", "no_folder"], "no_folder is not a folder"),
        (["--train_format", "input-output"], r"train\.jsonl line 1: key 'prompt' is missing; found 'conversations'"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(data_file, tiny_folder, capsys, arguments, expected):
    assert inspect_data.main(["--train_file", str(data_file), "--tokenizer", str(tiny_folder), *arguments]) == 2
    message = capsys.readouterr().err
    assert re.search(rf"error: .*{expected}", message) and message.count("\n") == 1


def test_colour_marks_what_the_loss_counts_on(tokenizer, data_file):
    lengths = {"max_seq_length": 99, "max_source_length": 9, "max_target_length": 9}
    item = build_dataset("multi-turn", data_file, tokenizer, **lengths)[1]
    text = format_row(tokenizer, item, "row 1", use_color=True).split("\n\n")[0]
    green = "".join(re.findall("\033\\[32m([^\033]*)\033", text))
    blue = re.findall("\033\\[34m([^\033]*)\033", text)
    assert "草。" in green and "妙蛙种子" not in green and "妙蛙种子" in re.sub("\033\\[\\d+m", "", text)
    assert blue == ["[gMASK]", "sop", "<|user|>", "<|assistant|>"]
    plain = format_row(tokenizer, item, "row 1").split("\n\n")[0]
    assert re.search("<\\|assistant\\|>⟦[^⟧]*草。.*⟧$", plain, re.DOTALL)


class ByteTokenizer:
    """Pieces as SentencePiece writes them; ids are their positions."""

    pieces = ("▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x0A>", "<0xFF>", "b\x1b[2J")

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[index] for index in ids]


def test_token_texts_are_whole_characters_and_harmless():
    assert token_texts(ByteTokenizer(), list(range(8))) == [
        " a", "<0xF0>", "<0x9F>", "<0x98>", "😀", "\\n", "<0xFF>", "b\\x1b[2J",
    ]  # fmt: skip


def test_colour_wants_a_terminal_and_no_refusal(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert inspect_data.wants_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not inspect_data.wants_color(Terminal())


def test_help_is_light(tmp_path):
    assert "--on_bad_record" in read_light_help(PROGRAM, tmp_path)


def test_runs_as_a_script_from_any_folder_into_a_closed_pipe_and_on_a_terminal(tiny_folder, data_file, tmp_path):
    command = [sys.executable, str(PROGRAM), "--train_file", str(data_file), "--tokenizer", str(tiny_folder)]
    closed = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$@" | head -c 1', "bash", *command],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in closed.stderr and "BrokenPipe" not in closed.stderr
    assert closed.returncode == 0 and len(closed.stdout) == 1
    reader, writer = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    shown = b""
    with subprocess.Popen(command, cwd=PROGRAM.parent, stdout=writer, env=environment) as process:
        os.close(writer)
        try:
            while block := os.read(reader, 4096):
                shown += block
        except OSError:  # what a Linux terminal answers once its other end is closed
            pass
    assert process.returncode == 0
    assert b"\033[32m" in shown and "皮" in shown.decode("utf-8")


# Every stage


def write_stage_file(folder: Path, stage: str) -> Path:
    records = {
        "pt": [{"text": "皮卡丘是电属性。" * 3}, {"text": "妙蛙种子是草属性。"}],
        "dpo": [pair([user("皮卡丘？")], "电<b>。", "火。")] * 2,
        "ppo": [conversation(user("皮卡丘？"), assistant("电。"))] * 2,
    }[stage]
    return write_jsonl(folder / f"{stage}.jsonl", records)


@pytest.fixture
def inspect_stage(tiny_folder, tmp_path, capsys):
    """Runs the program on a file of a stage; returns what it printed on stdout."""

    def run(stage: str, *arguments: str) -> str:
        file = write_stage_file(tmp_path, stage)
        inspect_data.main(["--stage", stage, "--train_file", str(file), "--tokenizer", str(tiny_folder), *arguments])
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("stage", ["pt", "dpo", "ppo"])
def test_json_lines_are_the_rows_of_the_stage(inspect_stage, tokenizer, tmp_path, stage):
    shown = [json.loads(line) for line in inspect_stage(stage, "--json", "--cutoff_len", "24").splitlines()]
    data = DataArguments(train_file=str(tmp_path / f"{stage}.jsonl"), max_seq_length=24)
    rows = build_stage_data(data, stage, tokenizer, 0).train
    assert shown == [rows[row] for row in range(len(rows))] and len(shown) >= 2


def test_replies_go_on_where_the_prompt_ends(inspect_stage, tokenizer):
    stdout = inspect_stage("dpo")
    prompt = tokenizer.build_chat_input("皮卡丘？").input_ids[0].tolist()
    chosen = [*tokenizer.encode_text("\n"), *tokenizer.encode_text("电<b>。"), tokenizer.eos_token_id]
    rejected = [*tokenizer.encode_text("\n"), *tokenizer.encode_text("火。"), tokenizer.eos_token_id]
    heading = f"prompt {len(prompt)} tokens, chosen {len(chosen)} tokens, rejected {len(rejected)} tokens"
    assert f"dpo.jsonl line 1): {heading}\nprompt:\n[gMASK]sop<|user|>" in stdout
    assert "chosen:\n⟦ \\n\n 电" in stdout and "</s>⟧\nrejected:\n⟦ \\n\n 火。</s>⟧" in stdout
    table = stdout[stdout.index("position") :].splitlines()[1:]
    places = [table.index(f"{name}:") for name in ("prompt", "chosen", "rejected")] + [len(table)]
    lines = [table[place + 1 : end] for place, end in itertools.pairwise(places)]
    parts = [[[int(word) for word in line.split()[:4]] for line in part] for part in lines]
    assert parts[0] == [[position, token, -100, 0] for position, token in enumerate(prompt)]
    for part, ids in zip(parts[1:], (chosen, rejected)):
        assert part == [[len(prompt) + place, token, token, 1] for place, token in enumerate(ids)]


def test_blocks_show_where_documents_begin(inspect_stage, tokenizer):
    stdout = inspect_stage("pt")
    assert "rows        1 blocks of 2 documents" in stdout and "turns" not in stdout
    flow, table = stdout.split("position")
    assert (
        "[gMASK]sop\n┄┄ document ┄┄\n⟦ 皮卡丘是电属性。皮卡丘是电属性。皮卡丘是电属性。</s>\n┄┄ document ┄┄\n" in flow
    )
    assert table.count("┄┄ document ┄┄") == 2
    assert table.splitlines().index("┄┄ document ┄┄") == 3, "after the two tokens that start the block"


def test_prompts_show_the_reference(inspect_stage):
    stdout = inspect_stage("ppo", "--row", "1")
    assert re.search(r"ppo\.jsonl line 2\): prompt \d+ tokens, reference \d+ tokens\nprompt:\n", stdout)
    assert "⟦" not in stdout and "supervised " not in stdout.split("data set")[0], "no loss counts"


@pytest.mark.parametrize("stage", ["pt", "dpo", "ppo"])
def test_pages_of_every_stage(inspect_stage, tokenizer, tmp_path, stage):
    inspect_stage(stage, "--html", str(tmp_path / "out.html"))
    source = (tmp_path / "out.html").read_text(encoding="utf-8")
    page = PageText()
    page.feed(source)
    assert page.links == [] and "<b>" not in source
    rows = build_stage_data(DataArguments(train_file=str(tmp_path / f"{stage}.jsonl")), stage, tokenizer, 0).train
    items = [rows[row] for row in range(len(rows))]
    count = sum(len(ids) for item in items for name, ids in item.items() if stage != "pt" or name == "input_ids")
    assert len(page.spans) == count
    assert source.count("<hr ") == (2 if stage == "pt" else 0)
    assert source.count('class="replies"') == (0 if stage == "pt" else 2)
    assert "data set" in "".join(page.text), "the table"


def test_data_sets_of_a_registry_are_shown_mixed(tiny_folder, tokenizer, tmp_path, capsys):
    for name, answer in (("甲", "电。"), ("乙", "草。")):
        rows = [{"instruction": f"{name}{number}", "output": answer} for number in range(3)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    blocks = {name: {"file_name": f"{name}.jsonl"} for name in "甲乙"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(blocks), encoding="utf-8")
    flags = ["--dataset", "甲,乙", "--dataset_dir", str(tmp_path), "--tokenizer", str(tiny_folder)]
    inspect_data.main([*flags, "--mix_strategy", "interleave_under", "--row", "1", "--template", "default"])
    stdout = capsys.readouterr().out
    assert "rows        6, out of 6" in stdout and "train:      6 rows" in stdout
    assert re.search(r"^甲 +3 +0 +0 +0 +3 +0 +\d+ +\d+\.\d% +3$", stdout, re.MULTILINE)
    assert re.search(r"row 1 \(.*乙\.jsonl line 1\)", stdout) and "Human" in stdout
    inspect_data.main([*flags, "--val_size", "2", "--part", "validation", "--json"])
    captured = capsys.readouterr()
    data = DataArguments(dataset="甲,乙", dataset_dir=str(tmp_path), val_size=2)
    held_out = build_stage_data(data, "sft", tokenizer, 42).validation
    assert [json.loads(line) for line in captured.out.splitlines()] == [held_out[0], held_out[1]]
    assert "validation: 2 rows" in captured.err
    assert "乙.jsonl (train)\n  rows        4, out of 6" in captured.err
    assert "乙.jsonl (validation)\n  rows        2, out of 6" in captured.err
    inspect_data.main(["--eval_dataset", "乙", *flags[2:], "--json"])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stage", "dpo"], "line 1: 'conversations' ends with role 'assistant'; expected user"),
        (["--part", "validation"], "there are no rows of --part validation; there are those of train"),
        (["--streaming"], "--streaming is for training; drop it, and give --max_samples 100"),
        (["--dataset", "x"], "--train_file and --dataset exclude each other"),
    ],
)
def test_mistakes_with_stages_are_one_line_too(data_file, tiny_folder, capsys, arguments, expected):
    assert inspect_data.main(["--train_file", str(data_file), "--tokenizer", str(tiny_folder), *arguments]) == 2
    assert re.search(rf"error: .*{expected}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "expected"), [(["--streaming", "False"], False), (["--streaming"], True), ([], False)]
)
def test_flags_that_are_true_or_false(words, expected):
    parsed = read_data_arguments(inspect_data.build_parser().parse_args(["--tokenizer", "x", *words]))
    assert parsed.streaming is expected
    with pytest.raises(SystemExit):
        inspect_data.build_parser().parse_args(["--tokenizer", "x", "--streaming", "perhaps"])


def test_cutoff_len_is_max_seq_length():
    parsed = inspect_data.build_parser().parse_args(["--tokenizer", "x", "--cutoff_len", "77"])
    assert read_data_arguments(parsed).max_seq_length == 77
