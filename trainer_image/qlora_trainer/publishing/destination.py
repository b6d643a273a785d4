"""Decides where a finished folder goes and whether it may, whatever the address."""

from pathlib import Path
from typing import Protocol

from qlora_api.sources import HubSource, ObjectStoreSource, RegistrySource, VolumeSource, parse_source
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.paths import confined
from qlora_trainer.publishing.hub_repository import HubDestination
from qlora_trainer.publishing.manifest import Manifest
from qlora_trainer.publishing.oci_artifact import RegistryDestination
from qlora_trainer.publishing.s3_folder import ObjectDestination
from qlora_trainer.publishing.volume_folder import VolumeFolder
from qlora_trainer.stores.contents import Contents
from qlora_trainer.stores.oci import require_allowed


class Destination(Protocol):
    """A place for one published folder. Methods raise StepFailure."""

    @property
    def uri(self) -> str:
        """Its address, as the spec has it."""

    def published(self) -> Manifest | None:
        """The manifest of the folder that is there, complete or damaged; None if none can be read."""

    def holder(self) -> Manifest | None:
        """The manifest of the run that has published there or has begun to."""

    def is_free(self) -> bool:
        """Whether nothing is there."""

    def damaged(self, manifest: Manifest) -> str | None:
        """The first file of the manifest that is missing there or has another SHA-256; None if all is well."""

    def write(self, contents: Contents, manifest: Manifest) -> None:
        """Write the files, read them back, and write the manifest last. Goes on where an earlier attempt stopped."""

    def location(self) -> str:
        """The address of exactly what is published: with a commit or digest where there is one."""


def open_destination(context: StepContext, address: str | None, folder: Path) -> Destination:
    """The destination of this address; without one, `folder`, which lies in the workspace.

    Raises StepFailure if the address is not a folder of its own on a mounted claim, or a Secret is missing.
    """
    if address is None:
        root = context.workspace.root
        uri = f"{context.workspace_uri}/{folder.relative_to(root)}"
        return VolumeFolder(confined(folder, root), uri, owner=context.pod_uid)
    source = parse_source(address)
    if isinstance(source, VolumeSource):
        root = context.mounts.volume(VolumeSource(source.claim))
        return VolumeFolder(confined(root / source.path, root), str(source), owner=context.pod_uid)
    if isinstance(source, ObjectStoreSource):
        return ObjectDestination(source, context.secret("output"))
    if isinstance(source, HubSource):
        return HubDestination(source, context.secret("output"))
    if isinstance(source, RegistrySource):
        return RegistryDestination(source, context.secret("output"), allowed=context.registries)
    raise TypeError(f"the schema admits no destination like {address}")


def publish_folder(destination: Destination, contents: Contents, manifest: Manifest) -> str:
    """Have the files at the destination with their manifest, verified; returns the address of exactly that.

    Nothing is written if they are there already. Raises StepFailure (BAD_CONFIGURATION) if somebody else's files are
    there.
    """
    if not is_published(destination, manifest):
        refuse_occupied(destination, manifest)
        destination.write(contents, manifest)
    return destination.location()


def is_published(destination: Destination, manifest: Manifest) -> bool:
    """Whether exactly this is there, every file with its SHA-256."""
    return destination.published() == manifest and destination.damaged(manifest) is None


def destinations(spec: QLoRAJobSpec) -> list[str]:
    """The addresses, outside the workspace, that a job publishes to."""
    merged = spec.output.merged.destination if spec.output.merged else None
    return [address for address in (spec.output.destination, merged) if address]


def check_destination(context: StepContext, address: str) -> None:
    """Raise StepFailure if a volume's folder that is to be published to holds what is not this job's.

    For the step that runs before anything is paid for. Other destinations cannot be asked by it: it has no credentials
    to write there. Of a registry it knows at least whether it is allowed.
    """
    source = parse_source(address)
    if isinstance(source, RegistrySource):
        require_allowed(source, context.registries)
    if not isinstance(source, VolumeSource):
        return
    destination = open_destination(context, address, context.workspace.root)
    holder = destination.holder()
    if not destination.is_free() and (holder is None or holder.job_uid != context.job_uid):
        raise _occupied(destination, holder)


def refuse_occupied(destination: Destination, manifest: Manifest) -> None:
    """Raise StepFailure (BAD_CONFIGURATION), naming what is there, unless nothing is or this run's own."""
    if destination.is_free():
        return
    holder = destination.holder()
    if holder is None or not holder.same_run(manifest):
        raise _occupied(destination, holder)


def _occupied(destination: Destination, holder: Manifest | None) -> StepFailure:
    if holder is None:
        return bad_configuration(
            f"the destination {destination.uri} holds something that no QLoRAJob has published: choose another one"
        )
    return bad_configuration(
        f"the destination {destination.uri} holds another adapter, of job {holder.job_name!r} (UID {holder.job_uid}, "
        f"trained on {holder.base_model}): choose another one or delete that"
    )
