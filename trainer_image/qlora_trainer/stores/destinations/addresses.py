"""Opens the destinations of a job, and published folders, by their addresses, and checks destinations early."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qlora_api.contract import WorkspaceLayout
from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource, Source, VolumeSource, parse_source
from qlora_api.spec.output import OutputSpec, PublishedBaseSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.paths import confine
from qlora_trainer.stores.contents import Publisher
from qlora_trainer.stores.destinations.bucket import ObjectDestination
from qlora_trainer.stores.destinations.destination import Destination, StoreFolder, reject_occupied
from qlora_trainer.stores.destinations.hub import HubDestination
from qlora_trainer.stores.destinations.registry import RegistryDestination
from qlora_trainer.stores.destinations.volume import VolumeFolder
from qlora_trainer.stores.registry_auth import require_allowed


@dataclass(frozen=True)
class JobDestinations:
    """The destinations of a job's adapter, merged model and base; without an address, folders of the workspace.

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

    def base(self, wanted: PublishedBaseSpec) -> Destination:
        """Open the destination of the base."""
        return self._at(wanted.destination)

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


def open_folder(
    source: Source,
    secret: Secret,
    *,
    registries: tuple[str, ...],
    reject: Callable[[str], StepFailure] = bad_configuration,
    writes: bool = True,
) -> StoreFolder:
    """The folder at an address of a server, to publish there or, without `writes`, only to read.

    `reject` makes the failure for a missing or forbidden folder, except of a hub. Raises StepFailure if a
    key of the Secret is missing, or if the registry is not in `registries`, those that the profile allows.
    """
    match source:
        case ObjectStoreSource():
            return ObjectDestination(source, secret, reject)
        case HubSource():
            return HubDestination(source, secret, writes=writes)
        case RegistrySource():
            return RegistryDestination(source, secret, allowed=registries, reject=reject)
    raise bad_configuration(f"{source} is not the address of a folder on a server")


def open_destination(
    address: str, *, mounts: Mounts, secret: Secret, registries: tuple[str, ...], owner: str
) -> Destination:
    """The destination of an address. `owner` distinguishes this process from another one that writes to a volume.

    Raises StepFailure if the address is not a folder inside a mounted claim, and as `open_folder`.
    """
    source = parse_source(address)
    if not isinstance(source, VolumeSource):
        return open_folder(source, secret, registries=registries)
    root = mounts.volume(VolumeSource(source.claim))
    return VolumeFolder(confine(root / source.path, root), str(source), owner=owner)


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
    if secret is None and not isinstance(source, VolumeSource):
        return
    secret = secret or Secret(Path(), "spec.output.secretRef", None)
    destination = open_destination(
        address, mounts=mounts, secret=secret, registries=registries, owner=publisher.job_uid
    )
    reject_occupied(destination, publisher)
    destination.require_writable()
