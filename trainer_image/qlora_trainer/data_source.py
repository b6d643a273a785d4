"""Finds a data set's files, wherever the address points; changes with the kinds of address."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from qlora_api.sources import ConfigMapSource, HubSource, VolumeSource, parse_source
from qlora_trainer.disk import require_space
from qlora_trainer.failures import StepFailure, bad_dataset
from qlora_trainer.hub import Hub
from qlora_trainer.listing import require_regular, some_names
from qlora_trainer.step import Mounts

DATA_SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class DataFile:
    """A data file that can be read now, and what to call it in messages."""

    path: Path
    name: str


def find_data(
    uri: str,
    *,
    revision: str | None,
    split: str | None,
    mounts: Mounts,
    hub: Callable[[], Hub],
    download: Path,
) -> DataFile:
    """The one data file of an address. Files of the hub are downloaded below `download`.

    Raises StepFailure: BAD_DATASET if there is no such file or more than one, UNSAFE_ARTEFACT for a link that leads
    out of its volume, UNREACHABLE if a mount or the hub is missing.
    """
    source = parse_source(uri)
    if isinstance(source, HubSource):
        return _hub_data(source, revision, split, hub(), download)
    if isinstance(source, ConfigMapSource):
        file = DataFile(mounts.config_map(source), uri)
    else:
        file = DataFile(mounts.volume(source), str(source))
        _require_data_file(file, mounts.volume(VolumeSource(source.claim)))
    if not file.path.name.endswith(DATA_SUFFIXES):
        raise bad_dataset(f"{file.name} does not end in {', '.join(DATA_SUFFIXES)}: rename or convert it")
    return file


def local_file(uri: str, mounts: Mounts) -> Path | None:
    """The file on a volume or in a ConfigMap that an address names; None for the hub, and if it is not there (now)."""
    source = parse_source(uri)
    if isinstance(source, HubSource):
        return None
    try:
        path = mounts.config_map(source) if isinstance(source, ConfigMapSource) else mounts.volume(source)
    except StepFailure:
        return None
    return path if path.is_file() else None


def _require_data_file(file: DataFile, volume: Path) -> None:
    if file.path.is_dir():
        inside = [entry.name for entry in file.path.iterdir() if entry.name.endswith(DATA_SUFFIXES)]
        raise bad_dataset(f"{file.name} is a folder: name one of its data files; it has {some_names(inside)}")
    if not file.path.exists():
        folder = file.path.parent
        inside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise bad_dataset(f"{file.name} does not exist; its folder has {some_names(inside)}")
    require_regular(file.path, volume, file.name)


def _hub_data(source: HubSource, revision: str | None, split: str | None, hub: Hub, download: Path) -> DataFile:
    listing = hub.list("dataset", source.repository, revision)
    uri = f"hf://{source.repository}"
    name = choose_data_file(listing.files, source.path, split, uri)
    require_space(download.parent, listing.files[name].size, f"the download of {uri}/{name}")
    return DataFile(hub.fetch(listing, listing.files[name], download, lambda _done: None), f"{uri}/{name}")


def choose_data_file(names: Collection[str], path: str, split: str | None, uri: str) -> str:
    """The data file of a repository: the one at `path`, else the one of the split, else the only one there is.

    A file belongs to a split if its path has the split's name as a part of its own: `data/train-00000.parquet` is of
    the split `train`. Raises StepFailure BAD_DATASET, listing the files, if it is not exactly one.
    """
    candidates = sorted(name for name in names if name.endswith(DATA_SUFFIXES))
    if path:
        if path in candidates:
            return path
        raise bad_dataset(f"{uri} has no data file {path!r}; it has {some_names(candidates)}")
    if split is None and len(candidates) == 1:
        return candidates[0]
    wanted = split or "train"
    part = re.compile(rf"(^|[/._-]){re.escape(wanted)}([/._-]|$)")
    matching = [name for name in candidates if part.search(name)]
    if len(matching) != 1:
        raise bad_dataset(
            f"{uri} has {len(matching)} data files of the split {wanted!r}, must be one: name the file, as in "
            f"{uri}/{(matching or candidates or ['PATH'])[0]}; it has {some_names(candidates)}"
        )
    return matching[0]
