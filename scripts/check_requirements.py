"""Are the packages of requirements files installed? `python scripts/check_requirements.py requirements.txt`

Prints what is missing; exit code 0 when nothing is. Uses the standard library and pip's own parser, and imports none of
the packages, so that it answers at once.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]


def find_missing(path: Path) -> list[str]:
    """What of a requirements file is not installed, each with the version that is there instead."""
    missing = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text:
            continue
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append(f"{text} (not installed)")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            missing.append(f"{text} (installed: {installed})")
    return missing


def main() -> int:
    """Check the files named on the command line, relative to the repository."""
    missing = [entry for name in sys.argv[1:] for entry in find_missing(REPOSITORY / name)]
    if missing:
        print("missing packages: " + ", ".join(missing))
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
