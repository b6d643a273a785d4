"""Passes over a sweep whose cells one pod trains, and over these cells."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from qlora_api.contract import encode_record
from qlora_api.naming import SWEEP_UID_LABEL
from qlora_operator.decisions.sweeps.sweep import sweep_of_child
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.progress import ProgressReader
from qlora_operator.reconcile.sweep import SweepReconciler
from qlora_operator.watch.store import Store
from qlora_operator.watch.sweep_index import SweepIndex
from tests.support.builders import (
    NOW,
    PROFILES,
    present,
    progress,
    revision_body,
    revision_of,
    running,
    starts,
)
from tests.support.builders import pod as any_pod
from tests.support.cluster.shared_pods import (
    NAMES,
    OWNER,
    POD,
    SWEEP_UID,
    UIDS,
    Pod,
    cell_body,
    cell_status,
    of_the_pod,
)
from tests.support.sweeps import TEMPLATE
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import ApiServer

FIRST, SECOND, THIRD = NAMES


def _seconds() -> Callable[[], float]:
    """A clock that is another second on at each look."""
    numbers = itertools.count()
    return lambda: float(next(numbers))


class Passes:
    """Passes over a sweep of three cells, which one pod is to train, and over these cells."""

    def __init__(self) -> None:
        spec = {"template": {"spec": TEMPLATE}, "grid": {"rank": [8, 16, 32]}, "cellsPerPod": 3}
        metadata = {"namespace": "team", "name": "rates", "uid": SWEEP_UID, "generation": 1, "resourceVersion": "7"}
        self.api = ApiServer(Agenda(0))
        self.api.logs = lambda _pod: self.log
        self.api.put("qlorasweeps", {"metadata": metadata, "spec": spec, "status": {}})
        for name in NAMES:
            self.put_cell(cell_body(name=name))
            fixed = present(present(cell_status("prepared", name)).resolved)
            owner = {"uid": UIDS[name], "controller": True}
            revision = revision_body(fixed, revision_of(fixed))
            revision["metadata"]["ownerReferences"] = [owner]
            self.api.put("controllerrevisions", revision)
        self.store, self.log = Store(), ""
        """What the watches have shown, and the log of each pod."""
        cluster = Cluster(self.api)
        progress = ProgressReader(cluster.read_log, _seconds(), concurrent=4)
        logs = ProgressReader(cluster.read_log, _seconds(), concurrent=4)
        self.woken: list[Key] = []
        """The cells that passes over the sweep have requested."""
        self._sweep = SweepReconciler(
            cluster, PROFILES, lambda: NOW, progress=progress, store=self.store, enqueue_cell=self.woken.append
        )
        self._cell = Reconciler(cluster, PROFILES, logs, Metrics(), lambda: NOW, starts(), self.store)

    @property
    def stored(self) -> dict[str, Any]:
        """The sweep."""
        return present(self.api.get("qlorasweeps", "rates"))

    def store_pods(self, *pods: dict[str, Any]) -> None:
        """Store these pods in the sweep's status."""
        self.api.put("qlorasweeps", self.stored | {"status": {"pods": list(pods)}})

    def sweep(self) -> tuple[dict[str, Any], float | None]:
        """The stored pod after a pass over the sweep, and the seconds until the next."""
        again = asyncio.run(self.reconcile_sweep())
        self.store.sweeps.note(self.stored)
        return self.stored["status"]["pods"][0], again

    async def reconcile_sweep(self) -> float | None:
        """Make a pass over the sweep, which no watch shows."""
        return await self._sweep.reconcile(("team", "rates"))

    def put_cell(self, body: dict[str, Any], **metadata: Any) -> None:
        """Store the cell with this metadata."""
        labels = {SWEEP_UID_LABEL: SWEEP_UID}
        self.api.put("qlorajobs", body | {"metadata": body["metadata"] | {"labels": labels} | metadata})

    def cell(self, name: str) -> dict[str, Any]:
        """The cell's status after a pass over it, as a watch shows it."""
        self.store.job_changed(present(self.api.get("qlorajobs", name)))
        asyncio.run(self._cell.reconcile(("team", name)))
        return dict(present(self.api.get("qlorajobs", name))["status"])

    def jobs(self) -> list[str]:
        """The names of the Jobs."""
        return [job["metadata"]["name"] for job in self.api.all("jobs")]


def test_the_sweep_creates_the_pod_of_its_cells_and_each_shows_its_progress() -> None:
    passes = Passes()
    stored, again = passes.sweep()
    assert (stored["cells"], passes.jobs(), again) == (list(NAMES), [], 0.0)
    # No watch may show the end of its Job.
    assert passes.sweep()[1] == 15.0
    (job,) = passes.api.all("jobs")
    assert (job["metadata"]["name"], job["metadata"]["ownerReferences"]) == (
        f"{POD}-train-1",
        [OWNER | {"blockOwnerDeletion": False}],
    )
    assert sweep_of_child(job) == ("team", "rates")
    uid = job["metadata"]["uid"]
    pod = of_the_pod(running(any_pod("train")))
    pod["metadata"]["ownerReferences"][0] |= {"uid": uid}
    passes.api.put("pods", pod)
    shown = {"pod_uid": f"uid-{POD}-train-1-pod1", "activity": "training", "training_step": 3, "total_steps": 9}
    records = [progress(job_uid=UIDS[name], loss=1.0 + number, **shown) for number, name in enumerate(NAMES)]
    passes.log = "\n".join(encode_record(record) for record in records)
    stored, again = passes.sweep()
    assert stored["pod"] == f"{POD}-train-1-pod1"
    assert again is not None
    for number, name in enumerate(NAMES):
        status = passes.cell(name)
        assert (status["phase"], status["progress"]["loss"]) == ("Training", 1.0 + number)
    assert len(passes.jobs()) == 1


def test_a_job_that_is_rejected_is_tried_again_and_the_cells_say_why_they_wait() -> None:
    passes = Passes()
    passes.api.rejected.add("jobs")
    passes.sweep()
    stored, again = passes.sweep()
    assert stored["reason"] == "JobRejected"
    assert present(again) > 0
    (why,) = [each for each in passes.cell(SECOND)["conditions"] if each["type"] == "Succeeded"]
    assert why["reason"] == "WaitingForSweep"
    assert "exceeded quota" in why["message"]
    passes.api.rejected.clear()
    passes.sweep()
    assert len(passes.jobs()) == 1


def test_a_job_of_another_owner_is_not_taken_for_that_of_the_pod() -> None:
    passes = Passes()
    passes.sweep()
    owner = OWNER | {"uid": "x"}
    foreign = {"name": f"{POD}-train-1", "namespace": "team", "uid": "foreign", "ownerReferences": [owner]}
    passes.api.put("jobs", {"metadata": foreign})
    stored, again = passes.sweep()
    assert (stored["reason"], again) == ("NameTaken", 5.0)
    passes.api.objects["jobs"].clear()
    passes.sweep()
    (job,) = passes.api.all("jobs")
    assert job["metadata"]["ownerReferences"][0]["uid"] == SWEEP_UID


STEP = {"name": "train", "jobName": f"{POD}-train-1", "attempt": 1}


@pytest.mark.parametrize("annotations", [{}, {"qlora.dev/cells-in-pod": "3"}], ids=["removed", "kept"])
def test_a_cell_decides_to_train_alone_by_the_sweep_as_it_is_now(annotations: dict[str, str]) -> None:
    passes = Passes()
    passes.put_cell(cell_body(name=FIRST), annotations=annotations)
    passes.store_pods({"number": 0, "step": STEP, "alone": [FIRST]})
    passes.store.sweeps.note(passes.stored)
    passes.store_pods({"number": 0, "step": STEP, "cells": list(NAMES)})
    passes.cell(FIRST)
    assert passes.jobs() == []
    passes.store_pods({"number": 0, "step": STEP, "alone": list(NAMES)})
    passes.store.sweeps.note(passes.stored)
    passes.cell(FIRST)
    assert passes.jobs() == [f"{FIRST}-train-1"]


def test_a_cell_does_not_wait_for_ever_for_a_sweep_whose_change_no_watch_has_shown() -> None:
    passes = Passes()
    passes.store_pods({"number": 0, "step": STEP, "waiting": list(NAMES)})
    passes.store.sweeps.note(passes.stored)
    passes.store_pods({"number": 0, "step": STEP, "alone": list(NAMES)})
    passes.cell(FIRST)
    assert passes.jobs() == []
    asyncio.run(passes.reconcile_sweep())
    assert ("team", FIRST) in passes.woken
    passes.cell(FIRST)
    assert passes.jobs() == [f"{FIRST}-train-1"]


def test_a_cell_whose_annotation_was_removed_is_trained_by_the_pod_and_nowhere_else() -> None:
    passes = Passes()
    passes.put_cell(cell_body(name=FIRST), annotations={})
    passes.sweep()
    passes.sweep()
    passes.cell(FIRST)
    assert [job["metadata"]["annotations"]["qlora.dev/cells"] for job in passes.api.all("jobs")] == [",".join(NAMES)]


@pytest.mark.parametrize("annotations", [{}, {"qlora.dev/cells-in-pod": "16"}], ids=["removed", "raised"])
def test_prepare_gets_the_number_of_cells_in_the_pod_from_the_sweep(annotations: dict[str, str]) -> None:
    passes = Passes()
    passes.put_cell(cell_body("new", FIRST))
    passes.sweep()
    passes.put_cell(cell_body("new", FIRST), annotations=annotations)
    for _ in range(2):
        passes.cell(FIRST)
    (job,) = passes.api.all("jobs")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "prepare"
    assert {"name": "QLORA_GROUP_SIZE", "value": "3"} in container["env"]


def test_a_cell_that_waits_reads_no_sweep_that_a_watch_has_shown() -> None:
    passes = Passes()
    passes.sweep()
    passes.cell(FIRST)
    # A watch is about to show it.
    passes.store_pods({"number": 0, "step": STEP, "alone": [FIRST]})
    passes.cell(FIRST)
    assert passes.jobs() == []


def test_the_index_names_the_cells_whose_pod_has_changed_for_them() -> None:
    index, pod = SweepIndex(), Pod()
    pod.then()
    assert pod.stored is not None
    body = {
        "metadata": {"namespace": "team", "name": "rates"},
        "spec": {"cellsPerPod": 3},
        "status": {"pods": [pod.stored.dump()]},
    }
    assert index.pods("team", "rates") is None
    assert index.note(body) == set(NAMES)
    assert index.note(body) == set()
    counted = pod.stored.model_copy(update={"active_seconds": 60}).dump()
    assert index.note(body | {"status": {"pods": [counted]}}) == set(), "time alone changes nothing for them"
    alone = pod.stored.model_copy(update={"alone": (THIRD,)}).dump()
    assert index.note(body | {"status": {"pods": [alone]}}) == set(NAMES)
    assert index.note(body | {"status": {"pods": [{"number": "x"}]}}) == set()
    assert index.pods("team", "rates") is None
    assert index.note(body, deleted=True) == set()
    index.note(body)
    assert index.note(body, deleted=True) == set(NAMES)
    assert index.note({"metadata": body["metadata"], "spec": {}}) == set(), "its cells are trained one by one"
    assert index.pods("team", "rates") == ()
