"""Is a download of ChatGLM3 weights whole? `python THUDM/check_download.py THUDM/chatglm3-6b`

Prints one line a check and a verdict; exit code 0 means that the folder can be used, 1 that it cannot. No weights are
loaded. Hashes are compared wherever the download client recorded them (git-lfs, hub client), a file SHA256SUMS lies in
the folder, or --sha256 names a list; this reads every byte (`--quick` leaves it out).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the rooms are packages; this folder's own names are not

from finetune_chatmodel_demo.common.cli import EXIT_NO, run_program
from finetune_chatmodel_demo.common.files import format_size
from THUDM.download_files import (
    CHECKSUM_FILE,
    FAIL,
    HUB_RECORDS,
    NOTE,
    OK,
    Recorded,
    Report,
    file_digest,
    find_damaged_record,
    find_recorded,
    is_present,
    read_checksums,
)
from THUDM.download_weights import check_weights

HERE = Path(__file__).resolve().parent
CONFIG_NUMBERS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "multi_query_group_num",
    "padded_vocab_size",
)
# Of the tokenizer.model that the official ChatGLM3 models share.
OFFICIAL_TOKENIZER = "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"
OFFICIAL_VOCABULARY = 65024


def check_folder(folder: Path, *, checksums: Path | None = None, is_quick: bool = False) -> Report:
    """Runs every check.

    Args:
        checksums: a list of sha256 sums, which goes before what the download client recorded.
        is_quick: compare no hashes.

    Raises:
        UserError: `checksums` cannot be read as such a list.
    """
    report = Report(folder)
    if not folder.is_dir():
        report.add(FAIL, "folder", "there is no such folder; THUDM/README.md says how to download the weights")
        return report
    if checksums is None and (folder / CHECKSUM_FILE).is_file():
        checksums = folder / CHECKSUM_FILE
    listed = read_checksums(checksums) if checksums else {}
    config = check_config(folder, report)
    paths = [folder / "config.json"] if config else []
    paths += check_weights(folder, config, report)
    paths += check_tokenizer(folder, config, report)
    if not is_quick:
        check_hashes(paths, listed, report, config)
    check_leftovers(folder, report)
    return report


def check_config(folder: Path, report: Report) -> dict[str, Any] | None:
    """Is config.json the configuration of a ChatGLM? Returns it when it is."""
    path = folder / "config.json"
    if not is_present(path, report):
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        report.add(FAIL, path.name, f"it is no JSON ({error}); download it again")
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "chatglm":
        report.add(FAIL, path.name, f"model_type is {kind!r}, expected 'chatglm': this is another model")
        return None
    wrong = [name for name in CONFIG_NUMBERS if not isinstance(config.get(name), int) or config[name] < 1]
    if wrong:
        reason = "this looks like the first ChatGLM-6B, which is another architecture" if "num_layers" in wrong else ""
        report.add(FAIL, path.name, f"no positive number for {', '.join(wrong)}; {reason or 'download it again'}")
        return None
    report.add(
        OK,
        path.name,
        f"ChatGLM, {config['num_layers']} layers of width {config['hidden_size']}, vocabulary "
        f"{config['padded_vocab_size']:,}, up to {config.get('seq_length', '?')} tokens",
    )
    return config


def check_tokenizer(folder: Path, config: dict[str, Any] | None, report: Report) -> list[Path]:
    """Does the tokenizer load, and fit the model? Returns its files."""
    paths = [folder / "tokenizer.model", folder / "tokenizer_config.json"]
    absent = [path for path in paths if not is_present(path, report)]
    if absent:
        return []
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(paths[0])).vocab_size()
    except (RuntimeError, OSError) as error:
        report.add(FAIL, paths[0].name, f"SentencePiece cannot read it ({error}); download it again")
        return paths
    rows = config["padded_vocab_size"] if config else None
    if rows is not None and pieces > rows:
        report.add(FAIL, paths[0].name, f"{pieces:,} pieces, the model has only {rows:,}: they do not belong together")
    else:
        report.add(OK, paths[0].name, f"loads, {pieces:,} pieces")
    return paths


def check_hashes(paths: list[Path], listed: dict[str, Recorded], report: Report, config: dict[str, Any] | None) -> None:
    """Compares each file with what is known about it; says for which files nothing is."""
    unknown = []
    for path in paths:
        recorded = listed.get(path.name) or find_recorded(path) or _official_tokenizer(path, config)
        if recorded is None:
            if path.suffix == ".bin":
                check_records(path, report)
            elif path.suffix != ".json":
                unknown.append(path.name)
            continue
        print(f"reading {path.name} …", file=sys.stderr)
        digest = file_digest(path, recorded.algorithm)
        name = "sha256" if recorded.algorithm == "sha256" else "git's sha1"
        if digest == recorded.digest:
            report.add(OK, path.name, f"{name} {digest[:8]}…{digest[-4:]} as in {recorded.source}")
        elif recorded.algorithm == "sha256":
            difference = f"sha256 is {digest}, {recorded.source} says {recorded.digest}"
            report.add(FAIL, path.name, f"{difference}; delete the file and download it again")
        else:  # small text files, which people edit
            report.add(NOTE, path.name, f"differs from {recorded.source}: changed since the download, or damaged")
    if unknown:
        report.add(
            NOTE,
            "sha256",
            f"nothing to compare with for {', '.join(unknown)}: the structure was checked, the contents were not "
            f"(--sha256 LIST, or {CHECKSUM_FILE} in the folder)",
        )


def check_records(path: Path, report: Report) -> None:
    """The archive's own checksums, where nobody has recorded a sha256."""
    print(f"reading {path.name} …", file=sys.stderr)
    damaged = find_damaged_record(path)
    if damaged is None:
        report.add(OK, path.name, "contents agree with the checksums inside the file (no sha256 was recorded)")
    else:
        report.add(FAIL, path.name, f"damaged at {damaged}; delete the file and download it again")


def _official_tokenizer(path: Path, config: dict[str, Any] | None) -> Recorded | None:
    """The official models share one vocabulary; a model of another vocabulary size has its own."""
    if path.name != "tokenizer.model" or config is None or config["padded_vocab_size"] != OFFICIAL_VOCABULARY:
        return None
    return Recorded("sha256", OFFICIAL_TOKENIZER, None, "the official ChatGLM3-6B")


def check_leftovers(folder: Path, report: Report) -> None:
    """Half files that an interrupted hub client left behind."""
    left = list((folder / HUB_RECORDS).glob("*.incomplete"))
    if left:
        size = format_size(sum(path.stat().st_size for path in left))
        report.add(NOTE, "download", f"{len(left)} unfinished file(s), {size}: the same command continues them")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=HERE / "chatglm3-6b",
        help="folder with the weights (default: %(default)s)",
    )
    parser.add_argument("--sha256", type=Path, metavar="LIST", help="compare with this list, as sha256sum writes it")
    parser.add_argument("--quick", action="store_true", help="no hashes: seconds instead of minutes for 12 GB")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check and print; returns 0 when the folder can be used, 1 when it cannot."""
    arguments = build_parser().parse_args(argv)
    report = check_folder(arguments.folder, checksums=arguments.sha256, is_quick=arguments.quick)
    if arguments.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=2))
    else:
        marks = {OK: "  ok  ", NOTE: " note ", FAIL: " FAIL "}
        for finding in report.findings:
            print(f"[{marks[finding.status]}] {finding.subject}: {finding.message}")
        print(f"verdict: {report.verdict}")
    return 0 if report.is_usable else EXIT_NO


if __name__ == "__main__":
    sys.exit(run_program(main))
