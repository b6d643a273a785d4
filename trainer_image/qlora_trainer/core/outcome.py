"""Classifies the end of a step: exception → exit code, message → result record."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from qlora_api.artifact_status import published_text
from qlora_api.choice import sentence
from qlora_api.contract import ExitCode, ResultRecord, encode_record
from qlora_api.printable import first_line, one_line, shortened
from qlora_api.schema import replace
from qlora_api.status import MAX_MESSAGE_LENGTH, StepName
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, TrainRecord
from qlora_trainer.core.failures import Interrupted, StepFailure, bad_configuration, is_out_of_gpu_memory
from qlora_trainer.core.filesystem import is_full
from qlora_trainer.core.records import Findings, redact

_SHORT_MESSAGE = 256
CompletionRecord = PrepareRecord | TrainRecord | PublishRecord


class Terminated(BaseException):
    """SIGTERM in a step with nothing to save. No library catches it as an error."""


@dataclass(frozen=True)
class Ending:
    """How a step ended: its exit code and one sentence for the user."""

    exit_code: ExitCode
    message: str
    is_unexpected: bool = False
    """Whether the traceback is worth showing: nobody has foreseen this error."""

    @property
    def outcome(self) -> Literal["succeeded", "failed", "interrupted"]:
        """The record's word for it."""
        if self.exit_code is ExitCode.DONE:
            return "succeeded"
        return "interrupted" if self.exit_code is ExitCode.INTERRUPTED else "failed"


def classify(error: BaseException) -> Ending:
    """The ending for an exception. Clients of servers raise StepFailure only."""
    if isinstance(error, StepFailure):
        return Ending(error.exit_code, error.message)
    if isinstance(error, Interrupted):
        return Ending(ExitCode.INTERRUPTED, str(error))
    if isinstance(error, Terminated):
        return Ending(ExitCode.INTERRUPTED, "interrupted; the next attempt starts this step again, nothing is lost")
    if known := _storage(error) or _gpu_memory(error):
        return known
    if isinstance(error, (ConnectionError, TimeoutError)):
        return Ending(ExitCode.UNREACHABLE, f"the network failed ({first_line(error)}); the step is retried")
    message = first_line(error) if str(error).strip() else "no message"
    unforeseen = f"unexpected {type(error).__name__}: {message}; the traceback is in the pod's log"
    return Ending(ExitCode.INTERNAL_ERROR, unforeseen, is_unexpected=True)


ENDS_ONE_JOB = (StepFailure, OSError, SafetensorError)
"""Errors that end one of several jobs. safetensors has one for a full disk."""


def as_failure(error: StepFailure | OSError | SafetensorError) -> StepFailure:
    """The failure of one of several jobs, as it would end the step of the job alone."""
    if isinstance(error, StepFailure):
        return error
    ending = classify(error)
    failure = StepFailure(ending.exit_code, ending.message)
    failure.__cause__ = error
    return failure


def workspace_unusable(error: OSError, folder: Path) -> StepFailure:
    """The failure of a step that cannot even write its log into the workspace."""
    storage = _storage(error)
    if storage:
        return StepFailure(storage.exit_code, storage.message)
    return bad_configuration(
        f"the workspace {folder} cannot be written ({error.strerror}): mount it writable for the user and group of the "
        "pod, or name another claim in spec.workspace.claimName"
    )


def _storage(error: BaseException) -> Ending | None:
    for cause in _causes(error):
        if is_full(cause):
            return Ending(
                ExitCode.STORAGE_FULL,
                f"the workspace or the temporary storage is full ({first_line(cause)}): free space on the volume or "
                "enlarge it (spec.workspace.size), then create the job again; checkpoints written so far are kept",
            )
    return None


def _gpu_memory(error: BaseException) -> Ending | None:
    """A shortage that training.out_of_memory has not explained with numbers."""
    if not any(is_out_of_gpu_memory(cause) for cause in _causes(error)):
        return None
    return Ending(
        ExitCode.GPU_OUT_OF_MEMORY,
        f"the GPU ran out of memory ({first_line(error)}): lower spec.training.microBatchSize or "
        "spec.training.maxSequenceLength, or use a GPU with more memory; `qlora plan` shows what each setting costs",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it was raised from or while handling, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def result_record(
    ending: Ending,
    completion: CompletionRecord | None,
    findings: Findings,
    *,
    step: StepName,
    job_uid: str,
    pod_uid: str,
    attempt: int,
    time: str,
) -> ResultRecord:
    """The step's last record, redacted and within its size: a message that is too long is cut.

    If that is not enough, it leaves out the reasons of chosen settings, the sources of a mix, then the runs of
    trackers.
    """
    message = shortened(one_line(redact(ending.message)), MAX_MESSAGE_LENGTH)
    record = ResultRecord(
        job_uid=job_uid,
        pod_uid=pod_uid,
        step=step,
        time=time,
        attempt=attempt,
        outcome=ending.outcome,
        exit_code=int(ending.exit_code),
        reason=ending.exit_code.reason,
        message=message,
        **_known_fields(completion, findings),
    )
    while not _is_encodable(record):
        if any(each.reason for each in record.settings or ()):
            # The message has them too.
            settings = tuple(replace(each, reason="") for each in record.settings or ())
            record = replace(record, settings=settings)
        elif len(message) <= _SHORT_MESSAGE and record.dataset is not None and record.dataset.sources is not None:
            record = replace(record, dataset=replace(record.dataset, sources=None))
        elif message:
            message = shortened(message, len(message) // 2)
            record = replace(record, message=message)
        elif record.tracking is not None:
            record = replace(record, tracking=None)
        else:
            return record
    return record


def _is_encodable(record: ResultRecord) -> bool:
    try:
        encode_record(record)
    except ValueError:
        return False
    return True


_FIGURES = ("training_step", "total_steps", "loss", "eval_loss", "peak_memory_bytes", "goodput")


def _known_fields(completion: CompletionRecord | None, findings: Findings) -> dict[str, object]:
    """Fields of the result record, from the completion record or the findings."""
    if isinstance(completion, PrepareRecord):
        of_prepare = ("model_revision", "memory", "dataset", "base", "work", "settings")
        known = {name: getattr(completion, name) for name in of_prepare}
        return known if findings.trained is None else known | {"trained": True} | _of_run(findings.trained)
    known = {name: getattr(findings, name) for name in ("model_revision", "memory", "dataset", "gate")}
    if findings.progress is not None and findings.progress.step == "train":
        of_pairs = ("reward_margin", "accuracy", "eval_accuracy")
        further = (*of_pairs, "evaluations", "training_since")
        known |= {name: getattr(findings.progress, name) for name in (*_FIGURES, *further)}
    if isinstance(completion, TrainRecord):
        # Also where it is not known: the latest progress is of the last step, the adapter perhaps of an earlier one.
        known |= _of_run(completion)
    if isinstance(completion, PublishRecord):
        names = ("adapter", "gate", "merged", "base", "report_sha256", "tracking")
        known |= {name: getattr(completion, name) for name in names}
    return known


def _of_run(record: TrainRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in (*_FIGURES, "initial_eval_loss", "eval_accuracy")}


def summary(completion: CompletionRecord | None, step: StepName) -> str:
    """One sentence on what a successful step has done."""
    if isinstance(completion, PrepareRecord):
        rows, steps = completion.dataset, completion.total_steps
        ready = (
            f"{rows.used_rows} rows of format {rows.format} ({rows.eval_rows} held out, {rows.too_long_rows} too long) "
            f"and model revision {completion.model_revision} are ready"
            f"{f' for {steps:,} optimizer step' + 's' * (steps != 1) if steps else ''}"
        )
        chosen = sentence(completion.settings)
        return "; ".join((ready, *completion.remarks, *(() if chosen is None else (chosen,))))
    if isinstance(completion, TrainRecord):
        planned = f" of {completion.total_steps}" if completion.stopped_early else ""
        return f"trained {completion.training_step}{planned} steps to loss {completion.loss:.4f}{_remarks(completion)}"
    if isinstance(completion, PublishRecord):
        return published_text(completion.adapter, completion.merged, completion.base)
    return f"{step} is done"


def steps_done(done: int, planned: int | None, kept: int | None) -> str:
    """The length of a run, and the step of its adapter if that is not the last."""
    early = f" of {planned}, stopped early" if planned is not None and done < planned else ""
    earlier = f"; the adapter is that of step {kept}, with the lowest held-out loss" if kept not in (None, done) else ""
    return f"{done}{early}{earlier}"


def _remarks(trained: TrainRecord) -> str:
    """Remarks for the user on a training that succeeded, or an empty string."""
    remarks = ""
    if trained.stopped_early:
        remarks += ", stopped early because the held-out loss no longer fell"
    if trained.micro_batch_size is not None:
        remarks += f", with microBatchSize {trained.micro_batch_size} after the GPU had run out of memory"
    if trained.kept_step != trained.training_step:
        remarks += f"; the adapter is that of step {trained.kept_step}, which has the lowest held-out loss"
    if (score := trained.score) is not None:
        remarks += (
            f"; of the answers to {score.rows} held-out rows {score.adapter:.1%} passed, without the adapter "
            f"{score.base:.1%}"
        )
    return remarks
