"""A job that prepare has laid out, as the train step finds it in the workspace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Self

from qlora_api.contract import WorkspaceLayout
from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord, read_completion
from qlora_trainer.core.context import Device, Identity, StepContext, TaskFolder
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.file_names import ADAPTER_FILE, SAMPLES_FILE
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.model.base.cache import require_whole_in_cache
from qlora_trainer.training.checkpoints.attempts import PodOfJob, only_attempt, recorded_attempt, reopened_attempt
from qlora_trainer.training.checkpoints.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    numbered_checkpoints,
    read_checkpoint,
)
from qlora_trainer.training.checkpoints.fingerprint import Fingerprint, differences, digest, run_fingerprint
from qlora_trainer.training.checkpoints.same_run import reject_other_run
from qlora_trainer.training.distributed.ranks import Ranks


@dataclass(frozen=True)
class PreparedJob:
    """A job that this process trains, known before anything is loaded."""

    name: str
    """The job's name, for messages and reports."""
    spec: ResolvedSpec
    """The job's, with the chosen settings."""
    workspace: WorkspaceLayout
    identity: Identity
    device: Device
    rungs: tuple[int, ...]
    """Optimizer steps after which the job's sweep compares its cells; empty without one that does."""
    prepared: PrepareRecord
    fingerprint: Fingerprint
    tasks: TaskFolder | None = None
    """The folder of the tasks of benchmarks, or None if the profile has none."""

    @classmethod
    def from_workspace(cls, context: StepContext, ranks: int) -> Self:
        """Return a prepared job, to be trained by so many processes. Raises StepFailure."""
        path = context.workspace.completion("prepare")
        prepared = read_completion(path, PrepareRecord)
        if prepared is None:
            raise bad_configuration(f"{path} is missing or of another release: run the prepare step first")
        require_whole_in_cache(context.workspace.root / prepared.base_path, context.mounts.model_cache)
        return cls.from_record(context, prepared, ranks)

    @classmethod
    def from_record(cls, context: StepContext, prepared: PrepareRecord, ranks: int) -> Self:
        """Return the job of a record, to be trained by so many processes."""
        spec = prepared.resolve(context.spec)
        fingerprint = run_fingerprint(spec, prepared, context.device, ranks)
        return cls(
            context.document.metadata.name,
            spec,
            context.workspace,
            context.identity,
            context.device,
            context.rungs,
            prepared,
            fingerprint,
            context.mounts.tasks,
        )

    @property
    def may_recompute(self) -> bool:
        """Whether prepare has chosen to keep activations, which can be recomputed after all."""
        chosen = any(choice.setting == "training.gradientCheckpointing" for choice in self.prepared.settings)
        return chosen and self.recomputation.blocks is not None

    @property
    def recomputation(self) -> Recomputation:
        """Of its blocks in backward passes."""
        return self.prepared.recomputation if self.spec.training.gradient_checkpointing else Recomputation(0)

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
        """The completion record, if it is of this run and the adapter still has the recorded sum.

        None if something is still to be measured for the gate, or samples are still to be written: jobs that train
        together leave theirs after the last of them.
        """
        workspace = self.workspace
        record = read_completion(workspace.completion("train"), TrainRecord)
        if record is None or record.fingerprint != self.digest:
            return None
        if record.missing_measurement(self.spec.gate, self.prepared.fingerprint):
            return None
        samples, wanted = workspace.report / SAMPLES_FILE, self.spec.training.samples > 0
        if wanted and not samples.exists() and numbered_checkpoints(workspace.checkpoints):
            return None
        adapter = workspace.root / record.adapter_path / ADAPTER_FILE
        return record if adapter.is_file() and file_sha256(adapter) == record.adapter_sha256 else None

    @contextmanager
    def attempt(self, now: Callable[[], datetime]) -> Iterator[Checkpoint | None]:
        """Run the body as the workspace's only attempt, with the checkpoint that it resumes from, or None.

        Raises StepFailure: UNREACHABLE while another attempt runs, BAD_CONFIGURATION if the checkpoint is of another
        run, RETRIES_EXHAUSTED after too many attempts that were killed at this checkpoint.
        """
        workspace, identity = self.workspace, self.identity
        pod = PodOfJob(identity.pod_uid, identity.attempt, identity.started or now())
        with only_attempt(workspace.records):
            checkpoint = newest_checkpoint(workspace.checkpoints)
            if checkpoint is not None:
                reject_other_run(differences(checkpoint.state.fingerprint, self.fingerprint), checkpoint.path)
            from_step = 0 if checkpoint is None else checkpoint.step
            with recorded_attempt(workspace.records, from_step, pod, now):
                yield checkpoint

    @contextmanager
    def rest_of_attempt(self, now: Callable[[], datetime]) -> Iterator[None]:
        """Extend the job's attempt over the body, which follows the training."""
        records = self.workspace.records
        with only_attempt(records), reopened_attempt(records, self.identity.pod_uid, now):
            yield

    def agree_on_checkpoint(self, ranks: Ranks, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """The checkpoint that the main process has chosen. It passes it as `checkpoint`, and others read it.

        Raises StepFailure (BAD_CONFIGURATION) if this rank's fingerprint differs: it would compute another run.
        """
        chosen = "" if checkpoint is None else checkpoint.path.name
        main_digest, _, main_name = ranks.broadcast_text("start", f"{self.digest} {chosen}").partition(" ")
        if main_digest != self.digest:
            raise bad_configuration(
                f"rank {ranks.rank_info.rank} has another job, other data or other libraries than rank 0: start all "
                "processes with the same image, document and workspace"
            )
        if ranks.is_main or not main_name:
            return checkpoint
        return read_checkpoint(self.workspace.checkpoints / main_name)
