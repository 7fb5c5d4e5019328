"""The house itself: who may import whom, what lies at the top, what must never be written, scripts that parse."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

DEMO = "finetune_chatmodel_demo"
# From the top down: a room may import rooms of larger numbers; `conversation` and `chatglm3` do not know each other.
LEVELS = {
    "data_processing": 0,
    "training": 1,
    "evaluation": 2,
    "generation": 3,
    "conversation": 4,
    "chatglm3": 4,
    "common": 5,
}
TOP_LEVEL = {
    ".ci",
    ".gitattributes",
    ".gitignore",
    "LICENSE",
    "NOTICE",
    "README.md",
    "README_zh.md",
    "THUDM",
    "constraints.txt",
    "data_processing",
    DEMO,
    "pyproject.toml",
    "requirements-dev.txt",
    "requirements.txt",
    "scripts",
    "tests",
}
LARGEST_FILE = 10 * 2**20
# Put together from pieces, or this file would hold them.
FORBIDDEN = {
    "remote code is never run": "trust_remote_code" + r"\s*=\s*True",
    "pickles are read with weights_only=True": r"torch\.load" + r"\((?!.*weights_only=True)",
    "no absolute paths of one machine": r"(?<![\w.])/work/" + r"\w",
}


def tracked_files() -> list[str]:
    """Paths of the files that git tracks; all files of the folder where this is no checkout."""
    found = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True)
    if found.returncode != 0:
        pytest.skip("this folder is not a git checkout")
    return [name for name in found.stdout.decode().split("\0") if name and (REPOSITORY / name).is_file()]


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} line {node.lineno}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    """`finetune_chatmodel_demo.training.trainer` → training; None outside of the rooms."""
    parts = module.removeprefix(f"{DEMO}.").split(".")
    return parts[0] if parts[0] in LEVELS else None


@pytest.mark.parametrize("room", LEVELS)
def test_imports_point_down_only(room: str):
    folder = REPOSITORY / room if room == "data_processing" else REPOSITORY / DEMO / room
    files = sorted(folder.rglob("*.py"))
    assert files
    for path in files:
        for module in imported_modules(path):
            other = room_of(module)
            is_allowed = other in (None, room) or LEVELS[other] > LEVELS[room]
            assert is_allowed, f"{path.relative_to(REPOSITORY)} imports {module}: {room} is not above {other}"


def test_entry_points_are_imported_by_nobody_but_tests():
    entries = {path.stem for path in (REPOSITORY / DEMO).glob("*.py")} - {"__init__"}
    assert {"finetune", "inference", "inspect_data", "evaluate"} <= entries
    for folder in (DEMO, "data_processing", "THUDM", "scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            entry_modules = {f"{DEMO}.{entry}" for entry in entries}
            used = {module for module in imported_modules(path) if module.startswith(tuple(entry_modules))}
            assert not used, f"{path.relative_to(REPOSITORY)} imports {used}"


def test_top_level():
    assert {Path(name).parts[0] for name in tracked_files()} <= TOP_LEVEL


def test_no_large_files():
    assert [name for name in tracked_files() if (REPOSITORY / name).stat().st_size > LARGEST_FILE] == []


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_words_that_must_not_be_here(rule: str):
    pattern = re.compile(FORBIDDEN[rule])
    found = []
    for name in tracked_files():
        try:
            text = (REPOSITORY / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name} line {n}" for n, line in enumerate(text.splitlines(), 1) if pattern.search(line)]
    assert found == []


def shell_scripts() -> list[Path]:
    return [*sorted((REPOSITORY / "scripts").glob("*.sh")), REPOSITORY / ".ci" / "run"]


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: path.name)
def test_shell_scripts_that_are_run_are_executable(script: Path):
    is_library = not script.read_text(encoding="utf-8").startswith("#!")
    assert is_library or script.stat().st_mode & 0o111, f"chmod +x {script}"


def test_requirements_and_constraints_name_the_same_packages():
    def names(file: str) -> set[str]:
        lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
        return {re.split(r"[=<>;\s]", line)[0].lower() for line in lines if line and not line.startswith("#")}

    assert names("requirements.txt") | names("requirements-dev.txt") <= names("constraints.txt")
    assert "torch==2.13.0" in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("package", ["deepspeed", "bitsandbytes"])
def test_packages_for_linux_alone_are_marked(package: str):
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (line,) = [line for line in lines if line.startswith(package)]
    assert line.endswith('; sys_platform == "linux"')
