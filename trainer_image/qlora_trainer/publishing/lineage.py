"""States the origin of an adapter's files, and signs that if there is a key."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_api import contract
from qlora_api.lineage import (
    LINEAGE_TYPE,
    SIGNED_FILE,
    UNSIGNED_FILE,
    Lineage,
    LineageBase,
    LineageData,
    LineageJob,
    LineageResult,
    LineageTrainer,
    Statement,
    Subject,
)
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.publishing.manifest import run_manifest
from qlora_trainer.publishing.signing import BUNDLE_TYPE, PAYLOAD_TYPE, PrivateKey, read_private_key, sign
from qlora_trainer.stores.contents import Contents, Manifest
from qlora_trainer.stores.destinations.destination import Destination, publish_folder
from qlora_trainer.stores.destinations.registry import RegistryDestination, artifact_digest


@dataclass(frozen=True)
class LineageFile:
    """A statement, signed or not."""

    name: str
    media_type: str
    content: bytes
    """JSON. The same run, files and key give the same bytes."""

    @property
    def is_signed(self) -> bool:
        """Whether it was signed with the key of the profile."""
        return self.name == SIGNED_FILE

    @property
    def annotations(self) -> dict[str, str]:
        """A registry's list entry for it, as from cosign."""
        signed = {"dev.sigstore.bundle.content": "dsse-envelope"} if self.is_signed else {}
        return {**signed, "dev.sigstore.bundle.predicateType": LINEAGE_TYPE}


def publish_with_lineage(
    job: TrainedJob, destination: Destination, contents: Contents, *, namespace: str, key: PrivateKey | None
) -> str:
    """Publish the files with a statement of their origin, and return their exact address.

    In a registry the statement is attached to the artifact, since an artifact cannot hold a statement about itself, and
    there cosign and admission policies find it: of what was packed here, whatever the tag names by then. Raises
    StepFailure as `publish_folder`.
    """
    manifest = run_manifest(job, contents)
    if isinstance(destination, RegistryDestination):
        uri = publish_folder(destination, contents, manifest)
        sha256 = artifact_digest(manifest).removeprefix("sha256:")
        lineage = lineage_file(job, manifest, namespace, key, {destination.uri: sha256})
        destination.attach(lineage.content, lineage.media_type, lineage.annotations, manifest)
        return uri
    lineage = lineage_file(job, manifest, namespace, key)
    contents = {**contents, lineage.name: lineage.content}
    return publish_folder(destination, contents, run_manifest(job, contents))


def read_signing_key(file: Path) -> PrivateKey | None:
    """The key of the profile, or None without its file. Raises StepFailure BAD_CONFIGURATION for an unusable one.

    It is read before anything is published, because a publication cannot be undone.
    """
    if not file.is_file():
        return None
    try:
        return read_private_key(file.read_bytes())
    except ValueError as error:
        raise bad_configuration(
            f"the signing key of the profile (signingKey) {error}: ask the administrator to correct the Secret, then "
            "retry the job (spec.retry.request)"
        ) from error


def lineage_file(
    job: TrainedJob,
    manifest: Manifest,
    namespace: str,
    key: PrivateKey | None,
    artifacts: Mapping[str, str] | None = None,
) -> LineageFile:
    """The statement about the manifest's files, signed if there is a key.

    `artifacts`: SHA-256, in hexadecimal, of what holds the files, by its address.
    """
    digests = {**{name: file.sha256 for name, file in manifest.files.items()}, **(artifacts or {})}
    subject = tuple(Subject(name=name, digest={"sha256": digest}) for name, digest in sorted(digests.items()))
    statement = Statement(subject=subject, predicate=_lineage(job, manifest, namespace))
    payload = json.dumps(statement.dump(), sort_keys=True).encode()
    if key is None:
        return LineageFile(UNSIGNED_FILE, PAYLOAD_TYPE, payload + b"\n")
    return LineageFile(SIGNED_FILE, BUNDLE_TYPE, sign(payload, key))


def _lineage(job: TrainedJob, manifest: Manifest, namespace: str) -> Lineage:
    spec, prepared, trained = job.spec, job.prepared, job.trained
    parts = {"quantization": spec.quantization, "lora": spec.lora, "training": spec.training}
    return Lineage(
        job=LineageJob(name=job.name, namespace=namespace, uid=job.uid),
        base=LineageBase(source=spec.model.source, revision=prepared.model_revision, sha256=trained.base_sha256),
        initial_adapter=prepared.initial_adapter,
        continues=spec.continues,
        data=LineageData(
            sources=tuple(spec.dataset.addresses.values()),
            sha256=prepared.dataset.sha256,
            prepared=prepared.fingerprint,
            rows=prepared.dataset.used_rows,
            eval_rows=prepared.dataset.eval_rows,
        ),
        trainer=_trainer(manifest),
        settings={name: part.dump() for name, part in parts.items()},
        fingerprint=trained.fingerprint,
        spec_sha256=manifest.spec_sha256,
        result=LineageResult(
            steps=trained.training_step,
            adapter_step=trained.kept_step,
            attempts=trained.attempts,
            loss=trained.loss,
            initial_eval_loss=trained.initial_eval_loss,
            eval_loss=trained.eval_loss,
            gate=job.gate,
        ),
    )


def _trainer(manifest: Manifest) -> LineageTrainer:
    image = os.environ.get(contract.ENV_IMAGE)
    _, _, digest = (image or "").partition("@")
    return LineageTrainer(image=image, digest=digest or None, libraries=manifest.libraries)
