"""Gets the 4-bit base from a shared cache, or adds it to that cache."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qlora_api.contract import ExitCode
from qlora_api.printable import one_line, shortened
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import bytes_below, sizes
from qlora_trainer.model.base.artifact import BaseManifest
from qlora_trainer.model.base.cache import (
    CachedFolder,
    DamagedCacheError,
    ModelCache,
    UnusableCacheError,
    cache_key,
    read_errors,
    volume_errors,
)
from qlora_trainer.model.base.conversion import BaseConversion, small_files
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.workspace_base import Base, BaseSource, WorkspaceBase
from qlora_trainer.model.nf4.stored_layer import StoredTensor
from qlora_trainer.model.source.files import OnBytes
from qlora_trainer.model.source.models import Origin, SharedModel
from qlora_trainer.stores.contents import describe_files

_WAIT_SECONDS = 2.0
_MAX_REMARK = 256


def open_base_source(
    source: SharedModel, layout: BaseLayout, settings: Path, target: Path, cache: ModelCache | None
) -> BaseSource:
    """Return where the base comes from: the cache if there is one, else the workspace folder `target`.

    `settings` is the folder of the model's config.json.
    """
    own = WorkspaceBase(source, target, settings, layout)
    if cache is None:
        return own
    if source.known_version is not None and own.is_complete(source.known_version):
        return own
    return CachedBase(source, own, cache, settings, layout)


class CachedBase:
    """A base that is shared. See BaseSource.

    The server is asked for every file with the job's own credentials in any case, and a model on a volume is read: a
    job that may not read the model gets no further. Where the cache cannot be used, the base is made in the workspace,
    and `remark` has the reason.
    """

    def __init__(
        self,
        source: SharedModel,
        own: WorkspaceBase,
        cache: ModelCache,
        settings: Path,
        layout: BaseLayout,
        wait: Callable[[], None] = lambda: time.sleep(_WAIT_SECONDS),
    ) -> None:
        """Create. `own` is used without the cache, `wait` waits while another pod works."""
        self.activity = source.making
        self.origin: Origin = source.origin
        self.remark = ""
        self._source, self._own, self._cache, self._wait = source, own, cache, wait
        self._settings, self._layout = settings, layout
        self._version = source.known_version

    def require_room(self) -> None:
        """See BaseSource. Whether the cache is sound is found out when it is read."""
        if self._version is None:
            # Whether the base is in the cache is known only when the weights have been read.
            self._source.check_weights(0)
            return
        try:
            here = self._cache.find(self._key) is not None or self._cache.bytes_being_made(self._key) is not None
            if here:
                return
            if self._layout.bytes <= self._cache.free_bytes():
                self._source.check_weights(0)
                return
            self._require_room_without(UnusableCacheError(self._no_room(0)))
        except UnusableCacheError as error:
            self._require_room_without(error)

    def base(self, on_bytes: OnBytes) -> Base:
        """See BaseSource. The cache is untouched until the job may read the model."""
        self._source.require_readable()
        if self._version is None:
            self.activity = self._source.activity
            self._version = self._source.version(on_bytes)
            if self._own.is_complete(self._version):
                return self._own.base(on_bytes)
        try:
            base = self._through_cache(on_bytes)
        except UnusableCacheError as error:
            reason = error
        else:
            self._own.discard()
            return base
        self.activity = f"the model cache cannot be used ({reason}): {self._source.making}"
        self.remark = _remark(f"the model cache cannot be used ({reason}): the base was made in the workspace")
        self._require_room_without(reason)
        return self._own.base(on_bytes)

    def _require_room_without(self, reason: UnusableCacheError) -> None:
        """Check whether the base can be made in the workspace.

        A workspace without room for it is no mistake of the user's while there is a cache: that failure is retried if
        the cache may be back then.
        """
        try:
            self._own.require_room()
        except StepFailure as failure:
            passing = reason.may_pass and failure.exit_code is ExitCode.STORAGE_FULL
            code = ExitCode.UNREACHABLE if passing else failure.exit_code
            retried = "; the step is retried" if passing else ""
            raise StepFailure(code, f"{failure.message}; the model cache cannot be used: {reason}{retried}") from None

    def _through_cache(self, on_bytes: OnBytes) -> Base:
        while True:
            found = self._cache.find(self._key)
            base = None if found is None else self._use(found, on_bytes)
            if base is not None:
                self.origin = "cache"
                return base
            with self._cache.claim(self._key) as place:
                # Another pod may have completed it between the two.
                if place is not None and self._cache.find(self._key) is None:
                    base = self._make(place, on_bytes)
                elif place is not None:
                    self._cache.discard(place)
            if base is not None:
                return base
            if place is None:
                self.activity = "waiting for another job to quantize"
                on_bytes(min(self._cache.bytes_being_made(self._key) or 0, self._layout.bytes), self._layout.bytes)
                self._wait()

    def _use(self, found: CachedFolder, on_bytes: OnBytes) -> Base | None:
        """The base in the cache.

        Returns None if it was damaged, and sets it aside.
        """
        self.activity = "checking the cached"
        try:
            manifest = found.manifest()
            found.require_sound(manifest, on_bytes)
            self._require_of_model(found.path, manifest)
        except DamagedCacheError as damage:
            self.remark = _remark(f"the base in the cache was damaged ({damage}): what is wrong was made again")
            self._cache.set_aside(found)
            return None
        return Base(found.path, manifest, self._revision(manifest))

    def _require_of_model(self, folder: Path, manifest: BaseManifest) -> None:
        """Raise DamagedCacheError unless this job would have made the same, but for the numbers.

        Weights are only compared by their sum, which is the manifest's.
        """
        originals = self._source.originals()
        made_of = {name: originals.get(name) or digest for name, digest in manifest.sources.items()}
        wanted = (self._version, self._layout.quantization, originals.keys(), manifest.sources)
        if (manifest.version, manifest.quantization, manifest.sources.keys(), made_of) != wanted:
            raise DamagedCacheError("it was made of another model")
        try:
            with read_errors():
                small = small_files(folder, manifest, self._settings, self._layout)
                require_tensors(folder, manifest.sources, self._layout)
        except (StepFailure, SafetensorError, ValueError) as error:
            raise DamagedCacheError(f"its weights are not those of the model: {error}") from error
        if manifest.files != {name: manifest.files[name] for name in originals} | describe_files(small):
            raise DamagedCacheError("its configuration is another one")

    def _make(self, place: Path, on_bytes: OnBytes) -> Base | None:
        """Make it in the cache's folder, or return None if another pod was faster."""
        with volume_errors():
            present = bytes_below(place.parent)
        if self._layout.bytes - present > self._cache.free_bytes():
            raise UnusableCacheError(self._no_room(present))
        self._source.check_weights(0)
        with volume_errors():
            conversion = BaseConversion(place, self._settings, self._known_version, self._layout, self._source.uri)
            self.activity = "checking what another job has left of"
            conversion.keep_sound(self._source.originals(), on_bytes)
            kept = bool(conversion.digests)
        self.activity = self._source.making
        self._source.weights(_InCache(conversion), on_bytes)
        try:
            with volume_errors():
                manifest = conversion.complete()
                if kept:
                    require_tensors(place, manifest.sources, self._layout)
        except (StepFailure, SafetensorError, ValueError):
            if not kept:
                raise
            # Another pod's leftover does not fit the model, whatever its sums are: the next round starts from the
            # beginning.
            self._cache.discard(place)
            return None
        folder = self._cache.complete(place, self._key)
        return None if folder is None else Base(folder, manifest, self._revision(manifest))

    def _revision(self, manifest: BaseManifest) -> str:
        return self._source.revision(manifest.sources)

    @property
    def _known_version(self) -> str:
        if self._version is None:
            raise RuntimeError("the weights have not been read yet")
        return self._version

    @property
    def _key(self) -> str:
        return cache_key(self._known_version, self._layout.quantization)

    def _no_room(self, present: int) -> str:
        needed = self._layout.bytes - present
        return f"it has {sizes(self._cache.free_bytes())} free, and the base needs {sizes(needed)}"


@dataclass(frozen=True)
class _InCache:
    """A conversion whose volume is the cache's. See Conversion."""

    conversion: BaseConversion

    @property
    def digests(self) -> Mapping[str, str]:
        with volume_errors():
            return self.conversion.digests

    def convert(self, path: Path, sha256: str) -> None:
        with volume_errors():
            self.conversion.convert(path, sha256)


def _remark(text: str) -> str:
    """The text as a status can have it. It may quote file names of any writer."""
    return shortened(one_line(text), _MAX_REMARK)


_DESCRIPTIONS = ("quant_state.", "quant_map", "nested_quant_map")
"""What says how to read a layer. The other tensors are the model's numbers."""


def require_tensors(folder: Path, files: Iterable[str], layout: BaseLayout) -> None:
    """Raise ValueError, naming the tensor, unless these files have the tensors of a base, and what reads them.

    Compared are names, types and shapes, and of each 4-bit layer its description and its tables: kernels read as many
    constants as the description asks for, and do not look where a tensor ends. The model's numbers are not read.
    Raises SafetensorError for a file of another format, OSError.
    """
    headers = {file: _headers(folder / file) for file in files}
    stored = {name: header for found in headers.values() for name, header in found.items()}
    wanted = layout.tensors(stored)
    if missing := wanted.keys() - stored.keys():
        raise ValueError(f"{min(missing)} is missing")
    for file, found in headers.items():
        for name, (dtype, shape) in found.items():
            if name not in wanted:
                raise ValueError(f"{name} belongs to no layer")
            entry, _ = wanted[name]
            if (dtype, shape) != (entry.dtype, entry.shape):
                raise ValueError(f"{name} is {dtype} {list(shape)}, and must be {entry.dtype} {list(entry.shape)}")
        _require_descriptions(folder / file, {name: layer for name in found if (layer := wanted[name][1]) is not None})


def _headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a file, by name."""
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
        return {name: (header.get_dtype(), tuple(header.get_shape())) for name, header in slices.items()}


def _require_descriptions(path: Path, layers: Mapping[str, StoredTensor]) -> None:
    with safe_open(path, framework="pt") as opened:
        for name, layer in layers.items():
            if not layer.role.startswith(_DESCRIPTIONS):
                continue
            try:
                layer.ours(opened.get_tensor(name))
            except ValueError as error:
                raise ValueError(f"{name} is no part of a 4-bit layer: {error}") from error
