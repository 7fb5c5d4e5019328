"""What a downloaded file says about itself, and what the download client has recorded about it.

Used by check_download.py. Reads headers and tables of contents only, never weights; `file_digest` alone reads whole
files. Nothing is unpickled but by torch with `weights_only=True`, onto the meta device.
"""

import hashlib
import json
import math
import re
import struct
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"
LARGEST_POINTER = 1024
HUB_RECORDS = Path(".cache") / "huggingface" / "download"
CHECKSUM_FILE = "SHA256SUMS"
LARGEST_HEADER = 100_000_000  # the safetensors format's own limit
DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
CHUNK = 16 * 2**20

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
    """The header of a safetensors file, checked against itself and against the length of the file.

    The format: 8 bytes with the header's length, the header as JSON, then the data without holes.

    Raises:
        DamagedFileError: any of that does not hold.
    """
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= LARGEST_HEADER:
            raise DamagedFileError(f"it does not start like a safetensors file (header of {length} bytes)")
        if 8 + length > file_size:
            raise DamagedFileError(f"it is cut off in its header: {file_size:,} of at least {8 + length:,} bytes")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise DamagedFileError(f"its header is no JSON ({error})") from error
    try:
        tensors = _read_entries(header)
    except DamagedFileError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFileError(f"its header is not that of a safetensors file ({error!r})") from error
    end = sum(tensor.size for tensor in tensors.values())
    if file_size != 8 + length + end:
        what = "cut off" if file_size < 8 + length + end else "too long"
        raise DamagedFileError(f"it is {what}: {file_size:,} bytes, its header promises {8 + length + end:,}")
    return tensors


def _read_entries(header: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a safetensors header, in the order of the data, which has no holes."""
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        width = DTYPE_BYTES.get(entry["dtype"])
        if begin != end or (width is not None and stop - begin != width * math.prod(shape)):
            raise DamagedFileError(f"its header contradicts itself at {name}")
        end = stop
        tensors[name] = Tensor(shape, stop - begin)
    return tensors


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
    digest = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(usedforsecurity=False)
    if algorithm == "git":
        digest.update(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_checksums(path: Path) -> dict[str, Recorded]:
    """A list as `sha256sum` writes it: file name → sha256.

    Raises:
        ValueError: a line is something else.
    """
    recorded = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*").removeprefix("./")
        if not _SHA256.fullmatch(digest.lower()) or not name:
            raise ValueError(f"{path} line {number}: expected a sha256 and a file name, got {line[:80]!r}")
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
