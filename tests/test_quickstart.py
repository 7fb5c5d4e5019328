"""What quickstart.sh and test.sh say when they cannot start. (.ci/run runs both for real.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from scripts.check_requirements import find_missing


def run_script(name: str, cwd: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    """A script in this Python's environment, unless VENV says otherwise; it is expected to fail."""
    private = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON")
    inherited = {key: value for key, value in os.environ.items() if key not in private}
    result = subprocess.run(
        ["bash", str(REPOSITORY / "scripts" / name)],
        cwd=cwd,
        env=inherited | {"VENV": sys.prefix} | knobs,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    return result


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_a_python_that_is_too_old(script: str, tmp_path: Path):
    old = write_program(tmp_path / "python3.8", 'test "$1" = --version && echo "Python 3.8.18" && exit 0\nexit 1')
    result = run_script(script, tmp_path, PYTHON=str(old), VENV=str(tmp_path / "venv"))
    assert f"error: PYTHON={old} is not a Python of version 3.10 or newer (Python 3.8.18)" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_no_room_for_the_installation(tmp_path: Path):
    write_program(tmp_path / "bin" / "df", "printf 'Filesystem\\nx 0 0 512000 0%% /\\n'")
    result = run_script("test.sh", tmp_path, VENV=str(tmp_path / "venv"), PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert f"error: {tmp_path} has 500 MiB free, and the installation needs at least 2,048" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_venv_cannot_be_made(tmp_path: Path):
    base = write_program(tmp_path / "python3", 'test "$1" = -c && exit 0\necho "no ensurepip" >&2\nexit 1')
    result = run_script("test.sh", tmp_path, PYTHON=str(base), VENV=str(tmp_path / "venv"))
    assert "no ensurepip" in result.stderr
    assert f"error: {base} cannot make a virtual environment; on Debian and Ubuntu: apt-get install" in result.stderr


def test_pip_fails(tmp_path: Path):
    write_program(tmp_path / "venv" / "bin" / "python", 'test "$2" = pip && echo "pip was asked: $*"\nexit 1')
    result = run_script("test.sh", tmp_path, VENV=str(tmp_path / "venv"), PIP_ARGS="--no-index --quiet")
    requirements = [f"-r {REPOSITORY}/{name}" for name in ("requirements.txt", "requirements-dev.txt")]
    arguments = f"-m pip install --no-index --quiet {' '.join(requirements)} -c {REPOSITORY}/constraints.txt"
    assert f"pip was asked: {arguments}" in result.stdout
    assert "error: pip could not install the packages (see above)" in result.stderr


def test_no_model(tmp_path: Path):
    result = run_script("quickstart.sh", tmp_path, BASE_MODEL_PATH="nowhere", OUTPUT_DIR=str(tmp_path / "out"))
    assert "error: BASE_MODEL_PATH=nowhere is not a model folder; THUDM/README.md lists" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_output_folder_of_somebody_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    result = run_script("quickstart.sh", REPOSITORY, OUTPUT_DIR=str(tmp_path))
    assert f"error: OUTPUT_DIR={tmp_path} holds files that are not the quickstart's" in result.stderr
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("folder", ["/", ".", str(REPOSITORY)])
def test_folders_that_are_never_emptied(folder: str, tmp_path: Path):
    result = run_script("quickstart.sh", tmp_path, OUTPUT_DIR=folder)
    assert f"error: OUTPUT_DIR={folder} is emptied at the start; name a folder of its own" in result.stderr
    assert (REPOSITORY / "scripts" / "quickstart.sh").is_file()


def test_a_step_that_fails_is_named(tmp_path: Path):
    result = run_script("quickstart.sh", tmp_path, TEMPLATE="nowhere.yaml", OUTPUT_DIR=str(tmp_path / "out"))
    assert "nowhere.yaml" in result.stderr
    assert "error: step 2 (Data: CSV → conversations → JSON lines) failed; the message is above" in result.stderr


def test_missing_packages_are_named_with_what_is_there(tmp_path: Path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# comment\n\npytest>=1  # a remark\npytest>=1000\nno-such-package==1\n"
        'no-such-package==2; sys_platform == "nowhere"\n',
        encoding="utf-8",
    )
    missing = find_missing(requirements)
    assert missing == [f"pytest>=1000 (installed: {pytest.__version__})", "no-such-package==1 (not installed)"]
