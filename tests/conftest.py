"""Fixtures shared by the rooms' tests: golden data, the official tokenizer (where there is one), small models."""

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
OFFICIAL_TOKENIZER_VARIABLE = "CHATGLM3_TOKENIZER"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


HELP = """
import runpy, sys
program, *heavy = sys.argv[1:]
sys.argv = [program, "--help"]
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
else:
    raise AssertionError("--help went on")
print(sorted(sys.modules.keys() & set(heavy)))
"""


def read_light_help(program: Path, folder: Path, *others: str) -> str:
    """What `python PROGRAM --help` prints in `folder`; it must import no torch, no transformers, none of `others`."""
    command = [sys.executable, "-c", HELP, program, "torch", "transformers", *others]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    return "\n".join(lines)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of what the original ChatGLM3 code computed."""
    return GOLDEN


@pytest.fixture(scope="session")
def official_tokenizer_folder() -> Path:
    """Folder with the official `tokenizer.model`; skips the test where it is absent."""
    candidates = [os.environ.get(OFFICIAL_TOKENIZER_VARIABLE), REPOSITORY / "THUDM" / "chatglm3-6b"]
    for folder in filter(None, candidates):
        if (Path(folder) / "tokenizer.model").is_file():
            return Path(folder)
    pytest.skip(
        f"the official tokenizer.model is not in THUDM/chatglm3-6b/, and {OFFICIAL_TOKENIZER_VARIABLE} names no "
        "folder that holds it"
    )


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The embedded default, `THUDM/chatglm3-tiny` (official layout, own vocabulary)."""
    folder = REPOSITORY / "THUDM" / "chatglm3-tiny"
    assert (folder / "tokenizer.model").is_file(), f"{folder} is incomplete: no tokenizer.model"
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path):
    """The embedded default's tokenizer."""
    from finetune_chatmodel_demo.chatglm3 import load_tokenizer

    return load_tokenizer(tiny_folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Folder of a random model of 2 layers with its tokenizer; all tests read the same one, so none writes into it."""
    from training_helpers import make_model

    return make_model(tmp_path_factory.mktemp("model"), tiny_folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of 24 conversations; all tests read the same one, so none writes into it."""
    from training_helpers import write_conversations

    return write_conversations(tmp_path_factory.mktemp("data") / "train.jsonl")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tokenizer) -> Path:
    """Folder of a random model whose greedy replies are clear-cut; all tests read the same one, so none changes it."""
    from generation_helpers import build_random_folder

    return build_random_folder(tmp_path_factory.mktemp("base"), tiny_folder, tokenizer.vocab_size)


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Folder of a random prefix for `base` that changes every reply; read only, as `base` is."""
    from generation_helpers import build_prefix_folder

    return build_prefix_folder(
        tmp_path_factory.mktemp("prefix"), base, base_model=str(base), prompt_format="multi-turn"
    )


@pytest.fixture(scope="module")
def prefix_model(base: Path, prefix: Path):
    """`base` with `prefix`, loaded anew for each module."""
    from finetune_chatmodel_demo.chatglm3 import load_model

    return load_model(base, pt_checkpoint=prefix, device="cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads: for tests that compare bits, and for speed on small models."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # every run collects garbage, half a second with all of transformers loaded
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss curve takes longer than a run of a small model."""
    from finetune_chatmodel_demo.training import trainer

    monkeypatch.setattr(trainer, "plot_curves", lambda *_: None)
