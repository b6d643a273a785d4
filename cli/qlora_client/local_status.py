"""The status of a job of this machine, from the records of its steps, as the operator would report it; pure."""

from collections.abc import Mapping, Sequence

from qlora_api.contract import ProgressRecord, Record, ResultRecord
from qlora_api.figures import (
    with_known_facts,
    with_progress,
    with_publication,
    with_training_facts,
    without_remaining,
)
from qlora_api.status import Condition, FailureStatus, Phase, QLoRAJobStatus, StepName

_RUNNING: Mapping[StepName, Phase] = {"prepare": "Preparing", "train": "Training", "publish": "Publishing"}
_SETTLED: frozenset[Phase] = frozenset({"Succeeded", "Failed", "Suspended"})
_AFTER: Mapping[StepName, Phase] = {"prepare": "Training", "train": "Publishing", "publish": "Succeeded"}


def local_status(records: Sequence[Record], started: str, *, runs: bool, error: str) -> QLoRAJobStatus:
    """The status after these records, in their order.

    `started`: when, as a timestamp. `runs`: whether the process is there. `error`: the last that it has printed beside
    records, for a process that has ended without a result.
    """
    status, phase, message = QLoRAJobStatus(start_time=started), _RUNNING["prepare"], ""
    time = started
    for record in records:
        time = record.time
        if isinstance(record, ProgressRecord):
            status, phase, message = with_progress(status, record), _RUNNING.get(record.step, phase), ""
        else:
            status, phase = _with_result(status, record), _phase(record)
            message = record.message if record.outcome == "succeeded" else f"{record.reason}: {record.message}"
    if not runs and phase not in _SETTLED:
        phase, message = "Failed", error or "the process has ended without a result"
    settled = phase in _SETTLED
    if settled:
        status = without_remaining(status)
    condition = Condition(
        type=phase if settled else "Succeeded",
        status="True" if settled else "False",
        reason=phase,
        message=message,
        last_transition_time=time,
    )
    ended = phase in ("Succeeded", "Failed")
    changes = {"phase": phase, "conditions": (condition,), "completion_time": time if ended else None}
    return status.model_copy(update=changes)


def _with_result(status: QLoRAJobStatus, record: ResultRecord) -> QLoRAJobStatus:
    status = with_known_facts(status, record)
    if record.outcome == "failed":
        failure = FailureStatus(
            step=record.step,
            reason=record.reason,
            exit_code=record.exit_code,
            message=record.message,
            time=record.time,
        )
        return status.model_copy(update={"last_failure": failure})
    if record.step == "train":
        return with_training_facts(status, record)
    if record.step == "publish":
        published = status.model_copy(update={"adapter": record.adapter, "merged": record.merged})
        # A local run has no profile that names servers.
        return with_publication(published, record, ())
    return status


def _phase(record: ResultRecord) -> Phase:
    if record.outcome == "succeeded":
        return _AFTER.get(record.step, "Succeeded")
    return "Failed" if record.outcome == "failed" else "Suspended"
