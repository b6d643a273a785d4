"""Parses Jobs, pods, and the version-independent fields of a QLoRAJob."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from itertools import islice

from qlora_api.contract import TRAINER_CONTAINER
from qlora_api.naming import OPERATOR
from qlora_api.spec.execution import DEFAULT_PROFILE
from qlora_api.spec.job import GROUP
from qlora_operator.decisions.observed.objects import (
    ChildJob,
    Object,
    Observed,
    Pod,
    Reason,
    Termination,
    collect,
    parse_time,
)

_JOB_CONTROLLER = "kubernetes.io/job-controller"
_INDEX = "batch.kubernetes.io/job-completion-index"
# More than any Job has pods. A tenant who may change pods can write anything there.
_INDEX_DIGITS = 9
# Enough for a sentence. A pod that a tenant has made may name a megabyte of them.
_MOST_OBJECTS, _LONGEST_OBJECT = 16, 512
_OBJECT_VOLUMES = {"secret": "Secret", "configMap": "ConfigMap"}
_LONGEST_EXPLANATION = 200
_UNEXPECTED_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""The errors of parsing for a value that the API does not declare, or that is out of range."""


def observe(job_uid: str, jobs: Iterable[Object], pods: Iterable[Object]) -> Observed:
    """The children among `jobs` and `pods`, which have the job's label.

    A Job counts only if the QLoRAJob is its controller: anyone can set a label, but a UID is never used twice.
    """
    children = (parse_child(body) for body in jobs if controller_uid(body) == job_uid)
    return collect(children, map(parse_pod, pods))


def profile_in_use(body: Object) -> str | None:
    """Return the profile of a QLoRAJob of any version that has started here and not ended."""
    if is_managed_elsewhere(body):
        return None
    if not (body.get("status") or {}).get("currentRevision") or {"Succeeded", "Failed"} & _true_conditions(body).keys():
        return None
    return str(((body.get("spec") or {}).get("scheduling") or {}).get("profileName") or DEFAULT_PROFILE)


def is_managed_elsewhere(body: Object) -> bool:
    """Whether the QLoRAJob or QLoRASweep names another controller than this operator."""
    return ((body.get("spec") or {}).get("managedBy") or OPERATOR) != OPERATOR


def foreign_manager(body: Object) -> str:
    """Return the controller that runs the Job instead of Kubernetes' own, empty if none does."""
    manager = str((body.get("spec") or {}).get("managedBy") or _JOB_CONTROLLER)
    return "" if manager == _JOB_CONTROLLER else manager


def controller_uid(body: Object) -> str:
    """Return the UID of the object's controller, empty if it has none."""
    owners = body["metadata"].get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def is_of_kind(owner: Object, kind: str) -> bool:
    """Whether the owner is of this kind, in any version of the API."""
    return (str(owner.get("apiVersion")).partition("/")[0], owner.get("kind")) == (GROUP, kind)


def _optional_time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def parse_child(body: Object) -> ChildJob:
    """A Job of the job. Raises nothing: see `ChildJob.unreadable`."""
    try:
        return _parse_child(body)
    except _UNEXPECTED_VALUE as error:
        metadata = body["metadata"]
        return ChildJob(
            name=metadata["name"],
            uid=metadata["uid"],
            created=parse_time(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            unreadable=_explain(error),
        )


def _explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_EXPLANATION]


def _parse_child(body: Object) -> ChildJob:
    metadata = body["metadata"]
    if managed_by := foreign_manager(body):
        return ChildJob(
            name=metadata["name"],
            uid=metadata["uid"],
            created=parse_time(metadata["creationTimestamp"]),
            deleting="deletionTimestamp" in metadata,
            managed_by=managed_by,
        )
    conditions = _true_conditions(body)
    failed, ended = conditions.get("Failed"), conditions.get("Failed") or conditions.get("Complete")
    stopped = conditions.get("Suspended")
    # Until the Job controller has seen that the Job is resumed, its pods are those that the suspension has ended.
    suspended = bool((body.get("spec") or {}).get("suspend")) or stopped is not None
    return ChildJob(
        name=metadata["name"],
        uid=metadata["uid"],
        created=parse_time(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        complete="Complete" in conditions,
        failure=Reason(failed.get("reason", ""), failed.get("message", "")) if failed else None,
        backoff_limit=(body.get("spec") or {}).get("backoffLimit"),
        active=(body.get("status") or {}).get("active") or 0,
        failing="FailureTarget" in conditions,
        expired=(failed or conditions.get("FailureTarget", {})).get("reason") == "DeadlineExceeded",
        ended=_optional_time(ended.get("lastTransitionTime")) if ended else None,
        suspended=suspended,
        suspended_since=_optional_time(stopped.get("lastTransitionTime")) if stopped else None,
        resumed=None if suspended else _resumed(body.get("status") or {}),
    )


def _resumed(status: Object) -> datetime | None:
    """Return `startTime`, which the Job controller resets at each resumption, if set."""
    if not any(condition["type"] == "Suspended" for condition in status.get("conditions") or ()):
        return None
    return _optional_time(status.get("startTime"))


def parse_pod(body: Object) -> Pod:
    """A pod of one of its Jobs. Raises nothing: see `Pod.unreadable`."""
    try:
        return _parse_pod(body)
    except _UNEXPECTED_VALUE as error:
        metadata = body["metadata"]
        return Pod(
            name=metadata["name"],
            uid=metadata["uid"],
            owner_uid=controller_uid(body),
            created=parse_time(metadata["creationTimestamp"]),
            phase="Unknown",
            unreadable=_explain(error),
        )


def _parse_pod(body: Object) -> Pod:
    metadata, status = body["metadata"], body.get("status") or {}
    state = _trainer_state(status)
    waiting, running, terminated = state.get("waiting"), state.get("running"), state.get("terminated")
    disruption = _true_conditions(body).get("DisruptionTarget")
    created, due = parse_time(metadata["creationTimestamp"]), _optional_time(metadata.get("deletionTimestamp"))
    grace = metadata.get("deletionGracePeriodSeconds") or 0
    return Pod(
        name=metadata["name"],
        uid=metadata["uid"],
        owner_uid=controller_uid(body),
        created=created,
        phase=status.get("phase", "Pending"),
        node=_node(metadata),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        running_since=_optional_time(running.get("startedAt")) if running else None,
        termination=_parse_termination(terminated) if terminated else None,
        waiting=Reason(waiting.get("reason", ""), waiting.get("message", "")) if waiting else None,
        objects=_mounted_objects(body),
        unschedulable=_unschedulable(status),
        scheduled=_scheduled(body),
        disruption=Reason(disruption.get("reason", ""), disruption.get("message", "")) if disruption else None,
        deletion_requested=_deletion_requested(due, grace, created) if due else None,
        deletion_due=due,
    )


def _deletion_requested(due: datetime, grace: int, created: datetime) -> datetime:
    """Return when the deletion was requested.

    `grace`: seconds; the deleting user may choose any number.
    """
    try:
        return max(created, due - timedelta(seconds=grace))
    except OverflowError:
        return created


def _node(metadata: Object) -> int:
    index = (metadata.get("annotations") or {}).get(_INDEX, "")
    return int(index) if index.isdecimal() and len(index) <= _INDEX_DIGITS else 0


def _trainer_state(status: Object) -> Object:
    containers = status.get("containerStatuses") or ()
    states = (container.get("state") or {} for container in containers if container["name"] == TRAINER_CONTAINER)
    return next(states, {})


def _parse_termination(terminated: Object) -> Termination:
    return Termination(
        exit_code=terminated["exitCode"],
        reason=terminated.get("reason", ""),
        message=terminated.get("message", ""),
        started=_optional_time(terminated.get("startedAt")),
        finished=_optional_time(terminated.get("finishedAt")),
    )


def _true_conditions(body: Object) -> dict[str, Object]:
    conditions = (body.get("status") or {}).get("conditions") or ()
    return {condition["type"]: condition for condition in conditions if condition["status"] == "True"}


def _mounted_objects(body: Object) -> tuple[str, ...]:
    volumes = (body.get("spec") or {}).get("volumes") or ()
    sources = (
        *((kind, volume[key]) for volume in volumes for key, kind in _OBJECT_VOLUMES.items() if key in volume),
        *(
            (kind, source[key])
            for volume in volumes
            for source in (volume.get("projected") or {}).get("sources") or ()
            for key, kind in _OBJECT_VOLUMES.items()
            if key in source
        ),
    )
    names = (_name_with_keys(kind, source)[:_LONGEST_OBJECT] for kind, source in sources if not source.get("optional"))
    return tuple(dict.fromkeys(islice(names, _MOST_OBJECTS)))


def _name_with_keys(kind: str, source: Object) -> str:
    name = source.get("secretName") or source.get("name") or ""
    keys = ", ".join(item["key"] for item in source.get("items") or ())
    return f"{kind} {name!r}{f' with {keys}' if keys else ''}"


def _scheduled(body: Object) -> datetime | None:
    found = _true_conditions(body).get("PodScheduled")
    return _optional_time(found.get("lastTransitionTime")) if found else None


def _unschedulable(status: Object) -> str:
    for condition in status.get("conditions") or ():
        if (condition["type"], condition["status"], condition.get("reason")) == (
            "PodScheduled",
            "False",
            "Unschedulable",
        ):
            return str(condition.get("message", ""))
    return ""
