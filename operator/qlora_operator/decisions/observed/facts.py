"""The facts of one pass, and how to write a status computed from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from qlora_api.contract import ProgressRecord
from qlora_api.naming import child_job_name
from qlora_api.profile import Profile
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, StepName, StepStatus
from qlora_operator.decisions.observed.conditions import ConditionType, Value, with_condition
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, Reason
from qlora_operator.decisions.observed.shared_pod import SharedPod

FIRST_JOB: tuple[StepName, int] = ("prepare", 1)
"""Step and attempt of a job's first Job, which exists before the status is stored."""


@dataclass(frozen=True)
class Facts:
    """All inputs of a status."""

    job: QLoRAJob
    observed: Observed
    profiles: Mapping[str, Profile]
    now: datetime
    progress: ProgressRecord | None = None
    log_read: bool = False
    """Whether the log of the running pod has been read in this pass, so that a missing record is evidence."""
    rest: float = 0.0
    """How many seconds the stored figures of progress may stay as they are."""
    queue: Reason | None = None
    """Why the current step's Job waits in a queue, if that could be read."""
    continued: QLoRAJob | None = None
    """The current job that spec.continues names, or None if none can be read."""
    continued_writer: str = ""
    """A pod or Job that may still save a checkpoint of that job, after its end or suspension; empty for none."""
    shared: SharedPod | None = None
    """The pod of its sweep that trains the job with other cells, or None."""
    trains: tuple[str, ...] = ()
    """Of the pod of a sweep: UIDs of the cells that it trains."""
    gone: frozenset[str] = frozenset()
    """Of the cells that it trains, or has trained, those that count no GPU time any more."""
    progress_beside: ProgressRecord | None = None
    """The latest record of the other cells that the pod of a sweep trains."""
    counted_seconds: int = 0
    """GPU seconds of the job that the stored status of its profile includes, until the job has noted that."""
    no_gpu: Reason | None = None
    """Why train can use no GPU of the profile's nodes, as far as their labels show."""
    jobs_of_profile: int = 0
    """How many other jobs of its profile and namespace have started and not ended, if its profile limits them."""


def set_condition(
    status: QLoRAJobStatus, job: QLoRAJob, now: datetime, kind: ConditionType, value: Value, reason: Reason
) -> QLoRAJobStatus:
    """The status with this condition set, observed now."""
    return with_condition(status, kind, value, reason, generation=job.generation, now=now)


def new_step(job: QLoRAJob, name: StepName, attempt: int) -> StepStatus:
    """A step whose Job does not exist yet."""
    return StepStatus(name=name, job_name=child_job_name(job.name, name, attempt), attempt=attempt)


def next_attempt(step: StepStatus, job: QLoRAJob) -> StepStatus:
    """The same step with a new Job."""
    new = new_step(job, step.name, step.attempt + 1)
    return replace(new, failures=step.failures, unverified=step.unverified)
