"""The house itself: who may import whom, what lies at the top, what must never be written, scripts that parse."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

DEMO = "finetune_chatmodel_demo"
ENTRY_POINTS = "entry points"  # the programs in the folder itself, and one beside the data
QUESTION_BUILDER = REPOSITORY / "data_processing" / "question_builder.py"
# From the top down: a room may import rooms of larger numbers; `conversation` and `chatglm3` do not know each other.
LEVELS = {
    ENTRY_POINTS: -1,
    "training": 1,
    "evaluation": 2,
    "retrieval": 2,
    "data_processing": 3,
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
    "requirements-knowledge.txt",
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
    """`finetune_chatmodel_demo.training.trainer` → training; None outside of this project."""
    first = module.removeprefix(f"{DEMO}.").split(".")[0]
    if first in LEVELS:
        return first
    return ENTRY_POINTS if module.startswith(f"{DEMO}.") and (REPOSITORY / DEMO / f"{first}.py").is_file() else None


def files_of(room: str) -> list[Path]:
    if room == ENTRY_POINTS:
        return [*sorted((REPOSITORY / DEMO).glob("*.py")), QUESTION_BUILDER]
    folder = REPOSITORY / room if room == "data_processing" else REPOSITORY / DEMO / room
    return sorted({*folder.rglob("*.py")} - {QUESTION_BUILDER})


def file_of(module: str) -> Path | None:
    """The product file that holds a module or a name of it."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:length])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def find_circles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """Groups of files of which each reaches each other one through imports."""
    reached: dict[Path, set[Path]] = {}
    for start in graph:
        found, waiting = set(), [start]
        while waiting:
            for other in graph[waiting.pop()] - found:
                found.add(other)
                waiting.append(other)
        reached[start] = found
    circles = []
    for path in graph:
        circle = {other for other in reached[path] if path in reached[other]}
        if circle and circle not in circles:
            circles.append(circle)
    return circles


def test_no_files_import_each_other_in_a_circle():
    """Also not within functions or for annotations: whoever changes one file of a circle has to know all."""
    files = [path for room in LEVELS for path in files_of(room)]
    graph = {path: {file_of(module) for module in imported_modules(path)} & {*files} - {path} for path in files}
    circles = [{path.stem for path in circle} for circle in find_circles(graph)]
    assert circles == []


@pytest.mark.parametrize("room", LEVELS)
def test_imports_point_down_only(room: str):
    files = files_of(room)
    assert files
    for path in files:
        for module in imported_modules(path):
            other = room_of(module)
            is_allowed = other is None or (other == room != ENTRY_POINTS) or LEVELS[other] > LEVELS[room]
            assert is_allowed, f"{path.relative_to(REPOSITORY)} imports {module}: {room} is not above {other}"


def test_programs_elsewhere_do_not_import_entry_points():
    assert {f"{name}.py" for name in ("finetune", "inference", "inspect_data", "evaluate")} <= {
        path.name for path in files_of(ENTRY_POINTS)
    }
    for folder in ("THUDM", "scripts"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            used = {module for module in imported_modules(path) if room_of(module) == ENTRY_POINTS}
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
