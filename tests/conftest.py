"""Fixtures shared by the rooms' tests: golden data, the official tokenizer (where there is one), small models."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
OFFICIAL_TOKENIZER_VARIABLE = "CHATGLM3_TOKENIZER"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


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
