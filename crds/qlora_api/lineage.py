"""Builds the in-toto statement of an adapter's inputs.

Publish writes it and users verify it.

Source: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
"""

from typing import Any, Final, Literal

from pydantic import Field

from qlora_api.artifact_status import GateStatus, InitialAdapterStatus
from qlora_api.schema import ObservedModel

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
LINEAGE_TYPE: Final = "https://qlora.dev/lineage/v1"
"""The statement's predicate type. Fields may be added; another meaning would be v2."""
SIGNED_FILE = "lineage.sigstore.json"
"""The signed statement, beside the files: a bundle that cosign verifies too."""
UNSIGNED_FILE = "lineage.intoto.json"
"""The statement by itself, where the profile has no signing key."""


class LineageJob(ObservedModel):
    """The QLoRAJob."""

    name: str
    namespace: str
    uid: str


class LineageBase(ObservedModel):
    """The base model."""

    source: str = Field(description="Its address, as in the spec.")
    revision: str = Field(description="Commit, or digest of the artifact or the content.")
    sha256: str = Field(description="SHA-256 over the SHA-256 of each file of the 4-bit base that was trained on.")


class LineageData(ObservedModel):
    """The rows."""

    sources: tuple[str, ...] = Field(description="Addresses, as in the spec.")
    sha256: str = Field(description="As status.dataset.sha256: of the data file, or of those of the mix.")
    prepared: str = Field(description="SHA-256 of everything that determines the prepared sequences.")
    rows: int = Field(description="Rows that were trained on.")
    eval_rows: int = Field(description="Rows that were held out.")


class LineageTrainer(ObservedModel):
    """The program."""

    image: str | None = Field(
        None, description="Image of the job's pods, as the profile names it; not set on a laptop."
    )
    digest: str | None = Field(None, description="Its digest, sha256:…, if the profile names that.")
    libraries: dict[str, str] = Field(description="Versions of what decides the numbers.")


class LineageResult(ObservedModel):
    """The run."""

    steps: int = Field(description="Optimizer steps done.")
    adapter_step: int = Field(description="The step that the adapter is of.")
    attempts: int = Field(description="Number of starts of training.")
    loss: float = Field(description="Training loss of the last step, nats per target token, or per pair.")
    initial_eval_loss: float | None = Field(None, description="Loss on the held-out rows before training.")
    eval_loss: float | None = Field(None, description="The same of the adapter.")
    gate: GateStatus | None = Field(None, description="Result of spec.gate; not set without it.")


class Lineage(ObservedModel):
    """The predicate: what the files of an adapter were made of, and how."""

    job: LineageJob
    base: LineageBase
    initial_adapter: InitialAdapterStatus | None = Field(None, description="The adapter that training began with.")
    continues: str | None = Field(None, description="The job whose run was continued.")
    data: LineageData
    trainer: LineageTrainer
    settings: dict[str, Any] = Field(description="quantization, lora and training of the spec, with all defaults.")
    fingerprint: str = Field(description="SHA-256 of everything that determines the adapter.")
    spec_sha256: str = Field(description="SHA-256 of the job's spec with all defaults, as sorted JSON.")
    result: LineageResult


class Subject(ObservedModel):
    """A file, or the artifact of a registry that holds all of them."""

    name: str
    digest: dict[str, str]


class Statement(ObservedModel):
    """The statement about the files."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(STATEMENT_TYPE, alias="_type")
    subject: tuple[Subject, ...]
    predicate_type: Literal["https://qlora.dev/lineage/v1"] = LINEAGE_TYPE
    predicate: Lineage
