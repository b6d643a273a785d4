"""Trains the adapters of several jobs on one base: load it once, loop, finish each."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime

from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure, StopRequest
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.model.adapter import activate_adapter, attach_further_adapter
from qlora_trainer.training.base_check import BaseCheck
from qlora_trainer.training.checkpoint import Checkpoint
from qlora_trainer.training.finishing import finish_run, leave_samples, with_score
from qlora_trainer.training.joinable import reject_unjoinable
from qlora_trainer.training.opening import (
    LoadedBase,
    ProcessSettings,
    attach_job_adapter,
    begin_with_earlier,
    open_base,
    open_on_model,
)
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.ranks import Ranks
from qlora_trainer.training.state import Runtime
from qlora_trainer.training.together import Member, run_together

# PEFT's name of a model's only adapter, and those of further ones: none is a part of another or of a module's name.
_FIRST, _FURTHER = "default", "adapter{:03}"


@dataclass(frozen=True)
class _Entry:
    """A job that is to be trained, and what it resumes from."""

    job: PreparedJob
    checkpoint: Checkpoint | None
    process: ProcessSettings


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
    part. Raises StepFailure if they cannot be trained together, and Interrupted after saving all when `stop` was set.
    """
    jobs = [PreparedJob.of(context, ranks=1) for context in contexts]
    reject_unjoinable(jobs)
    results: list[TrainRecord | StepFailure | None] = [job.already_trained() for job in jobs]
    waiting = [number for number, result in enumerate(results) if result is None]
    with ExitStack() as held:
        entries = {}
        base_check: BaseCheck | None = None
        for number in waiting:
            checkpoint = held.enter_context(jobs[number].attempt(now))
            if base_check is None:
                base_check = BaseCheck(jobs[number].base_folder, jobs[number].prepared.base_sha256)
                held.callback(base_check.close)
            process = ProcessSettings(Runtime(records[number], stop, now, monotonic), Ranks(), base_check)
            entries[number] = _Entry(jobs[number], checkpoint, process)
        members = _open_all(entries, held)
        numbers = {member.adapter: number for number, member in members.items()}
        for member, ended in run_together(list(members.values())):
            number = numbers[member.adapter]
            if isinstance(ended, StepFailure):
                results[number] = ended
                continue
            if base_check is not None:
                base_check.wait()
            results[number] = finish_run(member.run, ended, jobs[number])
        # After the last step: what generates answers leaves the model unfit for training.
        for number, member in members.items():
            record = results[number]
            if isinstance(record, TrainRecord):
                activate_adapter(member.run.model, member.adapter)
                results[number] = with_score(member.run, member.state, jobs[number], record)
                leave_samples(member.run, jobs[number])
    return [result for result in results if result is not None]


def _open_all(entries: dict[int, _Entry], held: ExitStack) -> dict[int, Member]:
    """The runs of all jobs, on the base of the first."""
    members: dict[int, Member] = {}
    base: LoadedBase | None = None
    for position, (number, entry) in enumerate(entries.items()):
        job, initialized = entry.job, entry.checkpoint is None
        if base is None:
            base = open_base(job, entry.process, entry.checkpoint)
            name, model = _FIRST, attach_job_adapter(base, job, initialized=initialized)
        else:
            name = _FURTHER.format(position)
            attach_further_adapter(
                model,
                name,
                job.context.spec.lora,
                job.prepared.target_modules,
                seed=job.context.spec.training.seed,
                base_name=job.context.base_name,
                base_revision=job.prepared.model_revision,
            )
            if initialized:
                begin_with_earlier(model, job)
        run, state = open_on_model(job, entry.process, entry.checkpoint, base, model)
        if run.history is not None:
            held.enter_context(run.history)
        members[number] = Member(name, run, state)
    return members
