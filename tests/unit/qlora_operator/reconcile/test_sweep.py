"""One pass over a sweep that publishes its best cell: its requests and results."""

import asyncio
from datetime import datetime
from typing import Any

import pytest

from qlora_api.naming import SUSPENDED_ANNOTATION, SWEEP_UID_LABEL
from qlora_operator.kube.client import Cluster
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.queue import RetryError
from qlora_operator.reconcile.sweep import SweepReconciler
from tests.support.builders import (
    ADAPTER,
    NOW,
    PROFILES,
    REVISION,
    UID,
    after,
    condition,
    job_body,
    present,
    step_status,
    time,
)
from tests.support.sweeps import TEMPLATE
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import AnswerError, ApiServer

OWNER = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": "rates", "uid": UID, "controller": True}


def cell(number: int, eval_loss: float, **spec: Any) -> dict[str, Any]:
    """A cell that has succeeded, as stored."""
    conditions = [condition("Succeeded", "True")]
    progress = {"evalLoss": eval_loss}
    body = job_body(
        {"phase": "Succeeded", "adapter": ADAPTER.dump(), "progress": progress, "conditions": conditions}, **spec
    )
    labels = {SWEEP_UID_LABEL: UID}
    more = {"name": f"rates-{number:02}", "uid": f"uid-{number}", "ownerReferences": [OWNER], "labels": labels}
    return body | {"metadata": body["metadata"] | more}


class Namespace(ApiServer):
    """A sweep that publishes its best cell, and these QLoRAJobs."""

    def __init__(self, *jobs: dict[str, Any], status: dict[str, Any] | None = None, **spec: Any) -> None:
        super().__init__(Agenda(0))
        template = TEMPLATE | {"output": {"destination": "hf://org/adapter"}}
        content = spec or {"template": {"spec": template}, "cells": [{"rank": 8}, {"rank": 16}], "publish": "best"}
        metadata = {"namespace": "team", "name": "rates", "uid": UID, "generation": 1, "resourceVersion": "7"}
        self.put("qlorasweeps", {"metadata": metadata, "spec": content, "status": status or {}})
        self.put("qlorajobs", *jobs)

    def job(self, name: str) -> dict[str, Any]:
        """The stored QLoRAJob."""
        return present(self.get("qlorajobs", name))


def sweeps(namespace: Namespace, now: datetime = NOW) -> SweepReconciler:
    return SweepReconciler(Cluster(namespace), PROFILES, lambda: now)


def passes(namespace: Namespace) -> dict[str, Any]:
    """The sweep's status after a pass."""
    reconcile(namespace, Metrics())
    return dict(present(namespace.get("qlorasweeps", "rates"))["status"])


def reconcile(namespace: Namespace, metrics: Metrics) -> None:
    reconciler = SweepReconciler(Cluster(namespace), PROFILES, lambda: NOW, metrics=metrics)
    asyncio.run(reconciler.reconcile(("team", "rates")))


def succeeded(status: dict[str, Any]) -> tuple[str, str]:
    (found,) = [entry for entry in status["conditions"] if entry["type"] == "Succeeded"]
    return found["reason"], found["message"]


def test_a_sweep_of_another_controller_gets_no_cells_and_no_status() -> None:
    namespace = Namespace(template={"spec": TEMPLATE}, cells=[{"rank": 8}], managedBy="example.org/controller")
    assert (passes(namespace), namespace.get("qlorajobs", "rates-00")) == ({}, None)


def test_the_best_cell_is_found_without_its_label() -> None:
    namespace = Namespace(cell(0, 1.25), cell(1, 1.5) | {"status": {"phase": "Training"}})
    assert passes(namespace)["best"]["cell"] == "rates-00"
    del namespace.job("rates-00")["metadata"]["labels"]
    namespace.put("qlorajobs", cell(1, 1.5))
    status = passes(namespace)
    assert (status["phase"], status["published"]["cell"]) == ("Running", "rates-00")
    assert namespace.job("rates-best")["spec"]["continues"] == "rates-00"
    # It is needed until that job has read where its run is.
    assert passes(namespace)["phase"] == "Running"


def test_a_best_cell_deleted_before_its_run_is_continued_ends_the_sweep() -> None:
    namespace = Namespace(cell(0, 1.25), cell(1, 1.5))
    assert passes(namespace)["phase"] == "Running"
    namespace.remove("qlorajobs", "rates-00")
    assert succeeded(passes(namespace))[0] == "BestNotPublished"
    namespace.job("rates-best")["status"] = {"phase": "Preparing", "currentRevision": "rates-best-1-0"}
    assert succeeded(passes(namespace))[0] == "Running", "it has read it before"


def test_a_change_of_the_best_cell_that_cannot_be_read_is_in_the_status() -> None:
    namespace = Namespace(cell(0, 1.25, gate={"newer": 1}), cell(1, 1.5))
    status = passes(namespace)
    assert (status["phase"], status["summary"]) == ("Running", "2/2")
    reason, message = succeeded(status)
    assert reason == "CellsNotReadable"
    assert message.startswith(
        "the spec of QLoRAJob rates-00: gate.newer: unknown field; allowed are benchmarks, guards"
    )
    assert namespace.get("qlorajobs", "rates-best") is None


class Overtaken(Namespace):
    """A user changes the first cell whenever the cells have been read."""

    async def send(self, method: str, path: str, **request: Any) -> tuple[int, bytes]:
        answer = await super().send(method, path, **request)
        if method == "GET" and path.endswith("/qlorajobs"):
            self.change("qlorajobs", "rates-00", metadata={"annotations": {}})
        return answer


def test_a_cell_that_changes_after_it_was_read_is_decided_again() -> None:
    marked = cell(0, 1.25, suspend=True) | {"status": {"phase": "Suspended"}}
    marked["metadata"]["annotations"] = {SUSPENDED_ANNOTATION: "true"}
    namespace = Overtaken(marked, cell(1, 1.5))
    with pytest.raises(RetryError, match="Conflict"):
        passes(namespace)
    assert passes(namespace)["cells"][0]["phase"] == "Suspended"
    assert namespace.job("rates-00")["spec"]["suspend"], "its user has taken over the suspension"


EQUAL_CELLS: dict[str, Any] = {
    "template": {"spec": TEMPLATE | {"lora": {"rank": 64}}},
    "cells": [{}, {"rank": 64}],
}


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ({"template": {"spec": TEMPLATE}, "grid": {"learningRate": [0.0001, 0.0001]}}, "rates-01"),
        (EQUAL_CELLS, "spec.cells[1] (rank=64) is the same as spec.cells[0] (template)"),
    ],
)
def test_a_sweep_that_would_train_an_adapter_twice_creates_nothing(spec: dict[str, Any], sentence: str) -> None:
    namespace = Namespace(**spec)
    for _ in range(2):
        status = passes(namespace)
        assert (status["phase"], status["completionTime"]) == ("Failed", time())
        assert succeeded(status)[0] == "InvalidCells"
        assert sentence in succeeded(status)[1]
    assert namespace.all("qlorajobs") == []


def test_a_sweep_with_equal_cells_that_an_earlier_release_has_admitted_goes_on() -> None:
    pending = {"phase": "Pending", "cells": [{"name": "rates-00", "overrides": "template"}]}
    waiting, interrupted = Namespace(status=pending, **EQUAL_CELLS), Namespace(cell(0, 1.25), **EQUAL_CELLS)
    for namespace, created in ((waiting, "rates-00"), (interrupted, "rates-01")):
        assert passes(namespace)["phase"] == "Running"
        assert namespace.get("qlorajobs", created) is not None


def test_failed_passes_and_status_writes_are_counted_and_conflicts_are_not() -> None:
    namespace, metrics = Namespace(cell(0, 1.25), cell(1, 1.5)), Metrics()

    def errors(status: int, reason: str) -> list[float | None]:
        def deny(method: str, kind: str, *_: object) -> None:
            if kind == "qlorasweeps":
                raise AnswerError(status, reason)

        namespace.check = deny
        with pytest.raises(RetryError):
            reconcile(namespace, metrics)
        names = (f"qlora_operator_{name}_total" for name in ("reconcile_errors", "status_write_errors"))
        return [metrics.registry.get_sample_value(name, {"kind": "QLoRASweep"}) for name in names]

    assert errors(403, "Forbidden") == [1, 1]
    assert errors(409, "Conflict") == [1, 1]


def test_a_sweep_is_counted_by_its_phase_and_timed_when_it_ends() -> None:
    cells: dict[str, Any] = {"template": {"spec": TEMPLATE}, "cells": [{"rank": 8}, {"rank": 16}]}
    running = {"phase": "Running", "startTime": time(-3000)}
    namespace, metrics = Namespace(cell(0, 1.25), status=running, **cells), Metrics()

    def sweeps(phase: str) -> float | None:
        return metrics.registry.get_sample_value("qlora_sweeps", {"namespace": "team", "phase": phase})

    def durations(what: str) -> float | None:
        return metrics.registry.get_sample_value(f"qlora_sweep_duration_seconds_{what}", {"phase": "Succeeded"})

    reconcile(namespace, metrics)
    assert (sweeps("Running"), sweeps("Succeeded"), durations("count")) == (1, 0, 0)
    namespace.put("qlorajobs", cell(1, 1.5))
    for _ in range(2):
        reconcile(namespace, metrics)
    assert (sweeps("Running"), sweeps("Succeeded")) == (0, 1)
    assert (durations("count"), durations("sum")) == (1, 3000)
    namespace.remove("qlorasweeps", "rates")
    reconcile(namespace, metrics)
    assert sweeps("Succeeded") is None


def ended(*, phase: str = "Succeeded", **spec: Any) -> Namespace:
    """A sweep with one cell that has ended, after the pass that stores its end."""
    body = cell(0, 1.25)
    body["status"] |= {"phase": phase, "conditions": [condition(phase, "True")], "completionTime": time(-60)}
    template = TEMPLATE | {"output": {"destination": "s3://bucket/adapters"}} | spec.pop("template", {})
    namespace = Namespace(body, template={"spec": template}, cells=[{"rank": 8}], **spec)
    passes(namespace)
    return namespace


def test_a_sweep_is_deleted_so_many_seconds_after_its_end_and_no_cell_before() -> None:
    namespace = ended(ttlSecondsAfterFinished=100)
    namespace.job("rates-00")["spec"]["ttlSecondsAfterFinished"] = 0
    for second, exists in ((0, True), (99, True), (100, False)):
        again = asyncio.run(sweeps(namespace, after(second)).reconcile(("team", "rates")))
        assert again == (100 - second if exists else None)
        assert (namespace.get("qlorasweeps", "rates") is not None) == exists
    assert namespace.get("qlorajobs", "rates-00") is not None, "its owner takes it along"


@pytest.mark.parametrize("spec", [{"cleanupAfterSeconds": 10}, {"retry": {"request": "a"}}], ids=str)
def test_a_sweep_waits_for_the_clean_up_and_the_retry_of_its_cells(spec: dict[str, Any]) -> None:
    namespace = ended(phase="Failed", ttlSecondsAfterFinished=0)
    found = namespace.job("rates-00")
    found["spec"] |= spec
    found["status"] |= {"currentRevision": REVISION, "step": step_status("train").dump()}
    passes(namespace)
    assert namespace.get("qlorasweeps", "rates") is not None


def test_a_sweep_that_never_could_run_is_deleted_too() -> None:
    namespace = Namespace(**EQUAL_CELLS, ttlSecondsAfterFinished=0)
    passes(namespace)
    assert asyncio.run(sweeps(namespace).reconcile(("team", "rates"))) is None
    assert namespace.all("qlorasweeps") == []


@pytest.mark.parametrize(("phase", "owner", "deleted"), [
    ("Succeeded", UID, True), ("Failed", UID, False), ("Succeeded", "another", False),
])  # fmt: skip
def test_the_claim_of_a_sweep_goes_when_it_has_succeeded(phase: str, owner: str, deleted: bool) -> None:
    policy = {"persistentVolumeClaimRetentionPolicy": {"whenFinished": "Delete"}}
    namespace = ended(phase=phase, template={"workspace": policy})
    name = present(namespace.get("qlorasweeps", "rates"))["status"]["claimName"]
    metadata = {"name": name, "uid": "of the claim", "labels": {SWEEP_UID_LABEL: owner}}
    namespace.put("persistentvolumeclaims", {"metadata": metadata, "spec": {}})
    status = passes(namespace)
    assert ("deletionTimestamp" in present(namespace.get("persistentvolumeclaims", name))["metadata"]) == deleted
    assert ("claimDeletionTime" in status) == (phase == "Succeeded")
