"""The report on a download: lines with a status, and the verdict that follows from them. Used by check_download.py."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from THUDM.download_files import read_pointer

OK, NOTE, FAIL = "ok", "note", "fail"


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


def format_size(size: int) -> str:
    """Bytes in a unit that suits them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
