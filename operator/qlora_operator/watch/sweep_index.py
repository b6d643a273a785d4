"""Holds the watched pods of each sweep, so that a cell need not read its sweep."""

from dataclasses import dataclass, field

from pydantic import TypeAdapter, ValidationError

from qlora_api.sweep.status import SweepPodStatus
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.keys import Key

_PODS: TypeAdapter[tuple[SweepPodStatus, ...]] = TypeAdapter(tuple[SweepPodStatus, ...])


@dataclass
class SweepIndex:
    """The pods of the sweeps by the sweep's key, none for cells trained one by one."""

    _pods: dict[Key, tuple[SweepPodStatus, ...]] = field(default_factory=dict)

    def pods(self, namespace: str, name: str) -> tuple[SweepPodStatus, ...] | None:
        """Return the sweep's pods, or None if no watch has shown it, or it is unreadable."""
        return self._pods.get((namespace, name))

    def note(self, body: Object, *, deleted: bool = False) -> set[str]:
        """Note a QLoRASweep and return the cells whose pod has changed for them."""
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        before = self._pods.pop(key, ())
        if deleted:
            return {name for pod in before for name in pod.cells}
        try:
            self._pods[key] = pods_of_sweep(body)
        except ValidationError:
            return set()
        known = {_without_usage(pod) for pod in before}
        changed = [pod for pod in self._pods[key] if _without_usage(pod) not in known]
        numbers = {pod.number for pod in changed}
        return {name for pod in (*changed, *before) if pod.number in numbers for name in (*pod.cells, *pod.alone)}


def pods_of_sweep(body: Object) -> tuple[SweepPodStatus, ...]:
    """Read the pods in a QLoRASweep's status.

    Raises ValidationError for those of another release.
    """
    return _PODS.validate_python((body.get("status") or {}).get("pods") or ())


def _without_usage(pod: SweepPodStatus) -> tuple[object, ...]:
    return pod.number, pod.cells, pod.alone, pod.pod_uid, pod.step.job_uid, pod.reason, pod.message
