"""Publishes into a model repository of the hub, in one commit."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import get_token

from qlora_api.sources import HubSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import unreachable
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.publishing.destinations.destination import reject_occupied
from qlora_trainer.publishing.manifest import MAX_MANIFEST_BYTES, STATEMENTS, Manifest, parse_manifest
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.hub import Hub, Listing
from qlora_trainer.stores.retry import read_back

# The files that the hub itself creates in a new repository.
_OF_THE_HUB = frozenset({".gitattributes"})


class HubDestination:
    """A model repository of the hub as a destination. See Destination."""

    def __init__(self, source: HubSource, secret: Secret) -> None:
        """Use the Secret's token, or without one that of the logged-in user."""
        self.uri = f"hf://{source.repository}"
        self._repository = source.repository
        own = get_token()
        values = secret.require("token", has_own=own is not None)
        self._hub = Hub(own if values is None else values["token"], field=secret.field, writes=True)

    def published(self) -> Manifest | None:
        """See Destination."""
        listing = self._listing()
        file = None if listing is None else listing.files.get(PUBLISHED_MANIFEST)
        if listing is None or file is None or file.size > MAX_MANIFEST_BYTES:
            return None
        with TemporaryDirectory() as folder:
            return parse_manifest(self._hub.fetch(listing, file, Path(folder)).read_bytes())

    def holders(self) -> tuple[Manifest, ...]:
        """See Destination. A commit is complete or absent."""
        manifest = self.published()
        return () if manifest is None else (manifest,)

    def is_free(self) -> bool:
        """See Destination."""
        listing = self._listing()
        return listing is None or set(listing.files) <= _OF_THE_HUB

    def require_writable(self) -> None:
        """See Destination."""
        self._hub.require_writable(self._repository)

    def damaged(self, manifest: Manifest) -> str | None:
        """See Destination. Reads every file: the hub only lists a commit's digests."""
        listing = self._listing()
        for name, described in manifest.files.items():
            file = None if listing is None else listing.files.get(name)
            if listing is None or file is None or file.size != described.size:
                return name
            if read_back(partial(self._hub.digest, listing, file)) != described.sha256:
                return name
        return None

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """See Destination."""
        listing = self._listing() or self._hub.make(self._repository)
        # The hub rejects a commit whose parent is no longer the newest, so that a run that publishes from here on does
        # not go unnoticed either.
        reject_occupied(self, manifest.publisher)
        everything = {**contents, PUBLISHED_MANIFEST: manifest.text()}
        # Statements about other files must not lie next to these.
        left = (STATEMENTS & listing.files.keys()) - contents.keys()
        commit = self._hub.commit(
            self._repository, everything, f"Publish {manifest.job_name}", parent=listing.commit, without=sorted(left)
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
        return self._hub.find(self._repository)
