"""Trains adapters of several jobs on one base: load it once, loop, finish each."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from qlora_api.contract import ExitCode
from qlora_api.joinable import SAME_BASE, different_pass, not_joinable, rows_not_apart, setting_alone
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import Device, StepContext, base_name
from qlora_trainer.core.failures import StepFailure, StopRequest, bad_configuration, is_out_of_gpu_memory
from qlora_trainer.core.filesystem import GIB
from qlora_trainer.core.outcome import ENDS_ONE_JOB, as_failure
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.model.adapter.attach import adapter_name, attach_further_adapter
from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.fused_lora import require_apart
from qlora_trainer.steps.sweep_curves import leaving_curves
from qlora_trainer.training.base_check import BaseCheck
from qlora_trainer.training.benchmark_scores import BaseScores, require_benchmarks
from qlora_trainer.training.checkpoints.checkpoint import Checkpoint
from qlora_trainer.training.distributed.device import peak_memory_bytes
from qlora_trainer.training.distributed.ranks import Ranks
from qlora_trainer.training.finish_run import add_benchmarks, add_guards, add_scores, finish_run, write_samples
from qlora_trainer.training.guard_losses import BaseLosses
from qlora_trainer.training.joint_training import Member, run_together
from qlora_trainer.training.open_run import (
    LoadedBase,
    ProcessSettings,
    attach_job_adapter,
    begin_with_earlier,
    open_base,
    open_on_model,
)
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run, Runtime
from qlora_trainer.training.scoring import BaseAnswers


def reject_unjoinable(jobs: Sequence[PreparedJob]) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) unless all jobs can share one base."""
    for job in jobs:
        reason = _reason_alone(job) or _difference(job, jobs[0])
        if reason:
            raise bad_configuration(not_joinable(job.name, reason))


def _reason_alone(job: PreparedJob) -> str:
    """Why a job is trained alone only; empty for no reason."""
    prepared = job.prepared
    apart = prepared.packed or prepared.rows_apart
    return setting_alone(job.spec) or ("" if apart else rows_not_apart(prepared.model_type))


def _difference(job: PreparedJob, first: PreparedJob) -> str:
    """What differs from the first job in what they have to share; empty for nothing."""
    name = first.name
    if job.prepared.base_sha256 != first.prepared.base_sha256:
        return f"its 4-bit base has other bytes than that of {name}: {SAME_BASE}"
    return different_pass(job.spec, first.spec, name)


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Entry:
    """A job that is to be trained."""

    number: int
    """Its place among all jobs."""
    job: PreparedJob
    runtime: Runtime
    held: ExitStack
    """Ends its attempt, and closes the files of its run."""


class _Results(dict[int, TrainRecord | StepFailure]):
    """How jobs have ended, by their place among all jobs."""

    @contextmanager
    def failing_alone(self, number: int, held: ExitStack) -> Iterator[None]:
        """End only that job if the body fails, also by a file error."""
        try:
            yield
        except ENDS_ONE_JOB as error:
            logger.warning("job %d ends", number, exc_info=True)
            self[number] = as_failure(error)
            try:
                with held:
                    raise
            except ENDS_ONE_JOB:
                logger.debug("its attempt has ended")


def train_together(
    contexts: Sequence[StepContext],
    records: Sequence[RecordWriter],
    *,
    stop: StopRequest,
    now: Callable[[], datetime],
    monotonic: Callable[[], float],
) -> list[TrainRecord | StepFailure]:
    """Train each job as the train step does, and return the records, or why one failed, in the order of the jobs.

    What one of them computes does not depend on the others, except for rounding. Jobs that are trained already take no
    part. Raises StepFailure if they cannot be trained together, or not in this memory, and Interrupted after saving all
    when `stop` was set.
    """
    _reject_shared_folders([context.workspace.root for context in contexts])
    results = _Results()
    with ExitStack() as outer, _explained_shortage(contexts[0].device, len(contexts), results):
        held = [outer.enter_context(ExitStack()) for _ in contexts]
        jobs: dict[int, PreparedJob] = {}
        for number, context in enumerate(contexts):
            with results.failing_alone(number, held[number]):
                jobs[number] = PreparedJob.from_workspace(context, ranks=1)
        reject_unjoinable(list(jobs.values()))
        entries = {
            number: _Entry(number, job, Runtime(records[number], stop, now, monotonic), held[number])
            for number, job in jobs.items()
        }
        checkpoints: dict[int, Checkpoint | None] = {}
        for entry in entries.values():
            with results.failing_alone(entry.number, entry.held):
                if (done := entry.job.read_train_record()) is not None:
                    results[entry.number] = done
                    continue
                require_benchmarks(entry.job)
                checkpoints[entry.number] = entry.held.enter_context(entry.job.attempt(now))
        base = _SharedBase(outer, next(filter(None, checkpoints.values()), None))
        members: dict[int, Member] = {}
        for number, checkpoint in checkpoints.items():
            with results.failing_alone(number, entries[number].held):
                members[number] = base.open(entries[number], checkpoint)
        if members:
            # Also one that is left: the model may have the adapters of others, which could not be opened.
            base.require_apart(jobs[max(members)])
        numbers = {member.adapter: number for number, member in members.items()}
        for member, ended in run_together(list(members.values())):
            entry = entries[numbers[member.adapter]]
            with results.failing_alone(entry.number, entry.held):
                if isinstance(ended, StepFailure):
                    # The others leave their curves in the train step that each of them still has.
                    with leaving_curves(entry.job, contexts[0].mounts.sweep) if entry.number == 0 else nullcontext():
                        raise ended
                base.wait()
                results[entry.number] = finish_run(member.run, ended)
                # Now, not after the last of the others: what happens to those must not count as its own end.
                entry.held.close()
        # After the last step: what generates answers leaves the model unfit for training.
        base_losses: BaseLosses = {}
        base_answers: BaseAnswers = {}
        base_scores: BaseScores = {}
        for number, member in members.items():
            if member.run.job.spec.guards:
                _measure(entries[number], member, results, partial(add_guards, base_losses=base_losses))
        for number, member in members.items():
            _measure(
                entries[number], member, results, partial(_answer, base_answers=base_answers, base_scores=base_scores)
            )
    return [results[number] for number in range(len(contexts))]


def _reject_shared_folders(workspaces: Sequence[Path]) -> None:
    folders = [workspace.resolve() for workspace in workspaces]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise bad_configuration(f"{folder} is the workspace of two jobs: give each job its own, and name each once")


def _measure(
    entry: _Entry, member: Member, results: _Results, measure: Callable[[Run, RunState, TrainRecord], TrainRecord]
) -> None:
    """Measure what the job requests of its finished adapter, unless the job has failed."""
    record = results[entry.number]
    if isinstance(record, StepFailure):
        return
    with results.failing_alone(entry.number, entry.held), entry.job.rest_of_attempt(entry.runtime.now):
        results[entry.number] = measure(member.run, member.state, record)


def _answer(
    run: Run, state: RunState, record: TrainRecord, base_answers: BaseAnswers, base_scores: BaseScores
) -> TrainRecord:
    """Add the scores of answers and benchmarks to the record, and leave samples."""
    record = add_scores(run, state, record, base_answers)
    record = add_benchmarks(run, state, record, base_scores)
    write_samples(run)
    return record


class _SharedBase:
    """The base of the first job that can be opened, with the adapters of all."""

    def __init__(self, outer: ExitStack, begun: Checkpoint | None) -> None:
        """`begun`: a checkpoint of one of the jobs, with the number of CPU threads."""
        self._outer, self._begun = outer, begun
        self._base: LoadedBase | None = None
        self._check: BaseCheck | None = None
        self._model: Any = None

    def open(self, entry: _Entry, checkpoint: Checkpoint | None) -> Member:
        """Open the job's run, from its checkpoint if any. Errors end this job alone."""
        job = entry.job
        if self._base is None:
            self._load(entry, checkpoint)
        base, process = self._base, ProcessSettings(entry.runtime, Ranks(), self._check)
        if base is None:
            raise AssertionError("it has just been loaded")
        name = self._attach(base, entry)
        if checkpoint is None:
            begin_with_earlier(self._model, job)
        run, state = open_on_model(job, process, checkpoint, base, self._model)
        if run.history is not None:
            entry.held.enter_context(run.history)
        entry.held.enter_context(run.saver)
        return Member(name, run, state)

    def require_apart(self, job: PreparedJob) -> None:
        """Raise StepFailure (BAD_CONFIGURATION) if a layer mixes the jobs' tokens."""
        try:
            require_apart(self._model)
        except ModelError as error:
            reason = f"{rows_not_apart(job.prepared.model_type)} ({error})"
            raise bad_configuration(not_joinable(job.name, reason)) from error

    def wait(self) -> None:
        """Wait until the base is checked. Raises StepFailure if its bytes have changed."""
        if self._check is not None:
            self._check.wait()

    def _load(self, entry: _Entry, checkpoint: Checkpoint | None) -> None:
        check = BaseCheck(entry.job.base_folder, entry.job.prepared.base_sha256)
        self._outer.callback(check.close)
        self._base = open_base(entry.job, ProcessSettings(entry.runtime, Ranks(), check), checkpoint, self._begun)
        self._check = check

    def _attach(self, base: LoadedBase, entry: _Entry) -> str:
        """Give the model the job's adapter, and return its name."""
        job = entry.job
        if self._model is None:
            self._model = attach_job_adapter(base, job, initialized=False)
            return adapter_name(0)
        name = adapter_name(entry.number)
        attach_further_adapter(
            self._model,
            name,
            job.spec.lora,
            job.prepared.target_modules,
            seed=job.spec.training.seed,
            base_name=base_name(job.spec.model),
            base_revision=job.prepared.model_revision,
        )
        return name


@contextmanager
def _explained_shortage(device: Device, total: int, results: _Results) -> Iterator[None]:
    """Turn an out-of-memory error into a StepFailure with the number of jobs."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_gpu_memory(error):
            raise
        count = total - len(results)
        jobs = f"{count} job{'' if count == 1 else 's'}"
        raise StepFailure(
            ExitCode.GPU_OUT_OF_MEMORY,
            f"the GPU is out of memory at a measured peak of {peak_memory_bytes(device) / GIB:.1f} GiB with "
            f"{jobs} on one base: train fewer of them together (a lower spec.cellsPerPod of the sweep), or lower "
            "their training.microBatchSize or maxSequenceLength; checkpoints are kept",
        ) from error
