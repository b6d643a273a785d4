"""Decides what the end of a step means: exception → exit code and sentence → result record."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_api.contract import ExitCode, ResultRecord, encode_record
from qlora_api.printable import one_line
from qlora_api.status import MAX_MESSAGE_LENGTH, StepName
from qlora_trainer.core.completion import PrepareRecord, PublishRecord, TrainRecord
from qlora_trainer.core.failures import Interrupted, StepFailure, bad_configuration
from qlora_trainer.core.filesystem import is_full
from qlora_trainer.core.records import Findings, redact

_UNREACHABLE_HTTP = frozenset({408, 425, 429})
CompletionRecord = PrepareRecord | TrainRecord | PublishRecord


class Terminated(BaseException):
    """SIGTERM came in a step that has nothing to save. No Exception, so that no library takes it for an error."""


@dataclass(frozen=True)
class Ending:
    """How a step ended: its exit code and one sentence for the user."""

    exit_code: ExitCode
    message: str
    unexpected: bool = False
    """Whether the traceback is worth showing: nobody has foreseen this error."""

    @property
    def outcome(self) -> Literal["succeeded", "failed", "interrupted"]:
        """The record's word for it."""
        if self.exit_code is ExitCode.DONE:
            return "succeeded"
        return "interrupted" if self.exit_code is ExitCode.INTERRUPTED else "failed"


def classify(error: BaseException) -> Ending:
    """The ending that an exception means."""
    if isinstance(error, StepFailure):
        return Ending(error.exit_code, error.message)
    if isinstance(error, Interrupted):
        return Ending(ExitCode.INTERRUPTED, str(error))
    if isinstance(error, Terminated):
        return Ending(ExitCode.INTERRUPTED, "interrupted; the next attempt starts this step again, nothing is lost")
    return _storage(error) or _gpu_memory(error) or _network(error) or _internal(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _storage(error: BaseException) -> Ending | None:
    for cause in _causes(error):
        if is_full(cause):
            return Ending(
                ExitCode.STORAGE_FULL,
                f"the workspace or the temporary storage is full ({_one_line(cause)}): free space on the volume or "
                "enlarge it (spec.workspace.size), then create the job again; checkpoints written so far are kept",
            )
    return None


def workspace_unusable(error: OSError, folder: Path) -> StepFailure:
    """The failure of a step whose workspace cannot even take its log."""
    storage = _storage(error)
    if storage:
        return StepFailure(storage.exit_code, storage.message)
    return bad_configuration(
        f"the workspace {folder} cannot be written ({error.strerror}): mount it writable for the user and group of the "
        "pod, or name another claim in spec.workspace.claimName"
    )


def _gpu_memory(error: BaseException) -> Ending | None:
    torch = sys.modules.get("torch")
    if torch is None or not any(isinstance(cause, torch.OutOfMemoryError) for cause in _causes(error)):
        return None
    return Ending(
        ExitCode.GPU_OUT_OF_MEMORY,
        f"the GPU ran out of memory ({_one_line(error)}): lower spec.training.microBatchSize or "
        "spec.training.maxSequenceLength, or use a larger card; `qlora plan` shows what each setting costs",
    )


def _network(error: BaseException) -> Ending | None:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return Ending(ExitCode.UNREACHABLE, f"the network failed ({_one_line(error)}); the step is tried again")
    # Only a step that has used the hub can have got an error from it.
    if "huggingface_hub" not in sys.modules:
        return None
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, (GatedRepoError, RepositoryNotFoundError)):
        return Ending(ExitCode.MODEL_UNAVAILABLE, f"the hub refused access: {_one_line(error)}")
    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 500)
        permanent = 400 <= status < 500 and status not in _UNREACHABLE_HTTP
        return Ending(
            ExitCode.MODEL_UNAVAILABLE if permanent else ExitCode.UNREACHABLE, f"the hub answered: {_one_line(error)}"
        )
    if isinstance(error, (HTTPError, LocalEntryNotFoundError)):
        return Ending(ExitCode.UNREACHABLE, f"the hub cannot be reached ({_one_line(error)}); the step is tried again")
    return None


def _internal(error: BaseException) -> Ending:
    return Ending(
        ExitCode.INTERNAL_ERROR,
        f"unexpected {type(error).__name__}: {_one_line(error) or 'no message'}; the traceback is in the pod's log",
        unexpected=True,
    )


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".")[:400] if lines else ""


def result_record(
    ending: Ending,
    completion: CompletionRecord | None,
    facts: Findings,
    *,
    step: StepName,
    job_uid: str,
    pod_uid: str,
    attempt: int,
    time: str,
) -> ResultRecord:
    """The step's last record, redacted and within its size: a message that is too long is cut, nothing else.

    What was known when the step ended is in it also when the step failed.
    """
    message = _shortened(one_line(redact(ending.message)), MAX_MESSAGE_LENGTH)
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
        **_known(completion, facts),
    )
    while message and not _encodable(record):
        message = _shortened(message, len(message) // 2)
        record = record.model_copy(update={"message": message})
    return record


def _known(completion: CompletionRecord | None, facts: Findings) -> dict[str, object]:
    """The facts of the result record: those of the completion record, else what was noted on the way."""
    if isinstance(completion, PrepareRecord):
        return {
            "model_revision": completion.model_revision,
            "memory": completion.memory,
            "dataset": completion.dataset,
        }
    known: dict[str, object] = {
        "model_revision": facts.model_revision,
        "memory": facts.memory,
        "dataset": facts.dataset,
    }
    if facts.progress is not None and facts.progress.step == "train":
        names = ("training_step", "total_steps", "loss", "eval_loss", "peak_memory_bytes")
        known |= {name: getattr(facts.progress, name) for name in names}
    if isinstance(completion, TrainRecord):
        names = ("training_step", "loss", "eval_loss", "initial_eval_loss", "peak_memory_bytes")
        known |= {name: getattr(completion, name) for name in names}
    if isinstance(completion, PublishRecord):
        known |= {"adapter": completion.adapter, "merged": completion.merged}
    return known


def summary(completion: CompletionRecord | None, step: StepName) -> str:
    """One sentence on what a successful step has done."""
    if isinstance(completion, PrepareRecord):
        rows = completion.dataset
        return (
            f"{rows.used_rows} rows of format {rows.format} ({rows.eval_rows} held out, {rows.too_long_rows} too long) "
            f"and model revision {completion.model_revision} are ready"
        )
    if isinstance(completion, TrainRecord):
        lowered = completion.micro_batch_size
        note = "" if lowered is None else f", with microBatchSize {lowered} after the GPU had run out of memory"
        before, after = completion.initial_eval_loss, completion.eval_loss
        if before is not None and after is not None and round(after, 4) > round(before, 4):
            note += f"; but on the held-out rows the loss rose from {before:.4f} to {after:.4f}"
        return f"trained {completion.training_step} steps to loss {completion.loss:.4f}{note}"
    if isinstance(completion, PublishRecord):
        merged = f", the merged model at {completion.merged.uri}" if completion.merged else ""
        return f"the adapter is at {completion.adapter.uri}{merged}"
    return f"{step} is done"


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…" * (limit > 0)


def _encodable(record: ResultRecord) -> bool:
    try:
        encode_record(record)
    except ValueError:
        return False
    return True
