"""Which events of the watches lead to a pass, and which jobs go first."""

import asyncio
from collections.abc import Callable
from typing import Any

import kopf
import pytest

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, SWEEP_LABEL, SWEEP_UID_LABEL
from qlora_operator.keys import Key
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.watch.handlers import Hooks, _configure, _register_events
from qlora_operator.watch.profiles import ProfileStore
from qlora_operator.watch.resync import WatchMonitor
from qlora_operator.watch.store import Store
from tests.support.builders import NAME, child, condition, job_body, pod, profile_body, running, status_in

KEY = ("team", NAME)


class Watches:
    """Shows events to the handlers as kopf does, and keeps their requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Key, bool]] = []
        self.metrics = Metrics()
        handlers: dict[str, Callable[..., Any]] = {}

        def register(*resource: str, **_: Any) -> Callable[[Callable[..., Any]], Any]:
            return lambda handler: handlers.setdefault(resource[-1], handler)

        monkeypatch.setattr(kopf.on, "event", register)
        self.monitor = WatchMonitor(150)
        self.sweeps: list[tuple[Key, float]] = []
        self.profiles = ProfileStore()
        hooks = Hooks(
            self._ask,
            self.monitor,
            self.metrics.jobs.show,
            lambda: None,
            Store(),
            lambda key, after: self.sweeps.append((key, after)),
            self.metrics.watches.event,
            self.profiles,
        )
        _register_events(kopf.OperatorRegistry(), hooks)
        self._handlers = handlers

    def _ask(self, key: Key, *, first: bool = False) -> None:
        self.asked.append((key, first))

    def show(self, kind: str, type_: str | None, version: int, body: dict[str, Any]) -> list[tuple[Key, bool]]:
        """The keys that this event requeues."""
        self.asked.clear()
        body = body | {"metadata": body["metadata"] | {"resourceVersion": str(version)}}
        asyncio.run(self._handlers[kind](event={"type": type_, "object": body}))
        return list(self.asked)


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Watches:
    return Watches(monkeypatch)


def test_a_sweep_is_requeued_when_it_changes_and_soon_after_a_cell_has(watches: Watches) -> None:
    sweep = {"metadata": {"namespace": "team", "name": "rates", "uid": "1"}}
    for event in (None, "MODIFIED", "DELETED"):
        watches.show("qlorasweeps", event, 10, sweep)
    assert watches.sweeps == [(("team", "rates"), 0.0)] * 3
    owner = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": "rates", "uid": "1", "controller": True}
    cell = job_body()
    cell["metadata"] |= {"ownerReferences": [owner]}
    for event in ("ADDED", "MODIFIED", "DELETED"):
        watches.show("qlorajobs", event, 11, cell)
    assert watches.sweeps[3:] == [(("team", "rates"), 2.0)] * 3
    watches.show("qlorajobs", "ADDED", 12, job_body())
    assert len(watches.sweeps) == 6
    labels = {SWEEP_LABEL: "rates", SWEEP_UID_LABEL: "1", JOB_UID_LABEL: "1", JOB_LABEL: "rates-p00"}
    for kind, body in (("jobs", child("train")), ("pods", pod("train"))):
        body["metadata"]["labels"] = labels
        assert watches.show(kind, "ADDED", 13, body) == []
    assert watches.sweeps[6:] == [(("team", "rates"), 2.0)] * 2
    for resource, type_, count in (("qlorasweeps", "LISTED", 1), ("qlorajobs", "ADDED", 2), ("pods", "ADDED", 1)):
        labels = {"resource": resource, "type": type_}
        assert watches.metrics.registry.get_sample_value("qlora_operator_watch_events_total", labels) == count


def test_profiles_are_those_that_the_watch_shows(watches: Watches) -> None:
    watches.show("qloraprofiles", None, 10, profile_body())
    assert list(watches.profiles) == ["default"]
    watches.show("qloraprofiles", "DELETED", 11, profile_body())
    assert list(watches.profiles) == []


def test_a_new_job_goes_first_and_a_started_one_does_not(watches: Watches) -> None:
    assert watches.show("qlorajobs", "ADDED", 10, job_body()) == [(KEY, True)]
    assert watches.show("qlorajobs", "MODIFIED", 11, job_body(generation=2)) == [(KEY, True)]
    started = status_in("train").dump()
    assert watches.show("qlorajobs", "MODIFIED", 12, job_body(started, generation=3)) == [(KEY, False)]
    assert watches.show("qlorajobs", "DELETED", 13, job_body(generation=3)) == [(KEY, False)]


def test_a_write_of_the_status_leads_to_no_pass_and_is_counted(watches: Watches) -> None:
    watches.show("qlorajobs", None, 10, job_body())
    written = status_in("train", phase="Training").dump()
    assert watches.show("qlorajobs", "MODIFIED", 11, job_body(written)) == []
    assert watches.metrics.registry.get_sample_value("qlora_jobs", {"namespace": "team", "phase": "Training"}) == 1


def test_jobs_without_progress_are_counted(watches: Watches) -> None:
    def count() -> float | None:
        return watches.metrics.registry.get_sample_value("qlora_jobs_without_progress")

    stalled = status_in("train", phase="Training").dump()
    stalled["conditions"] = [condition("Progressing", "False")]
    watches.show("qlorajobs", "MODIFIED", 10, job_body(stalled))
    assert count() == 1
    watches.show("qlorajobs", "MODIFIED", 11, job_body(status_in("train", phase="Training").dump()))
    assert count() == 0
    watches.show("qlorajobs", "MODIFIED", 12, job_body(stalled))
    watches.show("qlorajobs", "DELETED", 13, job_body(stalled))
    assert count() == 0


def test_a_recreated_job_is_stored_although_the_old_ones_deletion_comes_last(
    watches: Watches,
) -> None:
    training = status_in("train", phase="Training").dump()
    old, new = job_body(training), job_body(training)
    new["metadata"]["uid"] = "new"
    watches.show("qlorajobs", None, 10, old)
    watches.show("qlorajobs", "ADDED", 13, new)
    watches.show("qlorajobs", "MODIFIED", 11, old)
    watches.show("qlorajobs", "DELETED", 12, old)
    for now in (0, 200):
        watches.monitor.compare("qlorajobs", {("qlorajobs", *KEY, "new"): "13"}, now)
    assert watches.monitor.dead == ()
    assert watches.metrics.registry.get_sample_value("qlora_jobs", {"namespace": "team", "phase": "Training"}) == 1


def test_a_relevant_change_of_a_child_requeues_its_job(watches: Watches) -> None:
    assert watches.show("jobs", "ADDED", 10, child("train")) == [(KEY, False)]
    assert watches.show("pods", "ADDED", 11, pod("train")) == [(KEY, False)]
    assert watches.show("pods", "MODIFIED", 12, pod("train", hostIP="10.0.0.1")) == []
    assert watches.show("pods", "MODIFIED", 13, running(pod("train"))) == [(KEY, False)]
    assert watches.show("pods", "DELETED", 14, running(pod("train"))) == [(KEY, False)]


def test_the_end_of_a_predecessors_job_wakes_the_qlorajob_of_its_name(watches: Watches) -> None:
    earlier = child("prepare", owner="earlier")
    earlier["metadata"]["labels"] = earlier["metadata"]["labels"] | {JOB_UID_LABEL: "earlier"}
    watches.show("qlorajobs", "ADDED", 10, job_body())
    watches.show("jobs", None, 9, earlier)
    assert watches.show("jobs", "DELETED", 11, earlier) == [(KEY, False)]


def test_kopf_neither_keeps_nor_copies_shown_objects() -> None:
    settings = _configure(75)
    assert settings.queueing.idle_timeout < 1
    body: Any = {"spec": {"a": 1}}
    assert settings.persistence.diffbase_storage.build(body=body) == {}
    assert settings.persistence.diffbase_storage.fetch(body=body) is None
