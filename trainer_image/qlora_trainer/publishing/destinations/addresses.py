"""Opens the destinations of a job by their addresses, and checks them early."""

from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import WorkspaceLayout
from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource, VolumeSource, parse_source
from qlora_api.spec.output import OutputSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.paths import confine
from qlora_trainer.publishing.destinations.bucket import ObjectDestination
from qlora_trainer.publishing.destinations.destination import Destination, reject_occupied
from qlora_trainer.publishing.destinations.hub import HubDestination
from qlora_trainer.publishing.destinations.registry import RegistryDestination
from qlora_trainer.publishing.destinations.volume import VolumeFolder
from qlora_trainer.publishing.manifest import Publisher
from qlora_trainer.stores.registry_auth import require_allowed


@dataclass(frozen=True)
class JobDestinations:
    """The destinations of a job's adapter, merged model and 4-bit base; without an address, folders of the workspace.

    Methods raise StepFailure as `open_destination`.
    """

    output: OutputSpec
    workspace: WorkspaceLayout
    workspace_uri: str
    mounts: Mounts
    secret: Secret
    registries: tuple[str, ...]
    owner: str
    """Distinguishes this process from another one that writes to a volume."""

    def adapter(self) -> Destination:
        """Open the destination of the adapter."""
        return self._open(self.output.destination, self.workspace.adapter)

    def merged(self) -> Destination | None:
        """Open the destination of the merged model; None if the job does not ask for one."""
        wanted = self.output.merged
        return None if wanted is None else self._open(wanted.destination, self.workspace.merged)

    def base(self) -> Destination | None:
        """Open the destination of the 4-bit base; None if the job does not ask for one."""
        wanted = self.output.base
        return None if wanted is None else self._at(wanted.destination)

    def _open(self, address: str | None, folder: Path) -> Destination:
        if address is not None:
            return self._at(address)
        root = self.workspace.root
        uri = f"{self.workspace_uri}/{folder.relative_to(root)}"
        return VolumeFolder(confine(folder, root), uri, owner=self.owner)

    def _at(self, address: str) -> Destination:
        return open_destination(
            address, mounts=self.mounts, secret=self.secret, registries=self.registries, owner=self.owner
        )


def open_destination(
    address: str, *, mounts: Mounts, secret: Secret, registries: tuple[str, ...], owner: str
) -> Destination:
    """The destination of an address. `owner` distinguishes this process from another one that writes to a volume.

    Raises StepFailure if the address is not a folder inside a mounted claim, if a key of the Secret is missing, or if
    the registry is not in `registries`, those that the profile allows.
    """
    source = parse_source(address)
    if isinstance(source, VolumeSource):
        return _volume_folder(source, mounts, owner)
    if isinstance(source, ObjectStoreSource):
        return ObjectDestination(source, secret)
    if isinstance(source, HubSource):
        return HubDestination(source, secret)
    if isinstance(source, RegistrySource):
        return RegistryDestination(source, secret, allowed=registries)
    raise TypeError(f"the schema allows no destination like {address}")


def check_destination(
    address: str,
    *,
    mounts: Mounts,
    secret: Secret | None,
    registries: tuple[str, ...],
    publisher: Publisher,
) -> None:
    """Raise StepFailure if the publisher could not publish there: not allowed, occupied, or no right to write.

    For the prepare step, before a GPU is used. Unknown parts of the publisher are not compared: any run of the job
    counts as the same, and any base before the job's is made.
    `secret` is None where the step is not given the credentials, by an operator of the first contract; then only what
    needs none is checked.
    """
    source = parse_source(address)
    if isinstance(source, RegistrySource):
        require_allowed(source, registries)
    if isinstance(source, VolumeSource):
        destination: Destination = _volume_folder(source, mounts, publisher.job_uid)
    elif secret is None:
        return
    else:
        destination = open_destination(
            address, mounts=mounts, secret=secret, registries=registries, owner=publisher.job_uid
        )
    reject_occupied(destination, publisher)
    destination.require_writable()


def _volume_folder(source: VolumeSource, mounts: Mounts, owner: str) -> VolumeFolder:
    root = mounts.volume(VolumeSource(source.claim))
    return VolumeFolder(confine(root / source.path, root), str(source), owner=owner)
