"""The READMEs: the same in both languages, commands that work, flags and paths that exist.

A fenced bash block is run when the line above it is `<!-- run -->`; all such blocks run in order, those of the front
page first, in one copy of the repository. The annotated tree is the block below `<!-- tree -->`.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import REPOSITORY

READMES = ("README.md", "README_zh.md")
# The inner ones hold both languages.
INNER = (
    "data_processing/README.md",
    "data_processing/datasets/README.md",
    "finetune_chatmodel_demo/README.md",
    "scripts/README.md",
    "tests/benchmarks/README.md",
    "THUDM/README.md",
)
LONGEST_FRONT_PAGE = 180
RUN, TREE = "<!-- run -->", "<!-- tree -->"
FENCE = re.compile(r"^(```+)(\w*)\s*$")
HEADING = re.compile(r"^#{1,6} ")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
# Top-level files that a reader need not be told about.
NOT_IN_TREE = {".gitattributes", ".gitignore"}


@dataclass(frozen=True)
class Block:
    """One fenced block. `marker` is the last line with text above it, behind the block before."""

    language: str
    text: str
    line: int
    marker: str


def read_blocks(readme: str) -> list[Block]:
    """All fenced blocks of a README, in order."""
    blocks: list[Block] = []
    fence, language, start, marker, collected = "", "", 0, "", []
    for number, line in enumerate((REPOSITORY / readme).read_text(encoding="utf-8").splitlines(), 1):
        if fence and line.strip() == fence:
            blocks.append(Block(language, "\n".join(collected) + "\n", start, marker))
            fence, collected, marker = "", [], ""
        elif fence:
            collected.append(line)
        elif found := FENCE.match(line):
            fence, language = found.groups()
            start = number
        elif line.strip():
            marker = line.strip()
    assert not fence, f"{readme} line {start}: the block is not closed"
    return blocks


def without_comments(block: Block) -> str:
    """Commands alone: comments may be translated."""
    lines = [re.sub(r"(^|\s)#.*$", "", line).rstrip() for line in block.text.splitlines()]
    return "\n".join(line for line in lines if line)


def commands(readme: str) -> list[tuple[int, list[str]]]:
    """(line, words) of every command in the bash blocks; lines that end in a backslash are joined."""
    found = []
    for block in read_blocks(readme):
        if block.language == "bash":
            joined = without_comments(block).replace("\\\n", " ")
            found += [(block.line, shlex.split(line)) for line in joined.splitlines()]
    return found


def test_the_same_commands_in_both():
    english, chinese = ([without_comments(b) for b in read_blocks(name) if b.language == "bash"] for name in READMES)
    assert english
    assert english == chinese


def test_the_same_structure_in_both():
    def outline(readme: str) -> list[str]:
        kept, fence = [], ""
        for line in (REPOSITORY / readme).read_text(encoding="utf-8").splitlines():
            if found := FENCE.match(line):
                fence = "" if fence else found.group(1)
            elif not fence and (found := HEADING.match(line)):
                kept.append(found.group())
        return kept

    english, chinese = map(outline, READMES)
    assert len(english) > 5
    assert english == chinese


@pytest.mark.parametrize("readme", READMES)
def test_the_front_page_is_short(readme: str):
    assert len((REPOSITORY / readme).read_text(encoding="utf-8").splitlines()) <= LONGEST_FRONT_PAGE


def test_every_readme_is_tested():
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "*README*.md"], capture_output=True, text=True)
    assert {*READMES, *INNER, "THUDM/chatglm3-tiny/README.md"} == set(listed.stdout.split())


@pytest.mark.parametrize("readme", [*READMES, *INNER])
def test_links_lead_somewhere(readme: str):
    path = REPOSITORY / readme
    targets = LINK.findall(path.read_text(encoding="utf-8"))
    assert targets or readme in INNER
    assert [target for target in targets if not (path.parent / target).exists()] == []


def tree_paths(block: Block) -> list[str]:
    """Paths of an annotated tree that is indented by two spaces a level; text behind two spaces is a remark."""
    folders: list[str] = []
    paths = []
    for line in block.text.splitlines():
        depth = (len(line) - len(line.lstrip(" "))) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folders = folders[:depth]
        paths += ["/".join([*folders, name.rstrip("/")]) for name in names]
        if names and names[0].endswith("/"):
            folders.append(names[0].rstrip("/"))
    return paths


@pytest.mark.parametrize("readme", READMES)
def test_the_tree_is_the_repository(readme: str):
    (block,) = [block for block in read_blocks(readme) if block.marker == TREE]
    paths = tree_paths(block)
    assert [path for path in paths if not any(REPOSITORY.glob(path))] == []
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files"], capture_output=True, text=True, check=True)
    top_level = {line.split("/")[0] for line in listed.stdout.splitlines()} - NOT_IN_TREE
    assert top_level <= {path.split("/")[0] for path in paths}


@functools.cache
def help_of(program: str, *subcommand: str) -> str:
    """What `--help` prints, with all flags of transformers for finetune.py; plan_memory.py takes its flags as well."""
    flag = "--help_all" if program.endswith("finetune.py") else "--help"
    command = [sys.executable, str(REPOSITORY / program), *subcommand, flag]
    text = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout
    return text + (help_of("finetune_chatmodel_demo/finetune.py") if program.endswith("plan_memory.py") else "")


@pytest.mark.parametrize("readme", [READMES[0], *INNER])
def test_programs_and_flags_exist(readme: str):
    for line, words in commands(readme):
        for program in (word for word in words if word.endswith((".py", ".sh"))):
            path = program.removeprefix("./")
            candidates = [path, f"finetune_chatmodel_demo/{path}"]  # commands inside the folder, as upstream has them
            existing = [name for name in candidates if (REPOSITORY / name).is_file()]
            assert existing, f"{readme} line {line}: {program} does not exist"
            if not program.endswith(".py"):
                continue
            subcommand = words[words.index(program) + 1 :][:1] if program.endswith("knowledge_base.py") else ()
            for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
                pattern = rf"(?<![\w-]){re.escape(flag)}(?![\w-])"
                assert re.search(pattern, help_of(existing[0], *subcommand)), (
                    f"{readme} line {line}: {program} has no {flag}"
                )


def environment_of(copy: Path) -> dict[str, str]:
    """This Python's programs first; nothing leads to the original repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    environment["OMP_NUM_THREADS"] = "1"
    return environment


def blocks_to_run() -> list[tuple[str, Block]]:
    """(README, block) in reading order; a block that stands in several places is there once."""
    found = {}
    for readme in (READMES[0], *INNER):
        for block in read_blocks(readme):
            if block.marker == RUN:
                found.setdefault(block.text, (readme, block))
    return list(found.values())


def test_marked_commands_run(tmp_path: Path):
    blocks = blocks_to_run()
    assert {"README.md", "finetune_chatmodel_demo/README.md"} <= {readme for readme, _ in blocks}
    copy = tmp_path / "copy"
    listed = subprocess.run(["git", "-C", str(REPOSITORY), "ls-files", "-z"], capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, copy / name)
    for readme, block in blocks:
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=copy,
            env=environment_of(copy),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        assert result.returncode == 0, f"{readme} line {block.line}\n{block.text}{result.stdout}{result.stderr}"
