"""Gets the 4-bit base of a job from its workspace or a shared cache, or makes it there."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from qlora_api.contract import ExitCode
from qlora_api.printable import one_line, shortened
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import bytes_below, partial_path, remove, require_space, sizes
from qlora_trainer.model.base.artifact import BaseManifest, has_files, read_manifest
from qlora_trainer.model.base.cache import (
    CachedFolder,
    DamagedCacheError,
    ModelCache,
    UnusableCacheError,
    cache_key,
    read_errors,
    volume_errors,
)
from qlora_trainer.model.base.conversion import BaseConversion, require_tensors, small_files
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.source.files import OnBytes
from qlora_trainer.model.source.models import ModelSource, Origin
from qlora_trainer.stores.contents import describe_files

_WAIT_SECONDS = 2.0
_MAX_REMARK = 256


@dataclass(frozen=True)
class Base:
    """A base that is complete."""

    folder: Path
    manifest: BaseManifest
    revision: str
    """Of the original: commit, or sha256:… of the content."""


class BaseSource(Protocol):
    """A source of the base. Call its methods in this order. They raise StepFailure."""

    @property
    def activity(self) -> str:
        """The activity of `base`, for the progress record."""

    @property
    def origin(self) -> Origin:
        """Where the base came from, once `base` has returned."""

    @property
    def remark(self) -> str:
        """Why a cache was not used, for the user. Empty without such a reason."""

    def require_room(self) -> None:
        """Check, without reading the weights, that they are complete, safe, and fit."""

    def base(self, on_bytes: OnBytes) -> Base:
        """Return the base, and make it if it is missing."""


def open_base_source(
    source: ModelSource, layout: BaseLayout, settings: Path, target: Path, cache: ModelCache | None
) -> BaseSource:
    """Open the cache if there is one, else the workspace folder `target`."""
    own = _WorkspaceBase(source, target, settings, layout)
    if cache is None:
        return own
    if source.known_version is not None and own.is_complete(source.known_version):
        return own
    return _CachedBase(source, own, cache, settings, layout)


class _WorkspaceBase:
    """A base of the job's own, in its workspace."""

    remark = ""

    def __init__(self, source: ModelSource, target: Path, settings: Path, layout: BaseLayout) -> None:
        self._source, self._target, self._settings, self._layout = source, target, settings, layout

    @property
    def activity(self) -> str:
        return self._source.activity

    @property
    def origin(self) -> Origin:
        return self._source.origin

    def is_complete(self, version: str) -> bool:
        """Whether an earlier attempt has made it, of this version of the original."""
        found = read_manifest(self._target)
        if found is None or (found.version, found.quantization) != (version, self._layout.quantization):
            return False
        return has_files(self._target, found)

    def require_room(self) -> None:
        held = bytes_below(partial_path(self._target)) + bytes_below(self._target)
        missing = max(0, self._layout.bytes - held)
        self._source.check_weights(missing)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        require_space(self._target.parent, missing, "the 4-bit base")

    def base(self, on_bytes: OnBytes) -> Base:
        version = self._source.version(on_bytes)
        conversion = BaseConversion(self._target, self._settings, version, self._layout)
        revision = self._source.weights(conversion, on_bytes)
        return Base(self._target, conversion.complete(), revision)

    def discard(self) -> None:
        """Delete the workspace's part of it: the base is elsewhere."""
        remove(self._target)
        remove(partial_path(self._target))


class _CachedBase:
    """A base that is shared.

    The server is asked for every file with the job's own credentials in any case, and a model on a volume is read: a
    job that may not read the model gets no further. Where the cache cannot be used, the base is made in the workspace,
    and `remark` has the reason.
    """

    def __init__(
        self, source: ModelSource, own: _WorkspaceBase, cache: ModelCache, settings: Path, layout: BaseLayout
    ) -> None:
        self.activity = source.making
        self.origin: Origin = source.origin
        self.remark = ""
        self._source, self._own, self._cache = source, own, cache
        self._settings, self._layout = settings, layout
        self._version = source.known_version

    def require_room(self) -> None:
        if self._version is None:
            # Whether the base is in the cache is known only when the weights have been read.
            self._source.check_weights(0)
            return
        try:
            if self._cache.find(self._key) is not None or self._cache.bytes_being_made(self._key) is not None:
                return
            self._validate_cache_room(0)
        except UnusableCacheError as error:
            self._validate_workspace_room(error)

    def base(self, on_bytes: OnBytes) -> Base:
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
        # Not in the handler: an error of the workspace would have that of the cache as its context.
        unusable = f"the model cache cannot be used ({reason})"
        self.activity = f"{unusable}: {self._source.making}"
        self.remark = _remark(f"{unusable}: the base was made in the workspace")
        self._validate_workspace_room(reason)
        return self._own.base(on_bytes)

    def _validate_workspace_room(self, reason: UnusableCacheError) -> None:
        """Check the workspace. Lack of room is retried if the cache may be back."""
        try:
            self._own.require_room()
        except StepFailure as failure:
            passing = reason.can_pass and failure.exit_code is ExitCode.STORAGE_FULL
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
                time.sleep(_WAIT_SECONDS)

    def _use(self, found: CachedFolder, on_bytes: OnBytes) -> Base | None:
        """The base in the cache. Sets it aside, and returns None, if it was damaged."""
        self.activity = "checking the cached"
        try:
            manifest = found.manifest()
            found.require_sound(manifest, on_bytes)
            self._validate_origin(found.path, manifest)
        except DamagedCacheError as damage:
            self.remark = _remark(f"the base in the cache was damaged ({damage}): what is wrong was made again")
            self._cache.set_aside(found)
            return None
        return Base(found.path, manifest, self._source.revision(manifest.sources))

    def _validate_origin(self, folder: Path, manifest: BaseManifest) -> None:
        """Raise DamagedCacheError unless this job would have made the same."""
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
        with volume_errors():
            present = bytes_below(place.parent)
        self._validate_cache_room(present)
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
        return None if folder is None else Base(folder, manifest, self._source.revision(manifest.sources))

    @property
    def _known_version(self) -> str:
        if self._version is None:
            raise RuntimeError("the weights have not been read yet")
        return self._version

    @property
    def _key(self) -> str:
        return cache_key(self._known_version, self._layout.quantization)

    def _validate_cache_room(self, present: int) -> None:
        needed, free = self._layout.bytes - present, self._cache.free_bytes()
        if needed > free:
            raise UnusableCacheError(f"it has {sizes(free)} free, and the base needs {sizes(needed)}")
        self._source.check_weights(0)


@dataclass(frozen=True)
class _InCache:
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
