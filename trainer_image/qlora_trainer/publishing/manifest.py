"""Describes a published folder: its files, and the run that made it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import Field, ValidationError

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.lineage import SIGNED_FILE, UNSIGNED_FILE
from qlora_api.schema import ObservedModel, replace
from qlora_api.spec.job import MUTABLE_FIELDS
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.model.source.files import PROCESSOR_FILES, TOKENIZER_FILES, tokenizer_and_processor
from qlora_trainer.stores.contents import Contents, PublishedFile, describe_files

MAX_MANIFEST_BYTES = 2**22
"""Enough for tens of thousands of files. Limited, since any writer may make it."""
SHARED_BASE = "base"
"""In place of a job's UID: the base is of every job that was trained on it."""
STATEMENTS = frozenset({SIGNED_FILE, UNSIGNED_FILE})
"""Files with a statement of the others' origin. A folder has one at most."""
_LIBRARIES = ("qlora-operator", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


class Manifest(ObservedModel):
    """The files of a published folder, and the run that made it."""

    job_uid: str
    job_name: str
    fingerprint: str = Field(description="SHA-256 of everything that determines the adapter.")
    spec_sha256: str = Field(description="SHA-256 of the job's spec with all defaults, as sorted JSON.")
    base_model: str
    base_revision: str
    libraries: dict[str, str]
    files: dict[str, PublishedFile]
    initial_adapter: InitialAdapterStatus | None = Field(
        None, description="The adapter that training continued from; not set if it began with a new one."
    )

    def text(self) -> bytes:
        """The content of the manifest's file. The same run gives the same bytes."""
        return (json.dumps(self.dump(), indent=2, sort_keys=True) + "\n").encode()

    @property
    def publisher(self) -> "Publisher":
        """The run that has published it, or will."""
        return Publisher(self.job_uid, self.fingerprint, self.tokenizer if self.job_uid == SHARED_BASE else None)

    @property
    def tokenizer(self) -> dict[str, PublishedFile]:
        """Its files of a tokenizer and of a processor, by name."""
        return {name: file for name, file in self.files.items() if name in TOKENIZER_FILES | PROCESSOR_FILES}


@dataclass(frozen=True)
class Publisher:
    """A publisher: a run of a job or, of a base, every job that has it. Unknown parts are None, and not compared.

    Neither addresses nor versions of libraries are part of it: the same base from a mirror is the same base.
    """

    job_uid: str
    """SHARED_BASE for a base."""
    fingerprint: str | None = None
    tokenizer: Mapping[str, PublishedFile] | None = None
    """What lies beside a base, by name."""

    def owns(self, manifest: Manifest) -> bool:
        """Whether it may replace what that manifest describes."""
        return (
            self.job_uid == manifest.job_uid
            and self.fingerprint in (None, manifest.fingerprint)
            and self.tokenizer in (None, manifest.tokenizer)
        )


def base_publisher(base_sha256: str, model: Path) -> Publisher:
    """The publisher of the base of that sum with the tokenizer in `model`."""
    return Publisher(SHARED_BASE, base_sha256, describe_files(tokenizer_and_processor(model)))


def run_manifest(job: TrainedJob, contents: Contents) -> Manifest:
    """The manifest of these files of a job. Raises OSError if a file cannot be read."""
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(MUTABLE_FIELDS))
    return Manifest(
        job_uid=job.uid,
        job_name=job.name,
        fingerprint=job.trained.fingerprint,
        spec_sha256=hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(),
        base_model=job.spec.model.source,
        base_revision=job.prepared.model_revision,
        libraries={name: version(name) for name in _LIBRARIES},
        files=describe_files(contents),
        initial_adapter=job.prepared.initial_adapter,
    )


def base_manifest(job: TrainedJob, contents: Contents) -> Manifest:
    """The manifest of the job's published base, which names no job: all that were trained on it share it.

    Raises OSError if a file cannot be read.
    """
    quantization = json.dumps(job.spec.quantization.dump(), sort_keys=True)
    return replace(
        run_manifest(job, contents),
        job_uid=SHARED_BASE,
        job_name=SHARED_BASE,
        fingerprint=job.trained.base_sha256,
        spec_sha256=hashlib.sha256(quantization.encode()).hexdigest(),
        initial_adapter=None,
    )


def parse_manifest(content: bytes | None) -> Manifest | None:
    """Parse a manifest of at most MAX_MANIFEST_BYTES, or return None."""
    if content is None or len(content) > MAX_MANIFEST_BYTES:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError:
        return None


def read_manifest(path: Path) -> Manifest | None:
    """Read a folder's manifest, or None: no links, pipes or files that are too large."""
    # Reading a pipe would block, and a link can lead to an endless device.
    if path.is_symlink() or not path.is_file():
        return None
    with path.open("rb") as file:
        return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1))
