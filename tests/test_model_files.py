"""Model folders that cannot be used, and what the programs say of them from the shell."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from training_helpers import write_conversations


@pytest.mark.parametrize("tokenizer", ["no/model", "/no/such/model"])
def test_a_tokenizer_that_is_nowhere_is_explained_in_one_line(tmp_path, tokenizer):
    data = write_conversations(tmp_path / "rows.jsonl", rows=2)
    script = REPOSITORY / "finetune_chatmodel_demo" / "inspect_data.py"
    argv = [sys.executable, script, "--train_file", data, "--tokenizer", tokenizer]
    completed = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert completed.returncode == 1
    expected = (
        "there is no such folder, and as a name" if tokenizer == "no/model" else "is not a folder. THUDM/README.md"
    )
    assert completed.stderr.startswith("inspect_data.py: --tokenizer: ")
    assert expected in completed.stderr and completed.stderr.count("\n") == 1


def test_an_error_comes_without_warnings_of_optional_packages():
    script = REPOSITORY / "finetune_chatmodel_demo" / "finetune.py"
    completed = subprocess.run([sys.executable, script, "--stage", "sftt"], capture_output=True, text=True)
    assert completed.stdout == ""
    assert completed.stderr.startswith("finetune.py: error: argument --stage: invalid choice: 'sftt'")
