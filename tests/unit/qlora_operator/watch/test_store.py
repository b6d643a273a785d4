"""The content of the store, for any order of watches, lists and answers."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from qlora_api.naming import (
    JOB_LABEL,
    JOB_UID_LABEL,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    SWEEP_UID_LABEL,
    child_job_name,
)
from qlora_operator.decisions.observed.facts import FIRST_JOB
from qlora_operator.decisions.observed.objects import Observed
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.kube.listing import ChildKind, ChildList, child_view
from qlora_operator.watch.store import Store
from tests.support.builders import NAME, UID, child, ended, job_body, pod, present, running, status_in
from tests.support.cluster.stores import KEY, OTHER, at, rows

FIRST = child_job_name(NAME, *FIRST_JOB)


def store_with(*children: tuple[Any, dict[str, Any]], job: dict[str, Any] | None = None) -> Store:
    store = Store()
    store.job_changed(at(10, job or job_body()))
    for kind, body in children:
        store.child_changed(kind, body)
    return store


def names(store: Store) -> tuple[list[str], list[str]]:
    held = present(store.held(KEY))
    return [each.name for each in held.observed.children], [each.name for each in held.observed.pods]


def status(store: Store) -> Any:
    return present(store.held(KEY)).body["status"]


def lines_of(work: Callable[[], object]) -> int:
    """The number of lines of code that this executes."""
    executed = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal executed
        executed += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return executed


def test_an_older_event_after_a_write_of_the_operator_changes_nothing() -> None:
    store = store_with()
    written = status_in("train").dump()
    assert not store.job_changed(at(12, job_body(written)))
    assert not store.job_changed(at(11, job_body()))
    assert status(store) == written


def test_an_own_status_write_does_not_requeue_and_a_spec_change_does() -> None:
    store = store_with()
    assert not store.job_changed(at(11, job_body(status_in("train").dump())))
    assert store.job_changed(at(12, job_body())), "its status is lost"
    assert store.job_changed(at(13, job_body(suspend=True, generation=2)))
    assert store.job_changed(at(14, job_body(generation=2), deletionTimestamp="2026-01-02T12:00:00Z"))


def test_an_irrelevant_change_of_a_pod_does_not_requeue() -> None:
    store = store_with(("pods", at(5, pod("train"))))
    assert not store.child_changed("pods", at(6, pod("train", podIP="10.0.0.1")))
    assert store.child_changed("pods", at(7, running(pod("train"))))
    assert not store.child_changed("pods", at(6, ended(pod("train"), 1)))


def test_a_deletion_that_overtakes_the_answer_of_the_creation_is_not_undone() -> None:
    store = store_with()
    store.child_changed("jobs", at(12, child("train")), deleted=True)
    assert not store.child_changed("jobs", at(11, child("train")))
    assert names(store) == ([], [])


@pytest.mark.parametrize("deletion_first", [True, False])
def test_a_job_of_the_same_name_is_another_job(deletion_first: bool) -> None:
    store = store_with(("jobs", child("train")))
    new = at(30, job_body(), uid=OTHER)
    if deletion_first:
        store.job_changed(at(20, job_body()), deleted=True)
        assert store.held(KEY) is None
    assert store.job_changed(new, created=True)
    if not deletion_first:
        store.job_changed(at(20, job_body()), deleted=True)
    held = present(store.held(KEY))
    assert (held.body["metadata"]["uid"], held.fresh, names(store)) == (OTHER, True, ([], []))
    assert not store.job_changed(at(19, job_body()))
    assert store.held(KEY) is not None


def test_a_late_event_of_a_deleted_job_does_not_take_the_name_of_the_new_one() -> None:
    store = Store()
    store.job_changed(at(30, job_body(), uid=OTHER))
    store.job_changed(at(10, job_body()))
    assert present(store.held(KEY)).body["metadata"]["uid"] == OTHER


@pytest.mark.parametrize(("created", "fresh"), [(True, True), (False, False)])
def test_only_a_job_whose_creation_a_watch_has_shown_is_fresh(created: bool, fresh: bool) -> None:
    store = Store()
    store.job_changed(at(10, job_body()), created=created)
    store.job_changed(at(11, job_body(suspend=True)), created=True)
    assert present(store.held(KEY)).fresh == fresh


def test_a_label_in_another_namespace_or_without_control_makes_no_child() -> None:
    elsewhere = pod("train")
    elsewhere["metadata"]["namespace"] = "another-team"
    store = store_with(("pods", elsewhere), ("jobs", child("train", owner="somebody-else")))
    assert names(store) == ([], [])


def test_a_list_prunes_missed_deletions_and_keeps_newer_objects() -> None:
    old, new = at(20, pod("train")), at(50, pod("train", number=2))
    store = store_with(("pods", old), ("pods", new))
    assert store.compare("pods", None, [], "40") == {KEY}
    assert names(store)[1] == [f"{NAME}-train-1-pod2"]
    assert store.compare("pods", "another-team", [], "60") == set()
    assert not store.child_changed("pods", at(30, pod("train")))


def test_a_list_of_one_namespace_costs_the_same_however_many_others_there_are() -> None:
    alone, among_others = store_with(), store_with()
    for number in range(200):
        among_others.job_changed(at(10, job_body(), namespace=f"other-{number}"))
    assert lines_of(lambda: alone.compare("pods", "team", [], "9")) == lines_of(
        lambda: among_others.compare("pods", "team", [], "9")
    )


def test_a_job_whose_deletion_was_missed_is_pruned_by_a_list_that_is_newer() -> None:
    store = store_with()
    assert store.compare("qlorajobs", "team", [], "9") == set()
    assert store.held(KEY) is not None
    assert store.compare("qlorajobs", "team", [], "40") == {KEY}
    assert store.held(KEY) is None


@pytest.mark.parametrize("kind", ["qlorajobs", "jobs", "pods"])
def test_objects_missed_by_a_dead_watch_are_read_live_until_shown(kind: Any) -> None:
    bodies: dict[Any, dict[str, Any]] = {"qlorajobs": job_body(), "jobs": child("train"), "pods": pod("train")}
    store = store_with(("jobs", at(11, child("train"))), ("pods", at(11, pod("train"))))
    newer = at(20, bodies[kind])
    assert store.compare(kind, None, rows(kind, newer), "25") == {KEY}
    assert store.held(KEY) is None
    if kind == "qlorajobs":
        store.job_changed(newer)
    else:
        store.child_changed(kind, newer)
    assert store.held(KEY) is not None
    assert store.compare(kind, None, rows(kind, newer), "25") == set()


def test_the_deletion_of_a_listed_object_ends_the_wait_for_its_version() -> None:
    store = store_with(("pods", at(11, pod("train"))))
    store.compare("pods", None, rows("pods", at(20, pod("train"))), "25")
    assert store.held(KEY) is None
    store.child_changed("pods", at(21, pod("train")), deleted=True)
    assert names(store) == ([], [])


@pytest.mark.parametrize("more", [{}, {JOB_LABEL: "rates-p00", SWEEP_UID_LABEL: "a sweep"}], ids=["alone", "sweep"])
def test_a_pod_whose_labels_name_no_job_requeues_none(more: dict[str, str]) -> None:
    nameless = at(20, pod("train"), labels={JOB_UID_LABEL: "a sweep"} | more)
    assert Store().compare("pods", None, rows("pods", nameless), "25") == set()


def test_after_a_live_read_the_job_is_held_as_it_was_read() -> None:
    store = store_with(("jobs", at(11, child("prepare"))), ("pods", at(11, pod("prepare"))))
    store.distrust(KEY)
    assert store.held(KEY) is None
    lists = (ChildList([child_view("jobs", at(21, child("train")))], "30"), ChildList([], "30"))
    observed = store.note_live_read(at(22, job_body()), *lists)
    assert [each.name for each in observed.children] == [f"{NAME}-train-1"]
    assert names(store) == ([f"{NAME}-train-1"], [])


def test_objects_listed_during_a_live_read_are_kept() -> None:
    store = store_with()
    newer = at(40, pod("train"))
    store.compare("pods", None, rows("pods", newer), "45")
    store.note_live_read(at(10, job_body()), ChildList([], "30"), ChildList([], "30"))
    assert store.held(KEY) is None
    store.note_live_read(at(10, job_body()), ChildList([], "50"), ChildList([], "50"))
    assert store.held(KEY) is not None


def test_a_job_that_the_watch_has_not_shown_is_requeued() -> None:
    body = at(20, job_body())
    assert Store().compare("qlorajobs", None, rows("qlorajobs", body), "25") == {KEY}


@pytest.mark.parametrize("kind", ["qlorajobs", "jobs"])
def test_non_numeric_versions_make_every_read_live(kind: Any) -> None:
    store = Store()
    store.job_changed(at("a7" if kind == "qlorajobs" else 7, job_body()))
    store.child_changed("jobs", at("b8" if kind == "jobs" else 8, child("train")))
    assert store.held(KEY) is None
    lists = (ChildList([child_view("jobs", at("b9", child("train")))], "c"), ChildList([], "c"))
    assert len(store.note_live_read(at("a8", job_body()), *lists).children) == 1
    assert store.held(KEY) is None


@pytest.mark.parametrize("read_live", [True, False])
def test_how_a_pod_has_ended_is_held_until_a_pass_has_decided(read_live: bool) -> None:
    store = store_with(("jobs", child("train")), ("pods", running(pod("train"))))
    store.child_changed("pods", at(12, ended(pod("train"), 143)), deleted=True)
    observed = present(store.held(KEY)).observed
    if read_live:
        lists = (ChildList([child_view("jobs", child("train"))], "30"), ChildList([], "30"))
        assert store.note_live_read(at(13, job_body()), *lists) == observed
    assert [(each.name, each.asked_to_stop) for each in observed.pods] == [(f"{NAME}-train-1-pod1", True)]
    store.decided(KEY, Observed())
    assert names(store)[1] == [f"{NAME}-train-1-pod1"], "that pass has not seen it"
    store.decided(KEY, observed)
    assert (names(store)[1], store._kept) == ([], {})


def test_the_pods_that_are_held_until_a_pass_are_bounded() -> None:
    store = store_with()
    for number in range(5000):
        store.child_changed("pods", at(20 + number, ended(pod("train"), 143), uid=f"uid-{number}"), deleted=True)
    held = [each.uid for each in present(store.held(KEY)).observed.pods]
    assert (len(held), "uid-0" in held, "uid-4999" in held) == (4096, False, True)


def test_a_pod_that_has_succeeded_is_held_until_its_job_has() -> None:
    store = store_with(("jobs", child("train")), ("pods", running(pod("train"))))
    store.child_changed("pods", at(12, ended(pod("train"), 0)), deleted=True)
    for job, kept in ((child("train"), 1), (child("train", Complete="Done"), 0)):
        store.child_changed("jobs", at(14 - kept, job))
        observed = present(store.held(KEY)).observed
        store.decided(KEY, observed)
        assert (len(observed.pods), len(names(store)[1])) == (1, kept)


def test_a_job_is_settled_until_something_is_shown_about_it() -> None:
    store = store_with(("pods", at(11, pod("train"))))
    for show in (
        lambda: store.job_changed(at(12, job_body(suspend=True, generation=2))),
        lambda: store.child_changed("pods", at(13, running(pod("train")))),
        lambda: store.compare("pods", None, rows("pods", at(14, pod("train"))), "14"),
        lambda: store.child_changed("pods", at(15, pod("train")), deleted=True),
    ):
        store.settle(KEY, True)
        assert store.is_settled(KEY)
        show()
        assert not store.is_settled(KEY)


def test_the_store_drops_deleted_objects() -> None:
    store = store_with(("jobs", child("train")), ("pods", running(pod("train"))))
    store.child_changed("pods", at(12, ended(pod("train"), 143)), deleted=True)
    store.job_changed(at(20, job_body()), deleted=True)
    store.child_changed("jobs", at(21, child("train")), deleted=True)
    assert (store._entries.of(None), store._ids, store._homes, store._kept) == ([], {}, {}, {})
    for number in range(10_000):
        store.child_changed("pods", at(number, pod("train"), uid=f"uid-{number}"), deleted=True)
        store.jobs.drop_sweep(f"uid-{number}")
    assert max(len(store._buried), len(store.jobs._deleted_sweeps)) < 5000


@pytest.mark.parametrize("length", [1, 100_000])
def test_a_job_of_any_size_is_held_as_it_was_shown(length: int) -> None:
    store = Store()
    shown = job_body({"lastFailure": {"message": "äx{" * length}})
    store.job_changed(shown)
    assert present(store.held(KEY)).body == shown


def test_unread_fields_of_a_job_are_dropped() -> None:
    noise = {f"example.org/{number}": "x" * 60 for number in range(1000)}
    queue = {QUEUE_LABEL: "research", QUEUE_PRIORITY_LABEL: "high"}
    shown = at(10, job_body(), managedFields=[noise], annotations=noise, labels=noise | queue, finalizers=list(noise))
    store = store_with(job=shown)
    held = present(store.held(KEY))
    assert held.body["metadata"] == at(10, job_body())["metadata"] | {"labels": queue}
    assert parse_job(held.body) == parse_job(shown)
    assert len(present(store._entries.find(("team", UID))).body) < 1000
    assert not store.job_changed(at(11, shown, annotations={}))
    assert store.job_changed(at(12, shown, labels={QUEUE_LABEL: "production"}))


@pytest.mark.parametrize("kind", ["jobs", "pods"])
@pytest.mark.parametrize("listed_only", [True, False])
def test_a_relabeled_child_moves_to_the_other_job_and_both_are_reconciled(kind: ChildKind, listed_only: bool) -> None:
    body = {"jobs": child("train"), "pods": running(pod("train"))}[kind]
    store = store_with((kind, at(11, body)))
    store.job_changed(at(10, job_body(), uid=OTHER, name="other"))
    for key in (KEY, ("team", "other")):
        store.settle(key, True)
    moved = at(20, body, labels={JOB_UID_LABEL: OTHER, JOB_LABEL: "a wrong name"})
    if listed_only:
        assert store.compare(kind, None, rows(kind, moved), "25") == {KEY, ("team", "other")}
    else:
        assert store.child_changed(kind, moved) == {KEY, ("team", "other")}
    assert names(store) == ([], [])
    assert not store.is_settled(KEY)
    # An older view of it changes nothing, and its deletion concerns the job that it is held for.
    if not listed_only:
        assert store.child_changed(kind, at(15, body)) == set()
        assert store.child_changed(kind, at(30, body), deleted=True) == {("team", "other")}


def test_a_child_that_cannot_be_read_is_held_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    strange = pod("train", conditions=[{"type": "PodScheduled", "status": "True", "lastTransitionTime": "never"}])
    store = store_with(("pods", at(11, strange)))
    assert store.child_changed("pods", at(12, strange | {"spec": {}})) == set()
    assert names(store)[1] == [strange["metadata"]["name"]]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot be read, so it counts as there: ValueError: Invalid isoformat string: 'never'" in caplog.text
    assert store.child_changed("pods", at(13, running(pod("train")))) == {KEY}
