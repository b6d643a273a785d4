"""The failure reasons that a metric may have as a label; pure."""

from qlora_api.contract import ExitCode
from qlora_operator.decisions.advance import ADAPTER_NOT_SIGNED
from qlora_operator.decisions.budget import BUDGET_EXCEEDED

OTHER = "Other"
FAILURE_REASONS = frozenset(
    {code.reason for code in ExitCode}
    | {
        ADAPTER_NOT_SIGNED,
        BUDGET_EXCEEDED,
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "Evicted",
        "HostOutOfMemory",
        "JobFailed",
        "PodFailed",
        "PodFailurePolicy",
        "ProgressDeadlineExceeded",
        "ResultUnreadable",
    }
)
"""Of the trainer, of the operator, and of the Job controller."""


def as_label(reason: str) -> str:
    """The reason; Other for one that is not known, as a kubelet's: a pod may write any as its result."""
    return reason if reason in FAILURE_REASONS else OTHER
