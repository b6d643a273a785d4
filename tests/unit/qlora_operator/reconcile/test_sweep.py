"""One pass over a sweep that publishes its best cell: its requests and results."""

import asyncio
from typing import Any

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, parse_cell
from qlora_operator.kube.errors import NotFoundError
from qlora_operator.reconcile.sweep import SweepReconciler
from tests.support.builders import ADAPTER, NOW, PROFILES, UID, condition, job_body, time
from tests.support.sweeps import TEMPLATE

OWNER = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "name": "rates", "uid": UID, "controller": True}


def cell(number: int, eval_loss: float, **spec: Any) -> dict[str, Any]:
    """A cell that has succeeded, as stored."""
    conditions = [condition("Succeeded", "True")]
    progress = {"evalLoss": eval_loss}
    body = job_body(
        {"phase": "Succeeded", "adapter": ADAPTER.dump(), "progress": progress, "conditions": conditions}, **spec
    )
    body["metadata"] |= {"name": f"rates-{number:02}", "uid": f"uid-{number}", "ownerReferences": [OWNER]}
    return body


class Api:
    """The calls that a sweep needs. `unlabelled`: QLoRAJobs that no list by label has."""

    def __init__(self, *jobs: dict[str, Any]) -> None:
        template = TEMPLATE | {"output": {"destination": "hf://org/adapter"}}
        spec = {"template": {"spec": template}, "cells": [{"rank": 8}, {"rank": 16}], "publish": "best"}
        metadata = {"namespace": "team", "name": "rates", "uid": UID, "generation": 1, "resourceVersion": "7"}
        self.sweep: dict[str, Any] = {"metadata": metadata, "spec": spec}
        self.jobs = {job["metadata"]["name"]: job for job in jobs}
        self.unlabelled: set[str] = set()

    async def get_sweep(self, _namespace: str, _name: str) -> Object:
        return self.sweep

    async def list_cells(self, _namespace: str, sweep_uid: str) -> list[CellJob]:
        found = (parse_cell(body, sweep_uid) for name, body in self.jobs.items() if name not in self.unlabelled)
        return [job for job in found if job is not None]

    async def get_cell(self, _namespace: str, name: str) -> Object:
        if name not in self.jobs:
            raise NotFoundError(name)
        return self.jobs[name]

    async def create_claim(self, _namespace: str, _manifest: Object) -> None: ...

    async def create_cell(self, _namespace: str, manifest: Object) -> Object:
        metadata = {**manifest["metadata"], "uid": "uid-best"}
        self.jobs[metadata["name"]] = dict(manifest) | {"metadata": metadata}
        return self.jobs[metadata["name"]]

    async def apply_sweep_status(self, _sweep: QLoRASweep, status: Object) -> None:
        self.sweep["status"] = status

    async def create_event(self, _namespace: str, _manifest: Object) -> None: ...


def passes(api: Api) -> dict[str, Any]:
    """The sweep's status after a pass."""
    reconciler = SweepReconciler(api, PROFILES, lambda: NOW)  # type: ignore[arg-type]
    asyncio.run(reconciler.reconcile(("team", "rates")))
    return dict(api.sweep["status"])


def succeeded(status: dict[str, Any]) -> tuple[str, str]:
    (found,) = [entry for entry in status["conditions"] if entry["type"] == "Succeeded"]
    return found["reason"], found["message"]


def test_the_best_cell_is_found_without_its_label() -> None:
    running = cell(1, 1.5)
    running["status"] = {"phase": "Training"}
    api = Api(cell(0, 1.25), running)
    assert passes(api)["best"]["cell"] == "rates-00"
    api.unlabelled, api.jobs["rates-01"] = {"rates-00"}, cell(1, 1.5)
    status = passes(api)
    assert (status["phase"], status["published"]["cell"]) == ("Running", "rates-00")
    assert api.jobs["rates-best"]["spec"]["continues"] == "rates-00"
    # It is needed until that job has read where its run is.
    assert passes(api)["phase"] == "Running"


def test_a_best_cell_deleted_before_its_run_is_continued_ends_the_sweep() -> None:
    api = Api(cell(0, 1.25), cell(1, 1.5))
    assert passes(api)["phase"] == "Running"
    del api.jobs["rates-00"]
    assert succeeded(passes(api))[0] == "BestNotPublished"
    api.jobs["rates-best"]["status"] = {"phase": "Preparing", "resolved": {"newer": "than this operator"}}
    assert succeeded(passes(api))[0] == "Running", "it has read it before"


def test_a_change_of_the_best_cell_that_cannot_be_read_is_in_the_status() -> None:
    api = Api(cell(0, 1.25, gate={"newer": 1}), cell(1, 1.5))
    status = passes(api)
    assert (status["phase"], status["summary"]) == ("Running", "2/2")
    assert succeeded(status) == (
        "CellsNotReadable",
        "the spec of QLoRAJob rates-00: gate.newer: Extra inputs are not permitted",
    )
    assert "rates-best" not in api.jobs


def test_a_sweep_whose_cells_cannot_be_made_is_at_its_end() -> None:
    api = Api()
    api.sweep["spec"] = {"template": {"spec": TEMPLATE}, "grid": {"learningRate": [0.0001, 0.0001]}}
    status = passes(api)
    assert (status["phase"], succeeded(status)[0]) == ("Failed", "InvalidCells")
    assert "rates-01" in succeeded(status)[1]
    assert status["completionTime"] == time()


def test_a_sweep_that_would_train_an_adapter_twice_creates_nothing() -> None:
    api = Api()
    api.sweep["spec"] = {"template": {"spec": TEMPLATE}, "cells": [{}, {"rank": 64}]}
    for _ in range(2):
        status = passes(api)
        assert (status["phase"], succeeded(status)[0]) == ("Failed", "InvalidCells")
        assert "spec.cells[1] (rank=64) is the same as spec.cells[0] (template)" in succeeded(status)[1]
    assert api.jobs == {}


def test_a_sweep_with_equal_cells_that_an_earlier_release_has_admitted_goes_on() -> None:
    spec = {"template": {"spec": TEMPLATE}, "cells": [{}, {"rank": 64}]}
    waiting = Api()
    waiting.sweep |= {
        "spec": spec,
        "status": {"phase": "Pending", "cells": [{"name": "rates-00", "overrides": "template"}]},
    }
    interrupted = Api(cell(0, 1.25))
    interrupted.sweep["spec"] = spec
    for api, created in ((waiting, "rates-00"), (interrupted, "rates-01")):
        assert passes(api)["phase"] == "Running"
        assert created in api.jobs
