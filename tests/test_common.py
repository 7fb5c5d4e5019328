"""The room `common`: one error and one way to end, files that are whole or absent, tables."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_chatmodel_demo.common.cli import run_program
from finetune_chatmodel_demo.common.errors import UserError, did_you_mean
from finetune_chatmodel_demo.common.files import hash_file, whole_files, whole_folder, write_json
from finetune_chatmodel_demo.common.tables import format_table


def raising(error: BaseException):
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("a.csv line 3: x"), 2, "a.csv line 3: x"),
        (FileNotFoundError(2, "No such file", "a.csv"), 2, "a.csv"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "make room"),
        (MemoryError("full"), 2, "smaller batch"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_mistakes_end_in_one_line(error: BaseException, status: int, told: str, capsys):
    assert run_program(raising(error)) == status
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("ours"), RuntimeError("ours"), KeyError("ours")])
def test_faults_of_ours_keep_their_traceback(error: Exception):
    with pytest.raises(type(error)):
        run_program(raising(error))


def test_a_negative_answer_is_1_and_success_0():
    assert run_program(lambda: 1) == 1
    assert run_program(lambda: None) == 0


PRINTER = "import sys; from finetune_chatmodel_demo.common.cli import run_program; "


def test_output_that_cannot_be_encoded_and_closed_streams(tmp_path: Path):
    root = Path(__file__).resolve().parents[1]
    code = PRINTER + "sys.exit(run_program(lambda: print('皮卡丘')))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, env={"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "???\n", "")
    shell = f'exec {sys.executable} -c "{code}" <&- >&-'
    result = subprocess.run(["bash", "-c", shell], cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_has_left_is_no_error():
    root = Path(__file__).resolve().parents[1]
    code = PRINTER + "sys.exit(run_program(lambda: print('line\\n' * 100000)))"
    shell = f'set -o pipefail; {sys.executable} -c "{code}" | head -1'
    result = subprocess.run(["bash", "-c", shell], cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "line\n", "")


def test_files_are_whole_or_as_before(tmp_path: Path):
    first, second = tmp_path / "a.json", tmp_path / "b.txt"
    write_json(first, {"名": 1})
    before = hash_file(first)
    with pytest.raises(RuntimeError), whole_files(first, second) as files:
        files[0].write("half")
        raise RuntimeError
    assert hash_file(first) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_symbolic_link_is_replaced_and_not_written_through(tmp_path: Path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("kept")
    link.symlink_to(target)
    write_json(link, 1)
    assert target.read_text() == "kept"
    assert not link.is_symlink()
    assert link.read_text() == "1\n"


def test_folders_are_whole_or_as_before(tmp_path: Path):
    folder = tmp_path / "result"
    with whole_folder(folder) as partial:
        (partial / "x").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(folder) as partial:
        (partial / "x").write_text("2")
        raise RuntimeError
    assert (folder / "x").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_tables_line_up_with_chinese_in_them():
    rows = [{"名称": "皮卡丘", "n": 3, "share": "97.0%"}, {"名称": "a", "n": 12, "share": "1%"}]
    assert format_table(rows).splitlines() == [
        "名称     n  share",
        "------  --  -----",
        "皮卡丘   3  97.0%",
        "a       12  1%",
    ]
    assert "皮\\|卡" in format_table([{"x": "皮|卡"}], "github")


def test_near_words_are_offered_and_far_ones_not():
    assert "'--model'" in did_you_mean("--modle", ["--model", "--seed"])
    assert did_you_mean("--dev_ratio", ["--do_train", "--do_eval"]) == ""
