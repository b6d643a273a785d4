"""The facts about a cluster, the result of a check, and what a selector selects."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Object = Mapping[str, Any]
Verdict = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True)
class Unknown:
    """In place of a fact that could not be read."""

    why: str
    """The missing rule, or the API server's answer."""


@dataclass(frozen=True)
class Check:
    """The subject of a check, and its result."""

    name: str
    verdict: Verdict
    message: str
    """One sentence: the finding and, if there is a problem, the fix."""


@dataclass(frozen=True)
class Operator:
    """A Deployment of the operator, with its pods, settings and Lease."""

    deployment: Object
    settings: Object | Unknown
    """The administrator's settings, as the operator reads them."""
    lease: Object | Unknown | None
    """None: there is none, or the operator elects no leader."""


@dataclass(frozen=True)
class Facts:
    """The API server's answers. Lists are those of the cluster, or of the namespace."""

    namespace: str
    now: datetime
    """By the API server's clock."""
    server_version: str
    schemas: Object | None
    """The OpenAPI document of QLoRAJobs; None if the API server does not have the kind."""
    cli_version: str
    operators: Sequence[Operator] | Unknown
    profiles: Sequence[Object] | Unknown
    jobs: Sequence[Object] | Unknown
    """The QLoRAJobs of the namespace."""
    revisions: Sequence[Object] | Unknown
    """Their ControllerRevisions; read only if the profiles cannot be."""
    nodes: Sequence[Object] | Unknown
    storage_classes: Sequence[Object] | Unknown
    runtime_classes: Sequence[Object] | Unknown
    own_namespace: Object | Unknown
    """The namespace itself."""
    quotas: Sequence[Object] | Unknown
    limit_ranges: Sequence[Object] | Unknown
    network_policies: Sequence[Object] | Unknown
    denied: Mapping[str, Sequence[str]]
    """The purposes that the user lacks rights for, with the missing rules."""
    trials: Mapping[str, str | Unknown | None] = field(default_factory=dict)
    """The API server's answer to a pod like that of train, by profile; None if it would admit it."""


@dataclass(frozen=True)
class NamedProfile:
    """A profile, as the administrator has set it."""

    name: str
    content: Object


def profiles_of(facts: Facts) -> list[NamedProfile]:
    """Return the QLoRAProfiles, or else the copies in the revisions of existing jobs."""
    if not isinstance(facts.profiles, Unknown):
        return [NamedProfile(each["metadata"]["name"], each.get("spec") or {}) for each in facts.profiles]
    found: dict[str, Object] = {}
    revisions = () if isinstance(facts.revisions, Unknown) else facts.revisions
    copies = {each["metadata"]["name"]: (each.get("data") or {}).get("profile") for each in revisions}
    for job in () if isinstance(facts.jobs, Unknown) else facts.jobs:
        name = ((job.get("spec") or {}).get("scheduling") or {}).get("profileName", "default")
        copy = copies.get(str((job.get("status") or {}).get("currentRevision")))
        if copy is not None:
            found[str(name)] = copy
    return [NamedProfile(name, content) for name, content in found.items()]


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector matches: an empty one everything, none nothing."""
    if selector is None:
        return False
    if not has_labels(labels, selector.get("matchLabels") or {}):
        return False
    return all(_holds(each, labels) for each in selector.get("matchExpressions") or ())


def _holds(requirement: Object, labels: Mapping[str, str]) -> bool:
    key, values = requirement["key"], requirement.get("values") or ()
    operator = requirement["operator"]
    if operator == "In":
        return labels.get(key) in values
    if operator == "NotIn":
        return labels.get(key) not in values
    return bool((key in labels) == (operator == "Exists"))


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether the labels include all wanted ones."""
    return all(labels.get(key) == value for key, value in wanted.items())


def untolerated(taints: Iterable[Object], tolerations: Sequence[Object]) -> list[str]:
    """The keys of the taints that keep a pod with these tolerations away."""
    hard = (taint for taint in taints if taint.get("effect") in ("NoSchedule", "NoExecute"))
    return [taint["key"] for taint in hard if not any(_tolerates(each, taint) for each in tolerations)]


def _tolerates(toleration: Object, taint: Object) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"] and (toleration.get("value") or "") == (taint.get("value") or ""))
