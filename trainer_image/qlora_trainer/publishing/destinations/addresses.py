"""Opens the destination of an address in a job's spec, and checks it early."""

from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource, VolumeSource, parse_source
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
