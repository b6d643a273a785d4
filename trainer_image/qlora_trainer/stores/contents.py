"""Describes a published folder: its files with sizes and digests, and the run that made it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.lineage import SIGNED_FILE, UNSIGNED_FILE
from qlora_api.schema import ApiModel, ObservedModel
from qlora_api.spec.output import BaseType
from qlora_trainer.core.file_names import PROCESSOR_FILES, TOKENIZER_FILES
from qlora_trainer.core.filesystem import file_sha256

MAX_MANIFEST_BYTES = 2**22
"""Enough for tens of thousands of files. Limited, since any writer may make it."""
SHARED_BASES: Mapping[BaseType, str] = {"quantized": "base", "bfloat16": "base-bfloat16"}
"""In place of a job's UID: a base of either type is of every job that was trained on it."""
STATEMENTS = frozenset({SIGNED_FILE, UNSIGNED_FILE})
"""Files with a statement of the others' origin. A folder has one at most."""
Contents = Mapping[str, Path | bytes]
"""Paths or contents of files, by their names in the published folder."""


class PublishedFile(ApiModel):
    """One file of a published folder."""

    sha256: str
    size: int


def describe_files(contents: Contents) -> dict[str, PublishedFile]:
    """SHA-256 and size of each file by its name."""
    described = {}
    for name, content in sorted(contents.items()):
        if isinstance(content, bytes):
            described[name] = PublishedFile(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        else:
            described[name] = PublishedFile(sha256=file_sha256(content), size=content.stat().st_size)
    return described


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
        return Publisher(self.job_uid, self.fingerprint, self.tokenizer if self.is_shared else None)

    @property
    def is_shared(self) -> bool:
        """Whether it is of a base, which no job owns."""
        return self.job_uid in SHARED_BASES.values()

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
    """One of SHARED_BASES for a base."""
    fingerprint: str | None = None
    tokenizer: Mapping[str, PublishedFile] | None = None
    """The files of the tokenizer next to a base, by name."""

    def owns(self, manifest: Manifest) -> bool:
        """Whether it may replace what that manifest describes."""
        return (
            self.job_uid == manifest.job_uid
            and self.fingerprint in (None, manifest.fingerprint)
            and self.tokenizer in (None, manifest.tokenizer)
        )


def parse_manifest(content: bytes | None) -> Manifest | None:
    """Parse a manifest of at most MAX_MANIFEST_BYTES, or return None."""
    if content is None or len(content) > MAX_MANIFEST_BYTES:
        return None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError:
        return None
