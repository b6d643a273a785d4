"""Reads the metrics' values from a stored QLoRAJob of any release."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from qlora_api.contract import ExitCode
from qlora_api.status import Phase
from qlora_operator.decisions.advance import RESULT_FAILURES
from qlora_operator.decisions.limits import LIMIT_FAILURES
from qlora_operator.decisions.observed.endings import CANCELLED
from qlora_operator.decisions.observed.objects import Object, parse_time
from qlora_operator.decisions.pods.attempts import POD_FAILURES
from qlora_operator.decisions.usage.budget import BUDGET_EXCEEDED

OTHER = "Other"
FAILURE_REASONS = frozenset(
    {code.reason for code in ExitCode}
    | {*POD_FAILURES, *LIMIT_FAILURES, *RESULT_FAILURES, BUDGET_EXCEEDED, CANCELLED}
    | {"BackoffLimitExceeded", "PodFailurePolicy"}
)
"""Of the trainer, of the operator, and of the Job controller."""


def as_label(reason: str) -> str:
    """Return the reason, or Other for an unknown one, as a pod may report any."""
    return reason if reason in FAILURE_REASONS else OTHER


PHASES: tuple[Phase, ...] = get_args(Phase)
RUNNING: frozenset[Phase] = frozenset({"Preparing", "Training", "Publishing"})
ENDED: frozenset[Phase] = frozenset({"Succeeded", "Failed"})
_REPORTING: frozenset[Phase] = frozenset({"Preparing", "Training"})
"""Publish does not report while it merges or uploads a large model."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a running job: its metric, its meaning, its path in the status."""

    metric: str
    meaning: str
    path: tuple[str, ...]


LAST_PROGRESS = Figure(
    "qlora_job_last_progress_timestamp_seconds",
    "When the operator last saw the pod of the running job start or make progress, in seconds since 1970.",
    ("step", "progressedAt"),
)
TRAINING = (
    Figure("qlora_job_optimizer_steps", "Optimizer steps that the running job has done.", ("progress", "step")),
    Figure(
        "qlora_job_planned_optimizer_steps", "Optimizer steps of the running job in all.", ("progress", "totalSteps")
    ),
    Figure("qlora_job_loss", "Training loss of the running job in its latest step, in nats.", ("progress", "loss")),
    Figure(
        "qlora_job_eval_loss",
        "Loss of the running job on the held-out rows in the latest evaluation, in nats.",
        ("progress", "evalLoss"),
    ),
    Figure(
        "qlora_job_tokens_per_second",
        "Tokens that the running job trains on per second, without padding.",
        ("progress", "tokensPerSecond"),
    ),
    Figure(
        "qlora_job_remaining_seconds",
        "Time left for the training of the running job.",
        ("progress", "remainingSeconds"),
    ),
    Figure(
        "qlora_job_peak_memory_bytes",
        "Peak GPU memory of the running job (on CPU: resident memory).",
        ("progress", "peakMemoryBytes"),
    ),
    Figure(
        "qlora_job_goodput_ratio",
        "Share of the time of the running job's train pods that is in its adapter, from 0 to 1.",
        ("progress", "goodput"),
    ),
)
FIGURES = (LAST_PROGRESS, *TRAINING)


@dataclass(frozen=True, slots=True)
class ShownJob:
    """The values in the metrics of one job."""

    namespace: str
    name: str
    uid: str
    phase: Phase
    phase_since: float | None
    """Seconds since 1970; None if unknown."""
    progresses: bool
    """False if its condition Progressing is."""
    profile: str
    claim: str
    """The PersistentVolumeClaim of its workspace; empty until it has started."""
    has_gpus: bool
    """Whether a pod of it has had a GPU."""
    started: float
    """Seconds since 1970; infinite if it has not started."""
    failure: str
    """Why it has failed; empty unless it has."""
    figures: Mapping[str, float]
    """By metric; empty unless it runs."""

    @property
    def runs(self) -> bool:
        """Whether a step of it is at work."""
        return self.phase in RUNNING


def read_shown(body: Object) -> ShownJob | None:
    """Parse the stored job, or None if this release has no such phase."""
    status = body.get("status") or {}
    phase = status.get("phase")
    if phase not in PHASES:
        return None
    metadata = body["metadata"]
    started = _number(status, ("startTime",))
    return ShownJob(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        phase=phase,
        phase_since=_number(status, ("phaseSince",)),
        progresses=_condition(status, "Progressing").get("status") != "False",
        profile=str(((body.get("spec") or {}).get("scheduling") or {}).get("profileName") or "default"),
        claim=str((status.get("workspace") or {}).get("claimName") or ""),
        has_gpus="usage" in status,
        started=math.inf if started is None else started,
        failure=as_label(str(_condition(status, "Failed").get("reason"))) if phase == "Failed" else "",
        figures=_figures(status, phase),
    )


def _figures(status: Object, phase: Phase) -> dict[str, float]:
    shown = (LAST_PROGRESS,) if phase in _REPORTING else ()
    if phase in RUNNING and _number(status, ("progress", "totalSteps")):
        shown = (*shown, *TRAINING)
    found = ((figure.metric, _number(status, figure.path)) for figure in shown)
    return {metric: value for metric, value in found if value is not None}


def _number(status: Object, path: tuple[str, ...]) -> float | None:
    """Return the number, or the timestamp as seconds since 1970.

    Returns None if not finite.
    """
    value: Any = status
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, str):
        try:
            return parse_time(value).timestamp()
        except (ValueError, OverflowError):
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _condition(status: Object, kind: str) -> Object:
    """Return the condition of that type, an empty one if there is none."""
    return next((entry for entry in status.get("conditions") or () if entry.get("type") == kind), {})
