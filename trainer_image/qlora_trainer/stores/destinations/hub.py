"""Publishes into a model repository of the hub, in one commit."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import get_token

from qlora_api.sources import HubSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import unreachable
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.core.filesystem import remove
from qlora_trainer.stores.contents import STATEMENTS, Contents, Manifest
from qlora_trainer.stores.destinations.destination import StoredFile, StoreFolder, reject_occupied
from qlora_trainer.stores.hub import Hub, HubFile, Listing

# The files that the hub itself creates in a new repository.
_OF_THE_HUB = frozenset({".gitattributes"})


class HubDestination(StoreFolder):
    """A model repository of the hub. See StoreFolder."""

    def __init__(self, source: HubSource, secret: Secret, *, writes: bool = True) -> None:
        """Use the Secret's token, or without one that of the logged-in user."""
        self.uri = f"hf://{source.repository}"
        self._source = source
        own = get_token()
        values = secret.require("token", has_own=own is not None)
        self._hub = Hub(own if values is None else values["token"], field=secret.field, writes=writes)

    def files(self) -> Mapping[str, StoredFile]:
        """See StoreFolder."""
        listing, hub = self._listing(), self._hub
        if listing is None:
            return {}
        return {
            name: StoredFile(file.size, partial(hub.digest, listing, file), partial(self._download, listing, file))
            for name, file in listing.files.items()
        }

    def read(self, name: str, *, most: int) -> bytes | None:
        """See StoreFolder."""
        file = self.files().get(name)
        if file is None or file.size > most:
            return None
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            file.download(path, lambda _: None)
            return path.read_bytes()

    def is_free(self) -> bool:
        """See Destination."""
        return set(self.files()) <= _OF_THE_HUB

    def require_writable(self) -> None:
        """See Destination."""
        self._hub.require_writable(self._source.repository)

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """See Destination."""
        listing = self._listing() or self._hub.make(self._source.repository)
        # The hub rejects a commit whose parent is no longer the newest, so that a run that publishes from here on does
        # not go unnoticed either.
        reject_occupied(self, manifest.publisher)
        commit = self._hub.commit(
            self._source.repository,
            {**contents, PUBLISHED_MANIFEST: manifest.text()},
            f"Publish {manifest.job_name}",
            parent=listing.commit,
            # Statements about other files must not lie next to these.
            without=sorted((STATEMENTS & listing.files.keys()) - contents.keys()),
        )
        damaged = self.damaged(manifest)
        if damaged is not None or self.published() != manifest:
            raise unreachable(
                f"{self.uri}/{damaged or PUBLISHED_MANIFEST} of commit {commit} does not read back as written"
            )

    def location(self, manifest: Manifest) -> str:
        """See Destination."""
        listing = self._listing()
        return self.uri if listing is None else f"{self.uri}@{listing.commit}"

    def _listing(self) -> Listing | None:
        return self._hub.find(self._source.repository, self._source.commit)

    def _download(self, listing: Listing, file: HubFile, path: Path, on_bytes: Callable[[int], None]) -> None:
        self._hub.fetch(listing, file, path.parent, on_bytes)
        # The client's files for resuming a download.
        remove(path.with_name(".cache"))
