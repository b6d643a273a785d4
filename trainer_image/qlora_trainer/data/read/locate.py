"""Finds the files of a data set at its address, and downloads them from servers."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from qlora_api.sources import ConfigMapSource, HubSource, ObjectStoreSource, VolumeSource, parse_source
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import StepFailure, bad_configuration, bad_dataset
from qlora_trainer.core.filesystem import bytes_below, require_space
from qlora_trainer.core.paths import require_regular, some_names
from qlora_trainer.data.read.files import DataFile, DataFiles
from qlora_trainer.data.read.hub_splits import Wanted, choose_data_files, read_dataset_card
from qlora_trainer.data.read.reading import DATA_ENDINGS, data_kind, require_one_kind
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.hub import Hub
from qlora_trainer.stores.objects import ObjectFolder, version_of

_DATASET_CARD = "README.md"
_MAX_DATASET_CARD_BYTES = 2**21


def find_data(uri: str, wanted: Wanted, access: StoreAccess, download: Path) -> DataFiles:
    """The data files of an address: one file, or those of one kind that are in a folder or make up a split.

    Servers' files are downloaded below `download`. Raises StepFailure: BAD_DATASET without such files, UNSAFE_ARTIFACT
    for a link out of its volume, UNREACHABLE without mount or server.
    """
    source = parse_source(uri)
    if isinstance(source, HubSource):
        return _hub_data(source, wanted, access.hub(), download)
    if isinstance(source, ObjectStoreSource):
        return _stored_data(source, ObjectFolder(source, access.secret, reject=bad_dataset), download)
    if isinstance(source, (VolumeSource, ConfigMapSource)):
        return _mounted_data(uri, source, access.mounts)
    raise bad_configuration(
        f"{uri} is not the address of a data set: must be hf://, pvc://, s3://, gs://, az:// or configMap://"
    )


def mounted_data(uri: str, mounts: Mounts) -> DataFiles | None:
    """The mounted files of an address. None for a server, and for files that are gone."""
    source = parse_source(uri)
    if not isinstance(source, (VolumeSource, ConfigMapSource)):
        return None
    try:
        return _mounted_data(uri, source, mounts)
    except StepFailure:
        return None


def _mounted_data(uri: str, source: VolumeSource | ConfigMapSource, mounts: Mounts) -> DataFiles:
    if isinstance(source, ConfigMapSource):
        return _one_file(DataFile(mounts.config_map(source), uri))
    volume = mounts.volume(VolumeSource(source.claim))
    path = mounts.volume(source)
    name = mounts.name(source)
    if path.is_dir():
        if not path.resolve().is_relative_to(volume.resolve()):
            require_regular(path, volume, name)
        return _folder(path, volume, name)
    # A broken link does not exist either, but the address is right: require_regular reports it.
    if not path.exists() and not path.is_symlink():
        folder = path.parent
        inside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise bad_dataset(f"{name} does not exist; its folder has {some_names(inside)}")
    require_regular(path, volume, name)
    return _one_file(DataFile(path, name))


def _one_file(file: DataFile) -> DataFiles:
    if data_kind(file.name) is None:
        raise bad_dataset(f"{file.name} does not end in {DATA_ENDINGS}: rename or convert it")
    return DataFiles(file.name, (file,), (PurePosixPath(file.name).name,))


def _folder(folder: Path, volume: Path, uri: str) -> DataFiles:
    entries = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    names = [name for name in entries if data_kind(name) is not None and not (folder / name).is_dir()]
    require_one_kind(names, entries, uri)
    for name in names:
        require_regular(folder / name, volume, f"{uri}/{name}")
    return _files(uri, ((folder / name, name) for name in names))


def _files(uri: str, found: Iterable[tuple[Path, str]]) -> DataFiles:
    files = tuple(found)
    return DataFiles(uri, tuple(DataFile(path, f"{uri}/{name}") for path, name in files), tuple(n for _, n in files))


def _stored_data(source: ObjectStoreSource, objects: ObjectFolder, download: Path) -> DataFiles:
    name = source.path.rpartition("/")[2]
    if data_kind(name) is not None:
        folder, found = str(source).removesuffix(f"/{name}"), {name: objects.stat()}
    else:
        folder, listed = str(source), objects.list()
        found = {name: listed[name] for name in sorted(listed) if "/" not in name and data_kind(name) is not None}
        require_one_kind(found, listed, str(source))
    # A file of an earlier attempt is used only if the store still has that version of it.
    download /= version_of(found)
    _make_room(download, sum(entry.size for entry in found.values()), str(source))
    for name, entry in found.items():
        objects.download(entry, download / name, lambda _done: None)
    return _files(folder, ((download / name, name) for name in found))


def _hub_data(source: HubSource, wanted: Wanted, hub: Hub, download: Path) -> DataFiles:
    listing = hub.list("dataset", source.repository, wanted.revision)
    uri = f"hf://{source.repository}"
    dataset_card = listing.files.get(_DATASET_CARD)
    about = None
    if dataset_card is not None and not source.path:
        if dataset_card.size > _MAX_DATASET_CARD_BYTES:
            raise bad_dataset(
                f"{uri}/{_DATASET_CARD} has {dataset_card.size} bytes, at most {_MAX_DATASET_CARD_BYTES} are read: "
                "name a file"
            )
        about = read_dataset_card(hub.fetch(listing, dataset_card, download), uri)
    names = choose_data_files(tuple(listing.files), about, source.path, wanted, uri)
    _make_room(download, sum(listing.files[name].size for name in names), uri)
    return _files(uri, [(hub.fetch(listing, listing.files[name], download), name) for name in names])


def _make_room(folder: Path, total: int, uri: str) -> None:
    """Make the folder. Raises StepFailure without space for the rest of `total` bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, total - bytes_below(folder), f"the download of {uri}")
