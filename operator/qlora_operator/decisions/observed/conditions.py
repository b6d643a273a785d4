"""Sets conditions and derives the phase from them."""

from datetime import datetime
from typing import Literal, TypeVar

from qlora_api.printable import one_line
from qlora_api.profile_status import QLoRAProfileStatus
from qlora_api.schema import replace
from qlora_api.status import MAX_MESSAGE_LENGTH, Condition, Phase, QLoRAJobStatus
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.observed.objects import Reason, format_time

ConditionType = Literal[
    "Prepared",
    "Succeeded",
    "Failed",
    "Suspended",
    "Progressing",
    "Reconciling",
    "Stalled",
    "CleanedUp",
    "Ready",  # of profiles only
]
Value = Literal["True", "False", "Unknown"]
Status = QLoRAJobStatus | QLoRASweepStatus | QLoRAProfileStatus
StatusT = TypeVar("StatusT", QLoRAJobStatus, QLoRASweepStatus, QLoRAProfileStatus)


def truncate(text: str, limit: int = MAX_MESSAGE_LENGTH) -> str:
    """The text in one line, without control characters, cut to what the schema allows."""
    text = one_line(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def condition(status: Status, kind: ConditionType) -> Condition | None:
    """The condition of that type."""
    return next((entry for entry in status.conditions if entry.type == kind), None)


def is_true(status: Status, kind: ConditionType) -> bool:
    """Whether the condition exists and is True."""
    found = condition(status, kind)
    return found is not None and found.status == "True"


def is_false(status: QLoRAJobStatus, kind: ConditionType) -> bool:
    """Whether the condition exists and is False."""
    found = condition(status, kind)
    return found is not None and found.status == "False"


def is_finished(status: QLoRAJobStatus) -> bool:
    """Whether the job has ended."""
    return is_true(status, "Succeeded") or is_true(status, "Failed")


def has_trained(status: QLoRAJobStatus) -> bool:
    """Whether the train step has succeeded since the last return to prepare."""
    return status.step is not None and status.step.name == "publish"


def has_started(status: QLoRAJobStatus) -> bool:
    """Whether the job has ever had a Job."""
    step = status.step
    return step is not None and (bool(step.job_uid) or step.attempt > 1 or step.name != "prepare")


def has_begun(status: QLoRAJobStatus) -> bool:
    """Whether the current step has had a Job since the start or the last retry."""
    step = status.step
    return step is not None and (bool(step.job_uid) or step.attempt > status.first_attempt)


def with_condition(
    status: StatusT, kind: ConditionType, value: Value, reason: Reason, *, generation: int, now: datetime
) -> StatusT:
    """Return the status with this condition set.

    The transition time changes only when the value does.
    """
    old = condition(status, kind)
    word, sentence = truncate(reason.word, 128), truncate(reason.sentence)
    same = (value, word, sentence, generation)
    if old is not None and (old.status, old.reason, old.message, old.observed_generation) == same:
        return status
    new = Condition(
        type=kind,
        status=value,
        reason=word,
        message=sentence,
        last_transition_time=old.last_transition_time if old and old.status == value else format_time(now),
        observed_generation=generation,
    )
    if old is None:
        return replace(status, conditions=(*status.conditions, new))
    conditions = tuple(new if entry.type == kind else entry for entry in status.conditions)
    return replace(status, conditions=conditions)


def phase_of(status: QLoRAJobStatus, *, running: bool, queued: bool = False) -> Phase:
    """The one-word summary of the conditions.

    `running`: whether a pod of the current step runs. `queued`: whether a queue holds the step's Job.
    """
    for kind in ("Succeeded", "Failed", "Suspended"):
        if is_true(status, kind):
            return kind
    step = status.step
    if step is None or (step.name == "prepare" and not has_begun(status)):
        return "Pending"
    if queued:
        return "Queued"
    if step.name == "prepare":
        return "Preparing"
    if step.name == "train":
        if not step.job_uid:
            # Until the first train Job exists, the phase stays that of the step before.
            return "Preparing" if step.attempt == 1 else "Queued"
        return "Training" if running else "Queued"
    return "Publishing"
