"""Reads from Kueue's Workload why a step's Job waits."""

from qlora_api.status import Condition
from qlora_operator.decisions.observed.objects import ChildJob, Object, Reason

WAITING = "WaitingForQueue"
# Kueue writes now one and now another of these while nothing changes but what the other jobs do.
_ALTERNATE = (
    "insufficient unused quota",
    "Pending the preemption of",
    "no longer fits after processing another workload",
    "overlapping preemption targets",
)


def not_supported(job_name: str, managed_by: str, queue: str | None) -> Reason:
    """Return why a Job that another controller runs is no step. `queue`: its LocalQueue, if the job names one."""
    giver, remedy = "the LocalQueue 'default', or a webhook,", "ask the administrator to leave such Jobs alone"
    if queue:
        giver, remedy = f"LocalQueue {queue!r}", "create the job again with another spec.scheduling.queueName"
    return Reason(
        "QueueNotSupported",
        f"{giver} gives Job {job_name} to {managed_by}, perhaps in another cluster, and the operator reads results "
        f"from pods that this cluster's Job controller runs: {remedy}",
    )


def queue_reason(child: ChildJob, workload: Object | None, shown: Condition | None) -> Reason:
    """Return why the suspended Job waits, by its Workload.

    `shown`: the condition in the status until now. A message that would only alternate with that one is dropped, so
    that the status stays as it is.
    """
    if workload is None:
        return Reason(
            WAITING,
            f"Job {child.name} is suspended and has no Workload: Kueue must run, manage this namespace, and have the "
            "WorkloadPriorityClass of the job; if it was not Kueue, whoever suspended the Job must resume it",
        )
    sentence = _sentence(child, workload)
    if shown is not None and shown.reason == WAITING and _alternates(shown.message) and _alternates(sentence):
        return Reason(WAITING, shown.message)
    return Reason(WAITING, sentence)


def _sentence(child: ChildJob, workload: Object) -> str:
    """Return Kueue's message: of the eviction, after one, else of the quota.

    The other conditions follow from these.
    """
    status = workload.get("status") or {}
    if not (workload.get("spec") or {}).get("queueName"):
        return (
            "Kueue manages Jobs without a queue name in this cluster, also this one: add a LocalQueue named default to "
            f"the namespace, then delete Job {child.name}"
        )
    conditions = {condition["type"]: condition for condition in status.get("conditions") or ()}
    evicted, quota = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    if evicted.get("status") == "True":
        return f"Kueue: {evicted.get('message', '')}"
    if quota.get("status") == "False":
        return f"Kueue: {quota.get('message', '')}"
    if quota and conditions.get("Admitted", {}).get("status") != "True":
        return f"Kueue: {quota.get('message', '')}; the queue's admission checks have not ended"
    if quota:
        return "Kueue has admitted the job"
    # Of equal Workloads, Kueue gives a reason to the first alone.
    return "Kueue has not admitted the job yet: equal jobs may wait before it"


def _alternates(sentence: str) -> bool:
    return any(part in sentence for part in _ALTERNATE)
