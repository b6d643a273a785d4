"""Gets the files of a base model, complete and safe, from a server or a volume."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from qlora_api.sources import VolumeSource
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import model_unavailable, unsafe_artifact
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
from qlora_trainer.model.source.files import (
    WEIGHTS_INDEX,
    OnBytes,
    choose_settings,
    content_revision,
    file_digests,
    require_whole,
    weight_files,
)

QUANTIZING = "quantizing"


Origin = Literal["downloaded", "cache", "volume"]


class Conversion(Protocol):
    """Converts the weights, file by file."""

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of each file of weights that was converted, by its name."""

    def convert(self, path: Path, sha256: str) -> None:
        """Convert a whole file. Raises StepFailure for weights that cannot be used."""


class ModelSource(Protocol):
    """Where the base model comes from, a server or a volume.

    Call its methods in this order. They raise StepFailure.
    """

    activity: str
    """What `weights` does, for the progress record."""
    origin: Origin
    """Where the weights came from, once `weights` has returned."""

    @property
    def bytes_fetched(self) -> int:
        """Bytes that a server has sent so far."""

    def settings(self) -> Path:
        """The model's folder with its small files: configuration and tokenizer."""

    def check_weights(self, beside: int) -> None:
        """Check, without reading them, that the weights are complete, safe, and fit on the disk with the base.

        `beside`: bytes that the base is yet to take.
        """

    def version(self, on_bytes: OnBytes) -> str:
        """Identifies the weights: a base of another version is made of others."""

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        """Give each file of weights to `conversion`.

        Returns the revision: a commit, or sha256:… of the content.
        """

    def complete(self) -> Path:
        """The model's folder under its final name."""


class SharedModel(ModelSource, Protocol):
    """A model whose base several jobs share."""

    making: str
    """What making a base of it is, for the progress record."""

    @property
    def uri(self) -> str:
        """Its address, for messages."""

    @property
    def known_version(self) -> str | None:
        """Its `version`, if that is known before its weights are read."""

    def require_readable(self) -> None:
        """Raise StepFailure unless the job's own credentials open the weights."""

    def originals(self) -> Mapping[str, str | None]:
        """SHA-256 of each file of weights, by its name, once `version` has returned.

        None for a digest that the server does not report.
        """

    def revision(self, weights: Mapping[str, str]) -> str:
        """The revision, as `weights` returns it, by the SHA-256 of each file of weights."""


class RemoteModel(Protocol):
    """The files of a model on a server. Methods raise StepFailure."""

    @property
    def uri(self) -> str:
        """The model's address, for messages."""

    @property
    def version(self) -> str:
        """Identifies the server's current content. Can be a folder's name."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by its name."""

    @property
    def digests(self) -> Mapping[str, str]:
        """SHA-256 of each file, by its name, as far as the server reports it."""

    def fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        """Download the whole file into `folder`, and resume an earlier attempt."""

    def require_readable(self, names: Iterable[str]) -> None:
        """Check with the server that the job's credentials open these files."""

    def revision(self, digests: Callable[[], Mapping[str, str]]) -> str:
        """The model's revision: a commit, or sha256:… of the content.

        The digests are computed only if they are needed.
        """


class DownloadedModel:
    """A model on a server, downloaded into a partial folder until it is complete."""

    activity = "downloading"
    making = "downloading and quantizing"
    origin: Origin = "downloaded"

    def __init__(self, remote: RemoteModel, models: Path) -> None:
        """Choose the files. `models`: folder of downloaded models, one folder for each version.

        A file of weights is deleted as soon as it is converted, so that one at a time takes room.
        """
        self.remote = remote
        self.small_files = choose_settings(remote.sizes, remote.uri)
        self.bytes_fetched = 0
        self._target = models / remote.version
        self.folder = self._target if self._target.is_dir() else partial_path(self._target)

    def settings(self) -> Path:
        """See ModelSource."""
        # Of another version, from before a branch moved on: nothing will complete it, and it fills the volume.
        remove_partials(self.folder.parent, but=self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.small_files:
            self._fetch(name, self.folder, lambda _done: None)
        return self.folder

    def check_weights(self, beside: int) -> None:
        """See ModelSource."""
        largest = max(map(self._size, self.weight_names()))
        missing = max(0, largest - bytes_below(self.folder)) + beside
        purpose = f"the download of {self.remote.uri}" + (" and its 4-bit base" if beside else "")
        require_space(self.folder, missing, purpose)

    def version(self, _on_bytes: OnBytes) -> str:
        """See ModelSource."""
        return self.remote.version

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        """See ModelSource."""
        total, finished = self.weight_bytes(), 0
        for name in self.weight_names():
            path, before = self.folder / name, finished
            if name not in conversion.digests:
                self._fetch(name, self.folder, lambda done, before=before: on_bytes(before + done, total))  # type: ignore[misc]
                require_whole(path, f"{self.remote.uri}/{name}")
                conversion.convert(path, self.remote.digests.get(name) or file_sha256(path))
            remove(path)
            finished += self._size(name)
            on_bytes(finished, total)
        return self.revision(conversion.digests)

    def small_digests(self) -> dict[str, str]:
        """SHA-256 of each of the downloaded small files, by its name."""
        return file_digests(self.folder, self.small_files, lambda _done, _total: None)

    @property
    def uri(self) -> str:
        """See SharedModel."""
        return self.remote.uri

    @property
    def known_version(self) -> str:
        """See SharedModel."""
        return self.remote.version

    def require_readable(self) -> None:
        """See SharedModel."""
        self.remote.require_readable(self.weight_names())

    def originals(self) -> dict[str, str | None]:
        """See SharedModel."""
        return {name: self.remote.digests.get(name) for name in self.weight_names()}

    def revision(self, weights: Mapping[str, str]) -> str:
        """See SharedModel."""
        return self.remote.revision(lambda: {**self.small_digests(), **weights})

    def complete(self) -> Path:
        """See ModelSource."""
        if self.folder != self._target:
            complete_folder(self.folder, self._target)
            self.folder = self._target
        return self.folder

    def weight_names(self) -> list[str]:
        """The names of the weights' files, once the small files are downloaded."""
        index = (self.folder / WEIGHTS_INDEX).read_bytes() if WEIGHTS_INDEX in self.small_files else None
        return weight_files(index, self.remote.sizes, self.remote.uri)

    def weight_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(map(self._size, self.weight_names()))

    def _size(self, name: str) -> int:
        return self.remote.sizes[name]

    def _fetch(self, name: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
        before = bytes_below(folder)
        self.remote.fetch(name, folder, on_bytes)
        # The hub's client also stores notes in the folder.
        self.bytes_fetched += min(max(bytes_below(folder) - before, 0), self.remote.sizes[name])


class VolumeModel:
    """A model in a folder of a mounted volume: read in place, never copied."""

    making = QUANTIZING
    origin: Origin = "volume"
    bytes_fetched = 0
    known_version = None

    def __init__(self, mounts: Mounts, source: VolumeSource) -> None:
        """List the files.

        Raises StepFailure UNSAFE_ARTIFACT for one that is not a regular file inside the folder.
        """
        self.activity = "reading"
        self._uri = str(source)
        folder = mounts.volume(source)
        if not folder.is_dir():
            raise model_unavailable(f"{self._uri} is not a folder on the volume: check the path")
        if not folder.resolve().is_relative_to(mounts.volume(VolumeSource(source.claim)).resolve()):
            raise unsafe_artifact(f"{self._uri} is a link that leads out of its volume: put the files themselves there")
        self.folder = folder
        self._names = frozenset(entry.name for entry in folder.iterdir())
        if ADAPTER_CONFIG_FILE in self._names:
            raise unsafe_artifact(
                f"{self._uri} has {ADAPTER_CONFIG_FILE}: transformers would load that adapter into the base model "
                "too; move the adapter's files out of the folder"
            )
        self._settings = choose_settings(self._names, self._uri)
        self._digests: dict[str, str] = {}
        self._before: list[tuple[int, int, int]] = []
        for name in self._settings:
            require_regular(folder / name, folder, f"{self._uri}/{name}")

    def settings(self) -> Path:
        """See ModelSource."""
        return self.folder

    def check_weights(self, _beside: int) -> None:
        """See ModelSource. They take no room."""
        for name in self._weight_files():
            require_regular(self.folder / name, self.folder, f"{self._uri}/{name}")
            require_whole(self.folder / name, f"{self._uri}/{name}")

    def version(self, on_bytes: OnBytes) -> str:
        """See ModelSource. A digest over names and contents of the used files."""
        self._before = self._states()
        self._digests = file_digests(self.folder, (*self._settings, *self._weight_files()), on_bytes)
        return content_revision(self._digests)

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        """See ModelSource."""
        self.activity = QUANTIZING
        convert_all(conversion, self.folder, self.originals(), on_bytes)
        # Other jobs may find the base by the digest of what was read first.
        if self._states() != self._before:
            raise model_unavailable(
                f"{self._uri} changed while it was read: start the job again when no process writes to it"
            )
        return content_revision(self._digests)

    @property
    def uri(self) -> str:
        """See SharedModel."""
        return self._uri

    def require_readable(self) -> None:
        """See SharedModel. `version` has read them."""

    def originals(self) -> dict[str, str]:
        """See SharedModel."""
        return {name: self._digests[name] for name in self._weight_files()}

    def revision(self, _weights: Mapping[str, str]) -> str:
        """See SharedModel."""
        return content_revision(self._digests)

    def complete(self) -> Path:
        """See ModelSource."""
        return self.folder

    def _states(self) -> list[tuple[int, int, int]]:
        """States that differ once a file of weights was replaced or written to."""
        found = [(self.folder / name).stat() for name in self._weight_files()]
        return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in found]

    def _weight_files(self) -> list[str]:
        index = (self.folder / WEIGHTS_INDEX).read_bytes() if WEIGHTS_INDEX in self._settings else None
        return weight_files(index, self._names, self._uri)


def convert_all(conversion: Conversion, folder: Path, digests: Mapping[str, str], on_bytes: OnBytes) -> None:
    """Give the conversion each of these files in the folder that it does not have."""
    sizes = {name: (folder / name).stat().st_size for name in digests}
    finished = 0
    for name, digest in digests.items():
        if name not in conversion.digests:
            conversion.convert(folder / name, digest)
        finished += sizes[name]
        on_bytes(finished, sum(sizes.values()))
