"""Passes over a sweep whose cells one pod trains, and over these cells."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from qlora_api.contract import encode_record
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.sweeps.sweep import CellJob, parse_cell, sweep_of_child
from qlora_operator.kube.errors import AlreadyExistsError, RejectedError
from qlora_operator.kube.listing import ChildKind, ChildList, child_view
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.reconcile.progress import ProgressReader
from qlora_operator.reconcile.sweep import SweepReconciler
from qlora_operator.watch.store import Store
from qlora_operator.watch.sweep_index import SweepIndex
from tests.support.builders import NOW, PROFILES, progress, running, starts, time
from tests.support.builders import pod as any_pod
from tests.support.cluster.shared_pods import NAMES, OWNER, POD, SWEEP_UID, UIDS, Pod, cell_body, of_the_pod
from tests.support.sweeps import TEMPLATE

FIRST, SECOND, THIRD = NAMES


class Api:
    """The calls of the API server that a sweep and its cells need, and what is stored."""

    def __init__(self) -> None:
        spec = {"template": {"spec": TEMPLATE}, "grid": {"rank": [8, 16, 32]}, "cellsPerPod": 3}
        metadata = {"namespace": "team", "name": "rates", "uid": SWEEP_UID, "generation": 1, "resourceVersion": "7"}
        self.sweep: dict[str, Any] = {"metadata": metadata, "spec": spec}
        self.cells = {name: cell_body(name=name) for name in NAMES}
        self.jobs: list[dict[str, Any]] = []
        self.pods: list[dict[str, Any]] = []
        self.rejects = False
        self.log = ""
        self.reads_of_sweep = 0

    async def get_sweep(self, _namespace: str, _name: str) -> Object:
        self.reads_of_sweep += 1
        return self.sweep

    async def list_cells(self, _namespace: str, sweep_uid: str) -> list[CellJob]:
        found = (parse_cell(body, sweep_uid) for body in self.cells.values())
        return [cell for cell in found if cell is not None]

    async def get_qlora_job(self, _namespace: str, name: str) -> Object | None:
        return self.cells.get(name)

    async def list_jobs(self, _namespace: str, _name: str, job_uid: str) -> ChildList:
        return self._children("jobs", self.jobs, job_uid)

    async def list_pods(self, _namespace: str, job_uid: str) -> ChildList:
        return self._children("pods", self.pods, job_uid)

    def _children(self, kind: ChildKind, bodies: list[dict[str, Any]], job_uid: str) -> ChildList:
        views = [child_view(kind, body) for body in bodies]
        return ChildList([view for view in views if view.job_uid == job_uid], "9")

    async def create_job(self, _namespace: str, manifest: Object) -> Object:
        if self.rejects:
            raise RejectedError("exceeded quota")
        name = manifest["metadata"]["name"]
        if any(job["metadata"]["name"] == name for job in self.jobs):
            raise AlreadyExistsError(name)
        more = {"uid": f"uid-{name}", "creationTimestamp": time(), "resourceVersion": "8"}
        self.jobs.append({"metadata": manifest["metadata"] | more, "spec": manifest["spec"], "status": {}})
        return self.jobs[-1]

    async def get_job(self, _namespace: str, name: str) -> Object:
        return next(job for job in self.jobs if job["metadata"]["name"] == name)

    async def delete_job(self, _namespace: str, name: str, _uid: str) -> None:
        self.jobs = [job for job in self.jobs if job["metadata"]["name"] != name]

    async def apply_sweep_status(self, _sweep: object, status: Object) -> None:
        self.sweep = self.sweep | {"status": status}

    async def apply_status(self, job: QLoRAJob, status: Object) -> Object:
        self.cells[job.name] = self.cells[job.name] | {"status": status}
        return self.cells[job.name]

    async def create_event(self, _namespace: str, _manifest: Object) -> None: ...

    async def read_log(self, _namespace: str, _pod: str) -> str:
        return self.log


def _seconds() -> Callable[[], float]:
    """A clock that is another second on at each look."""
    numbers = itertools.count()
    return lambda: float(next(numbers))


class Passes:
    """Passes with an operator that keeps what the watches have shown."""

    def __init__(self, api: Api) -> None:
        self.api, self.store, progress = api, Store(), ProgressReader(api.read_log, _seconds(), concurrent=4)
        cluster: Any = api
        self._sweep = SweepReconciler(cluster, PROFILES, lambda: NOW, progress=progress)
        logs = ProgressReader(api.read_log, _seconds(), concurrent=4)
        self._cell = Reconciler(api, PROFILES, logs, Metrics(), lambda: NOW, starts(), self.store)  # type: ignore[arg-type]

    def sweep(self) -> tuple[dict[str, Any], float | None]:
        """The stored pod after a pass over the sweep, and the seconds until the next."""
        again = asyncio.run(self._sweep.reconcile(("team", "rates")))
        self.store.sweeps.note(self.api.sweep)
        return self.api.sweep["status"]["pods"][0], again

    def cell(self, name: str) -> dict[str, Any]:
        """The cell's status after a pass over it."""
        asyncio.run(self._cell.reconcile(("team", name)))
        return dict(self.api.cells[name]["status"])


def test_the_sweep_creates_the_pod_of_its_cells_and_each_shows_its_progress() -> None:
    api = Api()
    passes = Passes(api)
    stored, again = passes.sweep()
    assert (stored["cells"], api.jobs, again) == (list(NAMES), [], 0.0)
    # No watch may show the end of its Job.
    assert passes.sweep()[1] == 15.0
    (job,) = api.jobs
    assert (job["metadata"]["name"], job["metadata"]["ownerReferences"]) == (
        f"{POD}-train-1",
        [OWNER | {"blockOwnerDeletion": False}],
    )
    assert sweep_of_child(job) == ("team", "rates")
    api.pods = [of_the_pod(running(any_pod("train")))]
    shown = {"pod_uid": f"uid-{POD}-train-1-pod1", "activity": "training", "training_step": 3, "total_steps": 9}
    records = [progress(job_uid=UIDS[name], loss=1.0 + number, **shown) for number, name in enumerate(NAMES)]
    api.log = "\n".join(encode_record(record) for record in records)
    stored, again = passes.sweep()
    assert stored["pod"] == f"{POD}-train-1-pod1"
    assert again is not None
    for number, name in enumerate(NAMES):
        status = passes.cell(name)
        assert (status["phase"], status["progress"]["loss"]) == ("Training", 1.0 + number)
    assert len(api.jobs) == 1


def test_a_job_that_is_rejected_is_tried_again_and_the_cells_say_why_they_wait() -> None:
    api = Api()
    api.rejects, passes = True, Passes(api)
    passes.sweep()
    stored, again = passes.sweep()
    assert stored["reason"] == "JobRejected"
    assert again is not None
    assert again > 0
    (why,) = [each for each in passes.cell(SECOND)["conditions"] if each["type"] == "Succeeded"]
    assert why["reason"] == "WaitingForSweep"
    assert "exceeded quota" in why["message"]
    api.rejects = False
    passes.sweep()
    assert len(api.jobs) == 1


def test_a_job_of_another_owner_is_not_taken_for_that_of_the_pod() -> None:
    api = Api()
    passes = Passes(api)
    passes.sweep()
    foreign = {
        "name": f"{POD}-train-1",
        "namespace": "team",
        "uid": "foreign",
        "ownerReferences": [OWNER | {"uid": "x"}],
    }
    api.jobs = [{"metadata": foreign}]
    stored, again = passes.sweep()
    assert (stored["reason"], again) == ("NameTaken", 5.0)
    api.jobs = []
    passes.sweep()
    assert [job["metadata"]["uid"] for job in api.jobs] == [f"uid-{POD}-train-1"]


@pytest.mark.parametrize("annotations", [{}, {"qlora.dev/cells-in-pod": "3"}], ids=["removed", "kept"])
def test_a_cell_decides_to_train_alone_by_the_sweep_as_it_is_now(annotations: dict[str, str]) -> None:
    api = Api()
    passes = Passes(api)
    api.cells[FIRST]["metadata"]["annotations"] = annotations
    step = {"name": "train", "jobName": f"{POD}-train-1", "attempt": 1}
    alone = {"metadata": api.sweep["metadata"], "spec": api.sweep["spec"]}
    passes.store.sweeps.note(alone | {"status": {"pods": [{"number": 0, "step": step, "alone": [FIRST]}]}})
    api.sweep["status"] = {"pods": [{"number": 0, "step": step, "cells": list(NAMES)}]}
    passes.store.job_changed(api.cells[FIRST])
    passes.cell(FIRST)
    assert api.jobs == []
    api.sweep["status"] = {"pods": [{"number": 0, "step": step, "alone": list(NAMES)}]}
    passes.store.sweeps.note(api.sweep)
    passes.cell(FIRST)
    assert [job["metadata"]["name"] for job in api.jobs] == [f"{FIRST}-train-1"]


def test_a_cell_whose_annotation_was_removed_is_trained_by_the_pod_and_nowhere_else() -> None:
    api = Api()
    passes = Passes(api)
    del api.cells[FIRST]["metadata"]["annotations"]
    passes.sweep()
    passes.sweep()
    passes.store.job_changed(api.cells[FIRST])
    passes.cell(FIRST)
    assert [job["metadata"]["annotations"]["qlora.dev/cells"] for job in api.jobs] == [",".join(NAMES)]


@pytest.mark.parametrize("annotations", [{}, {"qlora.dev/cells-in-pod": "16"}], ids=["removed", "raised"])
def test_prepare_gets_the_number_of_cells_in_the_pod_from_the_sweep(annotations: dict[str, str]) -> None:
    api = Api()
    passes = Passes(api)
    api.cells[FIRST] = cell_body("new", FIRST)
    passes.sweep()
    api.cells[FIRST]["metadata"]["annotations"] = annotations
    for _ in range(2):
        passes.store.job_changed(api.cells[FIRST])
        passes.cell(FIRST)
    (job,) = api.jobs
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "prepare"
    assert {"name": "QLORA_GROUP_SIZE", "value": "3"} in container["env"]


def test_a_cell_that_waits_reads_no_sweep_that_a_watch_has_shown() -> None:
    api = Api()
    passes = Passes(api)
    passes.sweep()
    passes.store.job_changed(api.cells[FIRST])
    passes.cell(FIRST)
    passes.store.job_changed(api.cells[FIRST])
    before = api.reads_of_sweep
    passes.cell(FIRST)
    assert api.reads_of_sweep == before


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
