"""Rows of data sets on a hub: Hugging Face's through `datasets`, ModelScope's through its own client.

ModelScope's client is optional (`pip install modelscope`). It fetches the files, and `datasets` reads them: the
client's own reader, MsDataset, refuses versions of `datasets` that this project uses. See `sources.py`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.conversation.json_files import Located
from finetune_chatmodel_demo.conversation.registry import MODELSCOPE_VARIABLE, DatasetEntry, RegistryError

NETWORK_WORDS = ("offline", "couldn't reach", "could not reach", "connection", "connect to", "resolve", "timed out")
ERROR_LENGTH = 300


class HubRows:
    """The rows of one split of a data set on a hub; see `source_files.RowReader`."""

    def __init__(self, entry: DatasetEntry, address: str, dataset: Iterable[dict[str, Any]]):
        self.entry, self.address, self.dataset = entry, address, dataset
        self.path = Path(address)

    def rows(self) -> Iterator[Located]:
        """See `RowReader`. Lines are the numbers of rows."""
        number = 0
        rows = iter(self.dataset)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise hub_error(self.entry, self.address, error, f"behind row {number}") from error
            number += 1
            yield Located(number, number, row)

    def where(self, number: int, line: int) -> str:
        """See `RowReader`."""
        return f"{self.address} (split {self.entry.split}) row {number}"


def open_hub(entry: DatasetEntry, *, streaming: bool = False) -> HubRows:
    """Opens a data set of the hub that `entry.origin` names.

    Args:
        entry: The data set; `subset`, `folder` and `split` say which part of it.
        streaming: Read it while iterating, instead of downloading it first (Hugging Face alone).

    Raises:
        RegistryError: No network, no such data set, subset or split, or no client of ModelScope: one line.
    """
    if entry.origin == "ms_hub":
        address = entry.ms_hub_url
        path = _download_from_modelscope(entry)
    else:
        address = path = entry.hf_hub_url
    import datasets

    try:
        dataset = datasets.load_dataset(
            path, name=entry.subset, data_dir=entry.folder, split=entry.split, streaming=streaming
        )
    except Exception as error:
        raise hub_error(entry, address, error) from error
    return HubRows(entry, address, dataset)


def _download_from_modelscope(entry: DatasetEntry) -> str:
    """The local folder that the files of a data set of ModelScope's were downloaded to."""
    try:
        from modelscope.hub.snapshot_download import dataset_snapshot_download
    except ImportError as error:
        other = f", or unset {MODELSCOPE_VARIABLE} to take it from hf_hub_url" if entry.hf_hub_url else ""
        raise RegistryError(
            f"{entry.where}: ms_hub_url needs ModelScope's client ({error}); install it with "
            f"`pip install modelscope`{other}"
        ) from None
    patterns = {"allow_patterns": [f"{entry.folder.strip('/')}/**", "README.md"]} if entry.folder else {}
    try:
        return str(dataset_snapshot_download(entry.ms_hub_url, **patterns))
    except Exception as error:
        raise hub_error(entry, entry.ms_hub_url, error) from error


def hub_error(entry: DatasetEntry, address: str, error: Exception, place: str = "") -> RegistryError:
    """One line that says what went wrong with a hub, whatever a client raised."""
    chain, texts = error, []
    while chain is not None and len(texts) < 5:
        texts.append(f"{type(chain).__name__} {chain}".lower())
        chain = chain.__cause__ or chain.__context__
    is_network = isinstance(error, ConnectionError | TimeoutError) or any(
        word in text for word in NETWORK_WORDS for text in texts
    )
    hub = "ModelScope" if entry.origin == "ms_hub" else "the Hugging Face hub"
    reason = " ".join(str(error).split())[:ERROR_LENGTH] or "no message"
    what = f"{entry.where}: {address!r} cannot be read from {hub}{f' {place}' if place else ''}"
    if is_network:
        remedy = "check the network and HF_HUB_OFFLINE"
        if entry.origin == "hf_hub":
            remedy += f"; a mirror can be named with HF_ENDPOINT{_other_hub(entry)}"
        return RegistryError(f"{what}, there is no connection to it ({reason}); {remedy}, or use file_name")
    part = ", ".join(f"{key} {getattr(entry, key)!r}" for key in ("subset", "folder", "split") if getattr(entry, key))
    return RegistryError(f"{what} ({type(error).__name__}: {reason}); check its name and {part}")


def _other_hub(entry: DatasetEntry) -> str:
    return f", ModelScope chosen with {MODELSCOPE_VARIABLE}=1" if entry.ms_hub_url else ""
