"""Gets a base model from the cache of a namespace, or downloads it into the cache for the jobs after this one."""

import errno
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qlora_api.printable import one_line, shortened
from qlora_trainer.core.failures import StepFailure, unreachable
from qlora_trainer.core.filesystem import bytes_below, remove, sizes
from qlora_trainer.model.cache import CachedFolder, CacheManifest, DamagedCacheError, ModelCache, Wanted, cache_key
from qlora_trainer.model.source import (
    QUANTIZING,
    Conversion,
    DownloadedModel,
    OnBytes,
    RemoteModel,
    convert_all,
    file_digests,
)
from qlora_trainer.stores.contents import PublishedFile

_DOWNLOADING = "downloading"
_WAIT_SECONDS = 2.0
_MAX_REMARK = 256
_OF_A_VOLUME = frozenset(
    {
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ESTALE,
        errno.ENOENT,
        errno.ENOLCK,
        errno.EOPNOTSUPP,
    }
)


class CachedDownload:
    """A model on a server whose files are shared. See ModelSource.

    The small files are fetched with the job's own credentials in any case, from the revision that the server has now:
    a job that may not read the model gets no further, and the cache is compared with them. Where the cache cannot be
    used, the model is downloaded into the workspace, and `remark` has the reason.
    """

    def __init__(
        self,
        remote: RemoteModel,
        download: DownloadedModel,
        cache: ModelCache,
        wait: Callable[[], None] = lambda: time.sleep(_WAIT_SECONDS),
    ) -> None:
        """`wait` lets some time pass while another pod fetches the same model."""
        self.activity = _DOWNLOADING
        self.origin: Literal["downloaded", "cache", "volume"] = "downloaded"
        self.remark = ""
        self._remote, self._download, self._cache, self._wait = remote, download, cache, wait
        self._key = cache_key(remote.version, download.small_files)
        self._folder: Path | None = None
        self._beside = 0

    @property
    def bytes_fetched(self) -> int:
        """See ModelSource."""
        return self._download.bytes_fetched

    def settings(self) -> Path:
        """See ModelSource."""
        return self._download.settings()

    def check_weights(self, beside: int) -> None:
        """See ModelSource. Whether the cache is sound is found out when it is read."""
        self._beside = beside
        try:
            here = self._cache.find(self._key) is not None or self._cache.bytes_being_fetched(self._key) is not None
            if here or self._download.weight_bytes() <= self._cache.free_bytes():
                return
        except OSError as error:
            reason = _reason(error)
        else:
            reason = self._no_room(0)
        try:
            self._download.check_weights(beside)
        except StepFailure as failure:
            raise StepFailure(
                failure.exit_code, f"{failure.message}; the model cache cannot be used: {reason}"
            ) from None

    def version(self, on_bytes: OnBytes) -> str:
        """See ModelSource."""
        return self._download.version(on_bytes)

    def weights(self, conversion: Conversion, on_bytes: OnBytes) -> str:
        """See ModelSource."""
        try:
            folder, digests = self._through_cache(on_bytes)
        except (ConnectionError, TimeoutError):
            raise
        except OSError as error:
            reason = _reason(error)
        else:
            self.activity, self._folder = QUANTIZING, folder
            of_weights = {name: digests[name] for name in self._download.weight_names()}
            convert_all(conversion, folder, of_weights, on_bytes)
            return self._remote.revision(lambda: digests)
        self.activity = f"the model cache cannot be used ({reason}): {_DOWNLOADING}"
        self.remark = _remark(f"the model cache cannot be used ({reason}): the model was downloaded into the workspace")
        self._download.check_weights(self._beside)
        return self._download.weights(conversion, on_bytes)

    def complete(self) -> Path:
        """See ModelSource."""
        if self._folder is None:
            return self._download.complete()
        self._download.discard()
        return self._folder

    def _through_cache(self, on_bytes: OnBytes) -> tuple[Path, Mapping[str, str]]:
        """The model's folder in the cache, and the digests of its files."""
        while True:
            found = self._cache.find(self._key)
            digests = None if found is None else self._use(found, on_bytes)
            if found is not None and digests is not None:
                self.origin = "cache"
                return found.path, digests
            filled = None
            with self._cache.claim(self._key) as partial:
                # Another pod may have completed it between the two.
                if partial is not None and self._cache.find(self._key) is None:
                    self.activity = _DOWNLOADING
                    filled = self._fill(partial, on_bytes)
                elif partial is not None:
                    remove(partial)
            if filled is not None:
                return filled
            if partial is None:
                self.activity = "waiting for another job to download"
                total = self._download.weight_bytes()
                on_bytes(min(self._cache.bytes_being_fetched(self._key) or 0, total), total)
                self._wait()

    def _use(self, found: CachedFolder, on_bytes: OnBytes) -> Mapping[str, str] | None:
        """The digests of the model's files in the cache; None if it was damaged, and is then set aside."""
        self._remote.require_readable(self._download.weight_names())
        self.activity = "checking the cached"
        try:
            return found.verified_digests(self._wanted(), on_bytes)
        except DamagedCacheError as damage:
            self.remark = _remark(f"the model in the cache was damaged ({damage}): what is wrong was downloaded again")
            self._cache.set_aside(found, damage.sound)
            return None

    def _wanted(self) -> Mapping[str, Wanted]:
        """All files: the small ones as they have just been fetched, the weights as the server lists them."""
        digests = {**self._remote.digests, **self._download.small_digests()}
        names = (*self._download.small_files, *self._download.weight_names())
        return {name: Wanted(self._remote.sizes[name], digests.get(name)) for name in names}

    def _fill(self, partial: Path, on_bytes: OnBytes) -> tuple[Path, Mapping[str, str]] | None:
        """Download into a claimed folder; returns what `_through_cache` does, None if another pod has been faster."""
        missing = self._download.weight_bytes() - bytes_below(partial)
        if missing > self._cache.free_bytes():
            raise OSError(errno.ENOSPC, self._no_room(bytes_below(partial)))
        for name in self._download.small_files:
            remove(partial / name)
            shutil.copyfile(self._download.folder / name, partial / name)
        with _errors_of_the_volume():
            self._download.fetch_weights(partial, on_bytes)
        self.activity = "checking the downloaded"
        wanted = self._wanted()
        digests = file_digests(partial, wanted, on_bytes)
        for name, file in wanted.items():
            if digests[name] != (file.sha256 or digests[name]):
                remove(partial / name)
                raise unreachable(f"{self._remote.uri}/{name} arrived with another SHA-256: it is downloaded again")
        files = {name: PublishedFile(sha256=digests[name], size=file.size) for name, file in wanted.items()}
        manifest = CacheManifest(source=self._remote.uri, version=self._remote.version, files=files)
        folder = self._cache.complete(partial, self._key, manifest)
        return None if folder is None else (folder, digests)

    def _no_room(self, present: int) -> str:
        needed = self._download.weight_bytes() - present
        return f"it has {sizes(self._cache.free_bytes())} free, and the model needs {sizes(needed)}"


@contextmanager
def _errors_of_the_volume() -> Iterator[None]:
    """Raise the OSError of a volume that a client has reported as a transfer that was cut off."""
    try:
        yield
    except StepFailure as failure:
        cause = failure.__cause__
        if isinstance(cause, OSError) and cause.errno in _OF_A_VOLUME:
            raise cause from None
        raise


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _remark(text: str) -> str:
    """The text, which may quote the name of a file that anybody has put there, as a status can have it."""
    return shortened(one_line(text), _MAX_REMARK)
