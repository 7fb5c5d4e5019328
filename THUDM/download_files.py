"""What a downloaded file says about itself, what the download client has recorded about it, and the report on both.

Used by check_download.py. Reads headers and tables of contents only, never weights; `file_digest` alone reads whole
files. Nothing is unpickled but by torch with `weights_only=True`, onto the meta device.
"""

import hashlib
import math
import re
import subprocess
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import format_size, hash_file

OK, NOTE, FAIL = "ok", "note", "fail"
LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024
HUB_RECORDS = Path(".cache") / "huggingface" / "download"
CHECKSUM_FILE = "SHA256SUMS"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


class DamagedFileError(ValueError):
    """A file is not what its name says, or is not whole."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a weights file. `size` is in bytes."""

    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Recorded:
    """What a file should be. `algorithm`: sha256, or git (the sha1 of a git object). `size` in bytes, where known."""

    algorithm: str
    digest: str
    size: int | None
    source: str


def read_pointer(path: Path) -> Recorded | None:
    """The contents of a git-lfs pointer file, or None where `path` is anything else."""
    if path.stat().st_size > LARGEST_POINTER:
        return None
    return parse_pointer(path.read_bytes(), "git-lfs pointer")


def parse_pointer(content: bytes, source: str) -> Recorded | None:
    """See `read_pointer`."""
    if not content.startswith(LFS_POINTER_START):
        return None
    fields = dict(line.split(" ", 1) for line in content.decode("utf-8", "replace").splitlines() if " " in line)
    digest = fields.get("oid", "").removeprefix("sha256:").strip()
    size = fields.get("size", "").strip()
    return Recorded("sha256", digest, int(size) if size.isdigit() else None, source)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names, shapes and sizes of the tensors of a weights file.

    Raises:
        DamagedFileError: the file is cut off, empty, or something else altogether.
        ImportError: it is a `.bin` file, and torch is not installed.
    """
    with path.open("rb") as file:
        start = file.read(256).lstrip()
    if not start:
        raise DamagedFileError("it is empty; download it again")
    if start[:1] == b"<" or start[:9].lower() == b"<!doctype":
        raise DamagedFileError("it is a web page, not weights: the server sent a message instead; look into it")
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch_archive(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The header of a safetensors file; the library checks it against itself and the length of the file.

    Raises:
        DamagedFileError: the file is not whole.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: _describe(entry.get_shape(), entry.get_dtype()) for name, entry in entries.items()}
    except SafetensorError as error:
        raise DamagedFileError(f"it is cut off or damaged: {path.stat().st_size:,} bytes, {error}") from error


def _describe(shape: list[int], dtype: str) -> Tensor:
    bits = int(re.sub(r"\D.*", "", dtype.lstrip("BFIUOL")) or 8)  # F16, BF16, I64, F8_E4M3, BOOL
    return Tensor(tuple(shape), math.prod(shape) * bits // 8)


def read_torch_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` file of torch, which is a zip archive whose table of contents stands at the end.

    Raises:
        DamagedFileError: it is no whole archive, or holds no tensors.
        ImportError: torch is not installed.
    """
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        size = path.stat().st_size
        raise DamagedFileError(
            f"it is cut off, or no torch file: {size:,} bytes without a table of contents"
        ) from error
    if not any(name.endswith("data.pkl") for name in names):
        raise DamagedFileError(f"it is a zip archive, but not one of torch (it holds {', '.join(names[:3])})")
    try:
        state = torch.load(path, map_location="meta", mmap=True, weights_only=True)
        return {name: Tensor(tuple(value.shape), value.numel() * value.element_size()) for name, value in state.items()}
    except Exception as error:  # torch raises many kinds for a file that is not whole
        raise DamagedFileError(f"torch cannot read it: {str(error).splitlines()[0]}") from error


def find_damaged_record(path: Path) -> str | None:
    """Reads all of a `.bin` file and compares it with the checksums inside; the name of the first bad record."""
    with zipfile.ZipFile(path) as archive:
        try:
            return archive.testzip()
        except zipfile.BadZipFile as error:
            return str(error)


def file_digest(path: Path, algorithm: str) -> str:
    """The sha256 of a file, or the name that git gives it ("git")."""
    if algorithm == "sha256":
        return hash_file(path)
    content = path.read_bytes()  # git itself holds small files only
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def read_checksums(path: Path) -> dict[str, Recorded]:
    """A list as `sha256sum` writes it: file name → sha256.

    Raises:
        UserError: a line is something else.
    """
    recorded = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if not _SHA256.fullmatch(digest.lower()) or not name:
            raise UserError(f"{path} line {number}: expected a sha256 and a file name, got {line[:80]!r}")
        recorded[name] = Recorded("sha256", digest.lower(), None, path.name)
    return recorded


def find_recorded(path: Path) -> Recorded | None:
    """What the client that downloaded `path` has noted: Hugging Face's client, its cache, or git with git-lfs."""
    return _from_hub_records(path) or _from_hub_cache(path) or _from_git(path)


def _from_hub_records(path: Path) -> Recorded | None:
    """`hf download --local-dir` notes three lines a file: commit, etag, time. A large file's etag is its sha256."""
    notes = path.parent / HUB_RECORDS / f"{path.name}.metadata"
    if not notes.is_file():
        return None
    lines = notes.read_text(encoding="utf-8").splitlines()
    return _from_etag(lines[1].strip() if len(lines) > 1 else "", "the hub client's notes")


def _from_hub_cache(path: Path) -> Recorded | None:
    """In the hub's cache a snapshot's files are links to files that are named after their etag."""
    if not path.is_symlink() or path.resolve().parent.name != "blobs":
        return None
    return _from_etag(path.resolve().name, "the hub's cache")


def _from_etag(etag: str, source: str) -> Recorded | None:
    if _SHA256.fullmatch(etag):
        return Recorded("sha256", etag, None, source)
    return Recorded("git", etag, None, source) if _SHA1.fullmatch(etag) else None


def _from_git(path: Path) -> Recorded | None:
    """In a git clone, the commit holds a pointer for each file of git-lfs, and the object's name for the others."""
    if not (path.parent / ".git").exists():
        return None
    command = ["git", "-C", str(path.parent)]
    try:
        found = subprocess.run([*command, "rev-parse", f"HEAD:{path.name}"], capture_output=True, check=True)
        name = found.stdout.decode().strip()
        size = subprocess.run([*command, "cat-file", "-s", name], capture_output=True, check=True)
        if int(size.stdout) <= LARGEST_POINTER:
            content = subprocess.run([*command, "cat-file", "blob", name], capture_output=True, check=True).stdout
            if (pointer := parse_pointer(content, "git's commit")) is not None:
                return pointer
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
    return Recorded("git", name, int(size.stdout), "git's commit")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str
    subject: str
    message: str


@dataclass
class Report:
    """What was found in a folder."""

    folder: Path
    findings: list[Finding] = field(default_factory=list)

    def add(self, status: str, subject: str, message: str) -> None:
        """Adds one line."""
        self.findings.append(Finding(status, subject, message))

    @property
    def is_usable(self) -> bool:
        return not any(finding.status == FAIL for finding in self.findings)

    @property
    def verdict(self) -> str:
        problems = sum(finding.status == FAIL for finding in self.findings)
        if not problems:
            return f"{self.folder} is complete and can be used"
        return f"{self.folder} cannot be used: {problems} problem{'s' * (problems > 1)}, marked FAIL above"

    def to_json(self) -> dict[str, Any]:
        """The report for programs; `checks` in the order of the lines."""
        checks = [asdict(finding) for finding in self.findings]
        return {"folder": str(self.folder), "ok": self.is_usable, "verdict": self.verdict, "checks": checks}


def is_present(path: Path, report: Report) -> bool:
    """Is the file itself there, and not only its git-lfs pointer?"""
    if not path.is_file():
        report.add(FAIL, path.name, "missing; start the download again, clients continue where they stopped")
        return False
    if (pointer := read_pointer(path)) is not None:
        size = f" (the file has {format_size(pointer.size)})" if pointer.size else ""
        report.add(
            FAIL,
            path.name,
            f"only its git-lfs pointer is here{size}: run `git lfs install`, then `git lfs pull` in {path.parent}",
        )
        return False
    return True
