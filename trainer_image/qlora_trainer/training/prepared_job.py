"""A job that prepare has laid out, as the train step finds it in the workspace."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Self

from qlora_api.contract import WorkspaceLayout
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion, score_settings
from qlora_trainer.core.context import Device, Identity, StepContext
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import ADAPTER_FILE, SAMPLES_FILE
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.model.base.cache import require_whole_in_cache
from qlora_trainer.training.checkpoints.attempts import PodOfJob
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint, numbered_checkpoints
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, digest, run_fingerprint
from qlora_trainer.training.resume import reopened, resumed_attempt


@dataclass(frozen=True)
class PreparedJob:
    """A job that this process trains, known before anything is loaded."""

    document: QLoRAJobDocument
    workspace: WorkspaceLayout
    identity: Identity
    device: Device
    rungs: tuple[int, ...]
    """Optimizer steps after which the job's sweep compares its cells; empty without one that does."""
    prepared: PrepareRecord
    fingerprint: Fingerprint

    @classmethod
    def from_workspace(cls, context: StepContext, ranks: int) -> Self:
        """Return the job of a workspace, to be trained by so many processes.

        Raises StepFailure if it is not prepared, or its base is no longer whole.
        """
        prepared = _prepared(context.workspace.completion("prepare"))
        require_whole_in_cache(context.workspace.root / prepared.base_path, context.mounts.model_cache)
        return cls.from_record(context, prepared, ranks)

    @classmethod
    def from_record(cls, context: StepContext, prepared: PrepareRecord, ranks: int) -> Self:
        """Return the job that prepare has recorded, to be trained by so many processes."""
        fingerprint = run_fingerprint(context.spec, prepared, context.device, ranks)
        return cls(
            context.document, context.workspace, context.identity, context.device, context.rungs, prepared, fingerprint
        )

    @property
    def spec(self) -> QLoRAJobSpec:
        """The job's spec, with the schema's defaults."""
        return self.document.spec

    @property
    def name(self) -> str:
        """The job's name, for messages and reports."""
        return self.document.metadata.name

    @property
    def model_folder(self) -> Path:
        """The base's configuration and tokenizer, and original weights that are kept."""
        return self.workspace.root / self.prepared.model_path

    @property
    def base_folder(self) -> Path:
        """The base model in 4-bit."""
        return self.workspace.root / self.prepared.base_path

    @property
    def data_folder(self) -> Path:
        """The rows, tokenized and in sequences."""
        return self.workspace.root / self.prepared.data_path

    @property
    def initial_adapter_sha256(self) -> str | None:
        """SHA-256 of the adapter that the run is initialized with; None for a new adapter."""
        initial = self.prepared.initial_adapter
        return None if initial is None else initial.sha256

    def texts(self) -> AnswerTexts:
        """Converts tokens into answers."""
        return AnswerTexts(self.model_folder, self.prepared.end_of_turn)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the fingerprint."""
        return digest(self.fingerprint)

    def read_train_record(self) -> TrainRecord | None:
        """The completion record, if it is of this run, with its score, and the adapter still has the recorded sum.

        None if samples are still to be written: jobs that train together leave theirs after the last of them.
        """
        workspace = self.workspace
        record = read_completion(workspace.completion("train"), TrainRecord)
        if record is None or record.fingerprint != self.digest or not self._has_score(record):
            return None
        if self._lacks_samples():
            return None
        adapter = workspace.root / record.adapter_path / ADAPTER_FILE
        return record if adapter.is_file() and file_sha256(adapter) == record.adapter_sha256 else None

    def _lacks_samples(self) -> bool:
        """Whether samples are missing although a checkpoint could make them."""
        workspace, wanted = self.workspace, self.spec.training.samples > 0
        samples = workspace.report / SAMPLES_FILE
        return wanted and not samples.exists() and bool(numbered_checkpoints(workspace.checkpoints))

    def _has_score(self, record: TrainRecord) -> bool:
        """Whether the record has the score that the job asks for."""
        gate = self.spec.gate
        if gate is None or gate.score is None:
            return True
        return record.score is not None and record.score.settings == score_settings(
            gate.score, self.prepared.fingerprint
        )

    def attempt(self, now: Callable[[], datetime]) -> AbstractContextManager[Checkpoint | None]:
        """Train the job in the body, in this process alone, from a checkpoint or None."""
        identity = self.identity
        pod = PodOfJob(identity.pod_uid, identity.attempt, identity.started or now())
        return resumed_attempt(self.workspace, self.fingerprint, pod, now)

    def rest_of_attempt(self, now: Callable[[], datetime]) -> AbstractContextManager[None]:
        """Extend the job's attempt over the body, which follows the training."""
        return reopened(self.workspace, self.identity.pod_uid, now)


def _prepared(path: Path) -> PrepareRecord:
    record = read_completion(path, PrepareRecord)
    if record is None:
        raise bad_configuration(f"{path} is missing or of another release: run the prepare step first")
    return record
