"""Gets the files of a base model, complete and safe, from a server or a volume."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from qlora_api.sources import VolumeSource, parse_source
from qlora_api.spec.model import BaseModelSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import bad_configuration, model_unavailable, unsafe_artifact
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE
from qlora_trainer.core.filesystem import (
    bytes_below,
    complete_folder,
    file_sha256,
    partial_path,
    remove,
    remove_partials,
    require_space,
)
from qlora_trainer.core.paths import require_regular
from qlora_trainer.model.source.downloads import RemoteModel, RemoteSource, open_remote_model
from qlora_trainer.model.source.files import (
    WEIGHTS_INDEX,
    OnBytes,
    choose_settings,
    content_revision,
    file_digests,
    require_whole,
    weight_files,
)
from qlora_trainer.stores.access import StoreAccess

Origin = Literal["downloaded", "cache", "volume"]


class Conversion(Protocol):
    """Converts the weights, file by file."""

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of each file of weights that was converted, by its name."""

    def convert(self, path: Path, sha256: str) -> None:
        """Convert a whole file. Raises StepFailure for weights that cannot be used."""


class ModelSource(Protocol):
    """The base model. Call its methods in this order. They raise StepFailure."""

    uri: str
    """Its address, for messages."""
    activity: str
    """What `weights` does, for the progress record."""
    making: str
    """The same for a base that several jobs share."""
    origin: Origin
    """Where the weights came from, once `weights` has returned."""
    known_version: str | None
    """Its `version`, if that is known before its weights are read."""
    bytes_fetched: int
    """Bytes that a server has sent so far."""

    def settings(self) -> Path:
        """The model's folder with its small files: configuration and tokenizer."""

    def check_weights(self, beside: int) -> None:
        """Check that the weights are complete, safe, and fit with `beside` bytes."""

    def require_readable(self) -> None:
        """Raise StepFailure unless the job's own credentials open the weights."""

    def version(self, on_bytes: OnBytes) -> str:
        """Identifies the weights: a base of another version is made of others."""

    def originals(self) -> Mapping[str, str | None]:
        """SHA-256 of each file of weights, by name, as far as it is known."""

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        """Give each file of weights to `conversion`, and return the revision."""

    def revision(self, weights: Mapping[str, str]) -> str:
        """Commit, or sha256:… of the content, by the SHA-256 of each file of weights."""

    def complete(self) -> Path:
        """The model's folder under its final name."""


def open_model_source(model: BaseModelSpec, access: StoreAccess, folder: Path) -> ModelSource:
    """Open the base model. Downloads go below `folder`. Raises StepFailure."""
    source = parse_source(model.source)
    if isinstance(source, VolumeSource):
        return _VolumeModel(access.mounts, source)
    if not isinstance(source, RemoteSource):
        raise bad_configuration(
            f"spec.model.source is {model.source}: must be hf://, s3://, gs://, az://, oci:// or pvc://"
        )
    remote = open_remote_model(source, access.hub, access.secret, access.registries, model.revision)
    return _DownloadedModel(remote, folder)


class _DownloadedModel(ModelSource):
    """A model on a server. Each file of weights is deleted as soon as it is converted."""

    activity = "downloading"
    making = "downloading and quantizing"
    origin: Origin = "downloaded"

    def __init__(self, remote: RemoteModel, models: Path) -> None:
        self._remote, self.uri, self.known_version = remote, remote.uri, remote.version
        self._small_files = choose_settings(remote.sizes, remote.uri)
        self.bytes_fetched = 0
        self._target = models / remote.version
        self._folder = self._target if self._target.is_dir() else partial_path(self._target)

    def settings(self) -> Path:
        # Of another version, from before a branch moved on: nothing will complete it, and it fills the volume.
        remove_partials(self._folder.parent, but=self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        for name in self._small_files:
            self._fetch(name, lambda _done: None)
        return self._folder

    def check_weights(self, beside: int) -> None:
        largest = max(self._remote.sizes[name] for name in self._weight_names())
        missing = max(0, largest - bytes_below(self._folder)) + beside
        purpose = f"the download of {self.uri}" + (" and its 4-bit base" if beside else "")
        require_space(self._folder, missing, purpose)

    def require_readable(self) -> None:
        for name in self._weight_names():
            self._remote.require_readable(name)

    def version(self, _on_bytes: OnBytes) -> str:
        return self._remote.version

    def originals(self) -> dict[str, str | None]:
        return {name: self._remote.digests.get(name) for name in self._weight_names()}

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        sizes = {name: self._remote.sizes[name] for name in self._weight_names()}
        total, finished = sum(sizes.values()), 0
        for name, size in sizes.items():
            path, before = self._folder / name, finished
            if name not in conversion.digests:
                self._fetch(name, lambda done, before=before: on_bytes(before + done, total))  # type: ignore[misc]
                require_whole(path, f"{self.uri}/{name}")
                conversion.convert(path, self._remote.digests.get(name) or file_sha256(path))
            remove(path)
            finished += size
            on_bytes(finished, total)
        return self.revision(conversion.digests)

    def revision(self, weights: Mapping[str, str]) -> str:
        if self._remote.revision is not None:
            return self._remote.revision
        return content_revision({**file_digests(self._folder, self._small_files, lambda *_: None), **weights})

    def complete(self) -> Path:
        if self._folder != self._target:
            complete_folder(self._folder, self._target)
            self._folder = self._target
        return self._folder

    def _weight_names(self) -> list[str]:
        index = (self._folder / WEIGHTS_INDEX).read_bytes() if WEIGHTS_INDEX in self._small_files else None
        return weight_files(index, self._remote.sizes, self.uri)

    def _fetch(self, name: str, on_bytes: Callable[[int], None]) -> None:
        before = bytes_below(self._folder)
        self._remote.fetch(name, self._folder, on_bytes)
        # The hub's client also stores notes in the folder.
        self.bytes_fetched += min(max(bytes_below(self._folder) - before, 0), self._remote.sizes[name])


class _VolumeModel(ModelSource):
    """A model in a folder of a mounted volume: read in place, never copied."""

    activity = "reading"
    making = "quantizing"
    origin: Origin = "volume"
    bytes_fetched = 0
    known_version = None

    def __init__(self, mounts: Mounts, source: VolumeSource) -> None:
        """List the files. Raises StepFailure for one that leads out of the folder."""
        self.uri = str(source)
        folder = mounts.folder(source)
        if not folder.is_dir():
            raise model_unavailable(f"{self.uri} is not a folder on the volume: check the path")
        self._folder = folder
        self._names = frozenset(entry.name for entry in folder.iterdir())
        if ADAPTER_CONFIG_FILE in self._names:
            raise unsafe_artifact(
                f"{self.uri} has {ADAPTER_CONFIG_FILE}: transformers would load that adapter into the base model "
                "too; move the adapter's files out of the folder"
            )
        self._settings = choose_settings(self._names, self.uri)
        self._digests: dict[str, str] = {}
        self._before: list[tuple[int, int, int]] = []
        for name in self._settings:
            require_regular(folder / name, folder, f"{self.uri}/{name}")

    def settings(self) -> Path:
        return self._folder

    def check_weights(self, _beside: int) -> None:
        for name in self._weight_names():
            require_regular(self._folder / name, self._folder, f"{self.uri}/{name}")
            require_whole(self._folder / name, f"{self.uri}/{name}")

    def require_readable(self) -> None:
        """`version` has read them."""

    def version(self, on_bytes: OnBytes) -> str:
        self._before = self._states()
        self._digests = file_digests(self._folder, (*self._settings, *self._weight_names()), on_bytes)
        return content_revision(self._digests)

    def originals(self) -> dict[str, str | None]:
        return {name: self._digests[name] for name in self._weight_names()}

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        self.activity = self.making
        sizes = {name: (self._folder / name).stat().st_size for name in self._weight_names()}
        finished = 0
        for name, size in sizes.items():
            if name not in conversion.digests:
                conversion.convert(self._folder / name, self._digests[name])
            finished += size
            on_bytes(finished, sum(sizes.values()))
        # Other jobs may find the base by the digest of what was read first.
        if self._states() != self._before:
            raise model_unavailable(
                f"{self.uri} changed while it was read: start the job again when no process writes to it"
            )
        return content_revision(self._digests)

    def revision(self, _weights: Mapping[str, str]) -> str:
        return content_revision(self._digests)

    def complete(self) -> Path:
        return self._folder

    def _states(self) -> list[tuple[int, int, int]]:
        """States that differ once a file of weights was replaced or written to."""
        found = [(self._folder / name).stat() for name in self._weight_names()]
        return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in found]

    def _weight_names(self) -> list[str]:
        index = (self._folder / WEIGHTS_INDEX).read_bytes() if WEIGHTS_INDEX in self._settings else None
        return weight_files(index, self._names, self.uri)
