"""Publishes into a model repository of the hub, in one commit."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import get_token

from qlora_api.sources import HubSource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, unreachable
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.publishing.manifest import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.hub import Hub, Listing
from qlora_trainer.stores.retry import read_back

# What the hub puts into a repository when it makes it.
_OF_THE_HUB = frozenset({".gitattributes"})


class HubDestination:
    """A model repository of the hub as a destination. See Destination."""

    def __init__(self, source: HubSource, secret: Secret) -> None:
        """The token is that of the Secret; without one, that of the user who is logged in here."""
        self.uri = f"hf://{source.repository}"
        self._repository = source.repository
        own = get_token()
        values = secret.require("token", has_own=own is not None)
        self._hub = Hub(own if values is None else values["token"], field=secret.field, writes=True)

    def published(self) -> Manifest | None:
        """See Destination."""
        listing = self._listing()
        return None if listing is None else self._published(listing)

    def holder(self) -> Manifest | None:
        """See Destination. A commit is there whole or not at all."""
        return self.published()

    def is_free(self) -> bool:
        """See Destination."""
        listing = self._listing()
        return listing is None or _is_empty(listing)

    def damaged(self, manifest: Manifest) -> str | None:
        """See Destination. Every file is read: the digest that the hub lists is the one that a commit has stated."""
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
        # What the commit is made upon must be free: somebody may have published since that was asked.
        holder = self._published(listing)
        if not _is_empty(listing) and (holder is None or not holder.same_run(manifest)):
            raise bad_configuration(f"another job has just published to {self.uri}: give each its own repository")
        everything = {**contents, PUBLISHED_MANIFEST: manifest.text()}
        commit = self._hub.commit(self._repository, everything, f"Publish {manifest.job_name}", parent=listing.commit)
        damaged = self.damaged(manifest)
        if damaged is not None or self.published() != manifest:
            raise unreachable(
                f"{self.uri}/{damaged or PUBLISHED_MANIFEST} of commit {commit} does not read back as written"
            )

    def location(self) -> str:
        """See Destination."""
        listing = self._listing()
        return self.uri if listing is None else f"{self.uri}@{listing.commit}"

    def _listing(self) -> Listing | None:
        return self._hub.find(self._repository)

    def _published(self, listing: Listing) -> Manifest | None:
        file = listing.files.get(PUBLISHED_MANIFEST)
        if file is None or file.size > MAX_MANIFEST_BYTES:
            return None
        with TemporaryDirectory() as folder:
            return parse_manifest(self._hub.fetch(listing, file, Path(folder), lambda _done: None).read_bytes())


def _is_empty(listing: Listing) -> bool:
    return set(listing.files) <= _OF_THE_HUB
