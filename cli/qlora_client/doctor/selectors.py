"""Evaluates selectors, labels and taints of Kubernetes; pure."""

from collections.abc import Iterable, Mapping, Sequence

from qlora_client.doctor.facts import Object


def selects(selector: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector matches; an empty one matches everything, and none nothing."""
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
