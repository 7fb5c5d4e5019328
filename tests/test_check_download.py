"""THUDM/check_download.py on folders made here: whole ones, and each kind of damage that users have met."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import REPOSITORY
from safetensors.torch import save_file

from THUDM import check_download
from THUDM.check_download import check_folder
from THUDM.download_files import FAIL, NOTE, OK, Report, file_digest, find_recorded, read_checksums, read_pointer

BIN = "pytorch_model-0000{}-of-00002.bin"
SAFE = "model-0000{}-of-00002.safetensors"


@pytest.fixture(scope="module")
def whole(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole download of 3 layers, as .bin, with a vocabulary that is trained here."""
    folder = tmp_path_factory.mktemp("whole") / "bin"
    shutil.copytree(golden / "tiny_chatglm3", folder)
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"pika {i} chu {i * i} 皮卡丘" for i in range(200)), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=48, minloglevel=2
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole_safetensors(whole: Path) -> Path:
    """The same weights as safetensors."""
    folder = whole.with_name("safetensors")
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("pytorch_model*"))
    index = json.loads((whole / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    for number in (1, 2):
        save_file(torch.load(whole / BIN.format(number), weights_only=True), folder / SAFE.format(number))
    names = {BIN.format(number): SAFE.format(number) for number in (1, 2)}
    index["weight_map"] = {tensor: names[shard] for tensor, shard in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture
def download(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole .bin folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "bin"))


@pytest.fixture
def safetensors_download(whole_safetensors: Path, tmp_path: Path) -> Path:
    """A copy of the whole safetensors folder, to be damaged."""
    return Path(shutil.copytree(whole_safetensors, tmp_path / "safetensors"))


def failures(report: Report) -> list[tuple[str, str]]:
    return [(finding.subject, finding.message) for finding in report.findings if finding.status == FAIL]


def lines(report: Report, status: str) -> list[str]:
    return [f"{finding.subject}: {finding.message}" for finding in report.findings if finding.status == status]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_pointer(path: Path, digest: str = "ab" * 32, size: int = 1_827_781_090) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def test_a_whole_bin_folder(whole: Path):
    report = check_folder(whole)
    assert failures(report) == []
    assert report.verdict == f"{whole} is complete and can be used"
    found = lines(report, OK)
    assert "config.json: ChatGLM, 3 layers of width 64, vocabulary 512, up to 256 tokens" in found
    assert "pytorch_model.bin.index.json: 25 tensors in 2 shards, 818.4 kB" in found
    assert "size: 818,448 bytes of tensors, the index says 818,448" in found
    assert "tensors: all 24, in the shapes that config.json says" in found
    assert "tokenizer.model: loads, 48 pieces" in found
    assert sum("contents agree with the checksums inside" in line for line in found) == 2


def test_a_whole_safetensors_folder(whole_safetensors: Path):
    report = check_folder(whole_safetensors)
    assert failures(report) == []
    assert "tensors: all 24, in the shapes that config.json says" in lines(report, OK)
    (unknown,) = lines(report, NOTE)
    assert unknown.startswith(
        f"sha256: nothing to compare with for {SAFE.format(1)}, {SAFE.format(2)}, tokenizer.model"
    )


def test_one_file_without_an_index(whole_safetensors: Path, tmp_path: Path, golden: Path):
    folder = tmp_path / "single"
    shutil.copytree(whole_safetensors, folder, ignore=shutil.ignore_patterns("model*"))
    state = {}
    for shard in (1, 2):
        state |= torch.load(golden / "tiny_chatglm3" / BIN.format(shard), weights_only=True)
    save_file(state, folder / "model.safetensors")
    assert failures(check_folder(folder)) == []


def test_the_embedded_model_is_whole(tiny_folder: Path):
    report = check_folder(tiny_folder)
    assert failures(report) == []


def test_the_official_vocabulary_has_the_known_sha256(official_tokenizer_folder: Path, download: Path):
    shutil.copy(official_tokenizer_folder / "tokenizer.model", download)
    edit_json(download / "config.json", lambda config: config.update(padded_vocab_size=65024))
    report = check_folder(download)
    expected = "tokenizer.model: sha256 e7dc4c39…a6f2 as in the official ChatGLM3-6B"
    assert expected in lines(report, OK)


DAMAGES = {
    "no folder": (lambda folder: shutil.rmtree(folder), "folder", "there is no such folder"),
    "shard missing": (lambda folder: (folder / BIN.format(2)).unlink(), BIN.format(2), "missing"),
    "shard cut off": (lambda folder: cut(folder / BIN.format(1), 200_000), BIN.format(1), "cut off"),
    "shard empty": (lambda folder: cut(folder / BIN.format(1), 0), BIN.format(1), "it is empty"),
    "pointer": (lambda folder: write_pointer(folder / BIN.format(1)), BIN.format(1), "git lfs pull"),
    "web page": (
        lambda folder: (folder / BIN.format(1)).write_text("<!DOCTYPE html><title>429</title>", encoding="utf-8"),
        BIN.format(1),
        "it is a web page",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("pytorch_model*")],
        "weights",
        "(found: config.json, tokenizer.model, tokenizer_config.json); download them",
    ),
    "index is no JSON": (
        lambda folder: cut(folder / "pytorch_model.bin.index.json", 100),
        "pytorch_model.bin.index.json",
        "it is no index of weights",
    ),
    "index of another download": (
        lambda folder: edit_json(
            folder / "pytorch_model.bin.index.json",
            lambda index: index["weight_map"].update({"transformer.output_layer.weight": BIN.format(1)}),
        ),
        "index",
        "1 tensors are elsewhere (transformer.output_layer.weight is not in pytorch_model-00001-of-00002.bin)",
    ),
    "more bytes promised": (
        lambda folder: edit_json(
            folder / "pytorch_model.bin.index.json", lambda index: index["metadata"].update(total_size=900_000)
        ),
        "size",
        "818,448 bytes of tensors, the index says 900,000",
    ),
    "more layers in the configuration": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(num_layers=4)),
        "tensors",
        "7 of 31 are missing (transformer.encoder.layers.3.input_layernorm.weight)",
    ),
    "other width in the configuration": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(multi_query_group_num=1)),
        "tensors",
        "query_key_value.weight is (128, 64), config.json says (96, 64)",
    ),
    "another model": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(model_type="llama")),
        "config.json",
        "model_type is 'llama'",
    ),
    "the first ChatGLM": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.pop("num_layers")),
        "config.json",
        "this looks like the first ChatGLM-6B",
    ),
    "config.json is no JSON": (lambda folder: cut(folder / "config.json", 30), "config.json", "it is no JSON"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model", "missing"),
    "tokenizer cut off": (
        lambda folder: cut(folder / "tokenizer.model", 5000),
        "tokenizer.model",
        "SentencePiece cannot read it",
    ),
    "larger tokenizer": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(padded_vocab_size=47)),
        "tokenizer.model",
        "48 pieces, the model has only 47",
    ),
    "not the official tokenizer": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(padded_vocab_size=65024)),
        "tokenizer.model",
        "the official ChatGLM3-6B says e7dc4c39",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, download: Path):
    spoil, subject, message = DAMAGES[damage]
    spoil(download)
    report = check_folder(download)
    assert not report.is_usable
    assert "cannot be used" in report.verdict
    assert any(where == subject and message in text for where, text in failures(report)), failures(report)


def test_a_changed_byte_in_a_bin_file_is_found_by_its_own_checksum(download: Path):
    path = download / BIN.format(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert failures(check_folder(download, is_quick=True)) == []
    ((subject, message),) = failures(check_folder(download))
    assert subject == BIN.format(1)
    assert message.startswith("damaged at ")


@pytest.mark.parametrize("size", [4, 300, 300_000])
def test_a_safetensors_shard_that_is_cut_off(size: int, safetensors_download: Path):
    cut(safetensors_download / SAFE.format(2), size)
    ((subject, text),) = failures(check_folder(safetensors_download))
    assert subject == SAFE.format(2)
    assert f"cut off or damaged: {size:,} bytes" in text and "download it again" in text


def test_a_safetensors_shard_with_something_behind_it(safetensors_download: Path):
    with (safetensors_download / SAFE.format(1)).open("ab") as file:
        file.write(b"\0")
    ((subject, message),) = failures(check_folder(safetensors_download))
    assert subject == SAFE.format(1) and "damaged" in message


def test_the_other_format_is_pointed_at(download: Path, whole_safetensors: Path):
    shutil.copytree(whole_safetensors, download, dirs_exist_ok=True)
    (download / SAFE.format(1)).unlink()
    report = check_folder(download)
    assert not report.is_usable
    expected = "pytorch_model.bin.index.json: these weights are whole, and used as soon as model.safetensors.index.json"
    assert any(line.startswith(expected) for line in lines(report, NOTE))
    (download / "model.safetensors.index.json").unlink()
    assert failures(check_folder(download)) == []


def test_space_for_what_is_missing(download: Path, monkeypatch: pytest.MonkeyPatch):
    write_pointer(download / BIN.format(2))
    cut(download / BIN.format(1), 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    assert ("disk", "818.4 kB are still to come, 5.0 kB are free; make room first") in failures(check_folder(download))


def test_the_pointer_says_what_is_missing(tmp_path: Path):
    write_pointer(tmp_path / "pointer")
    pointer = read_pointer(tmp_path / "pointer")
    assert pointer is not None
    assert (pointer.digest, pointer.size) == ("ab" * 32, 1_827_781_090)
    (tmp_path / "small").write_text("nothing like it", encoding="utf-8")
    assert read_pointer(tmp_path / "small") is None


def hub_record(folder: Path, name: str, etag: str) -> None:
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True, exist_ok=True)
    (notes / f"{name}.metadata").write_text(f"{'c' * 40}\n{etag}\n1700000000.0\n", encoding="utf-8")


def test_hashes_that_the_hub_client_noted(safetensors_download: Path):
    folder = safetensors_download
    good = hashlib.sha256((folder / SAFE.format(1)).read_bytes()).hexdigest()
    hub_record(folder, SAFE.format(1), good)
    hub_record(folder, SAFE.format(2), "0" * 64)
    report = check_folder(folder)
    expected = f"{SAFE.format(1)}: sha256 {good[:8]}…{good[-4:]} as in the hub client's notes"
    assert expected in lines(report, OK)
    ((subject, message),) = failures(report)
    assert subject == SAFE.format(2)
    assert f"the hub client's notes says {'0' * 64}" in message
    assert failures(check_folder(folder, is_quick=True)) == []


def test_an_edited_configuration_is_a_note(download: Path):
    digest = file_digest(download / "config.json", "git")
    hub_record(download, "config.json", digest)
    assert any("config.json: git's sha1" in line for line in lines(check_folder(download), OK))
    edit_json(download / "config.json", lambda config: config.update(seq_length=4096))
    report = check_folder(download)
    assert report.is_usable
    assert any(line.startswith("config.json: differs from the hub client's notes") for line in lines(report, NOTE))


def test_unfinished_files_of_the_hub_client(download: Path):
    hub_record(download, "config.json", "not an etag that is known")
    (download / ".cache" / "huggingface" / "download" / "x.abc.incomplete").write_bytes(b"1234567")
    expected = "download: 1 unfinished file(s), 7 bytes: the same command continues them"
    assert expected in lines(check_folder(download), NOTE)


def test_the_hub_cache_names_files_by_hash(tmp_path: Path):
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "blobs" / digest).write_bytes(content)
    link = tmp_path / "snapshot" / "model.safetensors"
    link.symlink_to(tmp_path / "blobs" / digest)
    recorded = find_recorded(link)
    assert recorded is not None
    assert (recorded.algorithm, recorded.digest) == ("sha256", digest)


def test_the_commit_of_a_git_clone_knows_hashes(download: Path):
    """git-lfs commits pointers, and leaves the real files in the folder."""
    shard = download / BIN.format(1)
    content = shard.read_bytes()
    write_pointer(shard, hashlib.sha256(content).hexdigest(), len(content))

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.autocrlf=false")
        subprocess.run(["git", "-C", str(download), *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "download")
    shard.write_bytes(content)
    found = lines(check_folder(download), OK)
    assert any(line.startswith(f"{shard.name}: sha256 ") and line.endswith("git's commit") for line in found)
    assert any(line.startswith("config.json: git's sha1 ") for line in found)
    shard.write_bytes(content[:-1] + b"?")
    assert any("git's commit says" in message for _, message in failures(check_folder(download)))


def test_a_list_of_checksums(download: Path, tmp_path: Path):
    names = [BIN.format(1), BIN.format(2), "tokenizer.model"]
    sums = {name: hashlib.sha256((download / name).read_bytes()).hexdigest() for name in names}
    listing = download / "SHA256SUMS"
    listing.write_text("".join(f"{digest} *./{name}\n" for name, digest in sums.items()), encoding="utf-8")
    report = check_folder(download)
    assert report.is_usable
    assert sum(line.endswith("as in SHA256SUMS") for line in lines(report, OK)) == 3
    other = tmp_path / "other.txt"
    other.write_text(f"# mirrors\n{'1' * 64}  tokenizer.model\n", encoding="utf-8")
    ((subject, message),) = failures(check_folder(download, checksums=other))
    assert subject == "tokenizer.model"
    assert f"sha256 is {sums['tokenizer.model']}, other.txt says {'1' * 64}" in message


def test_a_list_that_is_no_list(tmp_path: Path):
    (tmp_path / "list").write_text("config.json 5f\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list line 1: expected a sha256 and a file name, got 'config.json 5f'"):
        read_checksums(tmp_path / "list")


def test_the_exit_code_and_the_json(download: Path, capsys: pytest.CaptureFixture[str]):
    assert check_download.main([str(download), "--json", "--quick"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["folder"] == str(download)
    assert {check["status"] for check in report["checks"]} == {"ok"}
    (download / BIN.format(2)).unlink()
    assert check_download.main([str(download), "--quick"]) == 1
    printed = capsys.readouterr().out
    assert f"[ FAIL ] {BIN.format(2)}: missing" in printed
    assert printed.splitlines()[-1] == f"verdict: {download} cannot be used: 1 problem, marked FAIL above"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_download.main([str(download), "--sha256", str(download / "nowhere")])


def test_as_a_program_from_another_folder(download: Path, tmp_path: Path):
    program = REPOSITORY / "THUDM" / "check_download.py"
    result = subprocess.run(
        [sys.executable, str(program), download.name, "--quick"],
        cwd=download.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "verdict: bin is complete and can be used"
