"""Publishes into a folder of an object store, where objects appear one by one.

A half-written folder of an earlier attempt looks like files of another run, so the first object is a claim, created
only if there is none. An ETag is no digest: each file is read back, and a publication costs a download of its bytes.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from qlora_api.sources import ObjectStoreSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration, unreachable
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.stores.contents import MAX_MANIFEST_BYTES, STATEMENTS, Contents, Manifest, parse_manifest
from qlora_trainer.stores.destinations.destination import StoredFile, StoreFolder, reject_occupied
from qlora_trainer.stores.objects import ObjectFolder, StoredObject
from qlora_trainer.stores.retry import read_back

# Present while files are being written, so that the next attempt recognizes them as the same run's. The manifest
# replaces it.
_CLAIM = ".manifest.partial.json"
# Written and deleted again to check the permission. It belongs to no run.
_PROBE = ".write-check"


class ObjectDestination(StoreFolder):
    """A folder of an object store. See StoreFolder."""

    def __init__(
        self, source: ObjectStoreSource, secret: Secret, reject: Callable[[str], StepFailure] = bad_configuration
    ) -> None:
        self.uri = str(source)
        self._folder = ObjectFolder(source, secret, reject=reject)

    def files(self) -> Mapping[str, StoredFile]:
        """See StoreFolder."""
        return {name: self._file(found) for name, found in self._folder.list().items()}

    def find(self, names: Iterable[str]) -> Mapping[str, StoredFile]:
        """See StoreFolder. Lists nothing: a user may read and not list."""
        return {name: self._file(self._folder.stat(name)) for name in names}

    def _file(self, found: StoredObject) -> StoredFile:
        return StoredFile(found.size, partial(self._folder.digest, found.name), partial(self._folder.download, found))

    def read(self, name: str, *, most: int) -> bytes | None:
        """See StoreFolder."""
        return self._folder.read(name, most=most)

    def holders(self) -> tuple[Manifest, ...]:
        """See Destination. The claim counts too: concurrent runs never mix their files."""
        claim = parse_manifest(self.read(_CLAIM, most=MAX_MANIFEST_BYTES))
        return (*super().holders(), *(() if claim is None else (claim,)))

    def is_free(self) -> bool:
        """See Destination."""
        return set(self._folder.list()) <= {_PROBE}

    def require_writable(self) -> None:
        """See Destination. Publish deletes objects too."""
        self._folder.write(_PROBE, b"")
        self._folder.delete(_PROBE)

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """See Destination. Skips files that an earlier attempt has written completely."""
        self._claim(manifest)
        self._folder.delete(PUBLISHED_MANIFEST)
        stored = self._folder.list()
        for name, content in contents.items():
            described = manifest.files[name]
            is_whole = name in stored and stored[name].size == described.size
            if not (is_whole and self._folder.digest(name) == described.sha256):
                self._folder.write(name, content)
                if read_back(partial(self._folder.digest, name)) != described.sha256:
                    raise self._differs(name)
        # Statements about other files must not lie next to these.
        for name in (STATEMENTS & stored.keys()) - contents.keys():
            self._folder.delete(name)
        self._folder.write(PUBLISHED_MANIFEST, manifest.text())
        if self.read_manifest() != manifest:
            raise self._differs(PUBLISHED_MANIFEST)
        self._folder.delete(_CLAIM)

    def _differs(self, name: str) -> StepFailure:
        return unreachable(f"{self.uri}/{name} does not read back as it was written: the next attempt writes it again")

    def _claim(self, manifest: Manifest) -> None:
        """Create the claim, unless an earlier attempt has. Raises StepFailure if taken."""
        is_new = self._folder.create(_CLAIM, manifest.text())
        try:
            reject_occupied(self, manifest.publisher)
        except StepFailure:
            # Another run has published, and removed its claim, after this one had found the folder free.
            if is_new:
                self._folder.delete(_CLAIM)
            raise
