"""The operator is killed before or after any write of a sweep's life: it ends as if nothing had happened.

There are no controllers and no operator for the cells: the test ends them itself.
"""

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import pytest

from devcluster.controlplane import ControlPlane
from qlora_api.profile import Profile
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.connection import connect
from qlora_operator.reconcile.sweep import SweepReconciler
from tests.support.builders import ADAPTER, PROFILES
from tests.support.cluster.played import NAMESPACE, Api, prepared
from tests.support.sweeps import SWEEP, TEMPLATE

PATH = f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}"
SHARED_WORKSPACE = {"topology": "shared", "accessMode": "ReadWriteMany"}
LOSSES = {"00": 1.5, "01": 1.25}
Moment = Literal["before", "after"]
Object = dict[str, Any]


class KilledError(Exception):
    """The operator's process is gone."""


class Writes:
    """Counts the operator's writes, and kills it at one of them."""

    def __init__(self, cluster: Cluster, at: int = -1, moment: Moment = "before") -> None:
        self.made: list[str] = []
        self._send = cluster._request
        self._at, self._moment = at, moment
        cluster._request = self.request  # type: ignore[method-assign]

    async def request(self, method: str, path: str, **options: Any) -> bytes:
        if method == "GET":
            return await self._send(method, path, **options)
        killed = len(self.made) == self._at
        if killed and self._moment == "before":
            self._at = -1
            raise KilledError
        answer = await self._send(method, path, **options)
        self.made.append(f"{method} {path.rpartition('/')[2]}")
        if killed:
            self._at = -1
            raise KilledError
        return answer


async def end(api: Api, cell: str) -> None:
    """The cell has succeeded."""
    time_ = "2026-01-02T03:04:05Z"
    succeeded = {"type": "Succeeded", "status": "True", "reason": "Succeeded", "lastTransitionTime": time_}
    status = {
        "phase": "Succeeded",
        "conditions": [succeeded],
        "progress": {"evalLoss": LOSSES[cell[-2:]]},
        "adapter": ADAPTER.dump(),
    }
    await api.send("PATCH", f"{PATH}/qlorajobs/{cell}/status", {"status": status})


async def live(plane: ControlPlane, name: str, at: int = -1, moment: Moment = "before") -> tuple[Object, list[str]]:
    """The status at the end of a sweep of two cells, and what the operators have written in its life.

    `at`: the write at which the first of them is killed.
    """
    spec = {"template": {"spec": TEMPLATE}, "cells": [{}, {"rank": 8}]}
    async with connect(plane.kubeconfig) as users, connect(plane.kubeconfig) as cluster:
        api, writes = Api(users), Writes(cluster, at, moment)
        await api.create(f"{PATH}/qlorasweeps", SWEEP | {"metadata": {"name": name}, "spec": spec})
        for cell in (f"{name}-00", f"{name}-01"):
            await settle(cluster, name)
            await end(api, cell)
        await settle(cluster, name)
        sweep = await api.send("GET", f"{PATH}/qlorasweeps/{name}")
    return sweep["status"], writes.made


async def settle(cluster: Cluster, name: str, profiles: Mapping[str, Profile] = PROFILES) -> None:
    """Passes of operators without shared memory, until one has written nothing."""
    for _ in range(20):
        reconciler = SweepReconciler(cluster, profiles, clock=lambda: datetime.now(UTC))
        before = (await cluster.get_sweep(NAMESPACE, name) or {})["metadata"]["resourceVersion"]
        try:
            await reconciler.reconcile((NAMESPACE, name))
        except KilledError:
            continue
        if before == (await cluster.get_sweep(NAMESPACE, name) or {})["metadata"]["resourceVersion"]:
            return
    raise AssertionError("the operator does not come to rest")


def compared(status: Object, name: str) -> Object:
    """The part that two lives share: all but times, UIDs and the name of the sweep."""
    cells = [{**cell, "name": cell["name"].removeprefix(name), "uid": bool(cell["uid"])} for cell in status["cells"]]
    best = status["best"] | {"cell": status["best"]["cell"].removeprefix(name)}
    conditions = [
        (entry["type"], entry["status"], entry["reason"], entry["message"].replace(name, ""))
        for entry in status["conditions"]
    ]
    kept = ("phase", "summary", "succeeded", "failed", "running", "pending")
    return {key: status[key] for key in kept} | {"cells": cells, "best": best, "conditions": conditions}


def test_a_sweep_ends_the_same_wherever_the_operator_is_killed(plane: ControlPlane) -> None:
    asyncio.run(compare_lives(plane))


async def compare_lives(plane: ControlPlane) -> None:
    prepared(plane)
    undisturbed, writes = await live(plane, "undisturbed")
    assert (undisturbed["phase"], undisturbed["best"]["cell"]) == ("Succeeded", "undisturbed-01")
    assert writes.count("POST qlorajobs") == 2
    # Each change of the cells is one write of the status: two are created, two end.
    assert writes.count("PATCH status") == 3
    for moment in get_args(Moment):
        for at in range(len(writes)):
            name = f"killed-{moment}-{at}"
            status, made = await live(plane, name, at, moment)
            assert compared(status, name) == compared(undisturbed, "undisturbed"), (moment, writes[at])
            assert made.count("POST qlorajobs") == 2, (moment, writes[at])


async def live_halved(plane: ControlPlane, name: str, at: int = -1, moment: Moment = "before") -> Object:
    """The last status of a sweep with a stopped cell, and the number of its writes."""
    template = TEMPLATE | {"training": {"evalEverySteps": 10}}
    halving = {"minSteps": 10, "factor": 2}
    spec = {"template": {"spec": template}, "cells": [{}, {"rank": 8}], "parallelism": 2, "halving": halving}
    shared = {"default": Profile.model_validate(PROFILES["default"].dump() | {"workspace": SHARED_WORKSPACE})}
    async with connect(plane.kubeconfig) as users, connect(plane.kubeconfig) as cluster:
        api, writes = Api(users), Writes(cluster, at, moment)
        await api.create(f"{PATH}/qlorasweeps", SWEEP | {"metadata": {"name": name}, "spec": spec})
        await settle(cluster, name, shared)
        for cell, loss in ((f"{name}-00", 1.25), (f"{name}-01", 1.5)):
            found = {"totalSteps": 100, "evaluations": [{"step": 10, "evalLoss": loss}]}
            status = {"phase": "Training", "progress": found}
            await api.send("PATCH", f"{PATH}/qlorajobs/{cell}/status", {"status": status})
        await settle(cluster, name, shared)
        stopped = await api.send("GET", f"{PATH}/qlorajobs/{name}-01")
        assert stopped["spec"]["suspend"] is True
        assert "2nd of 2" in stopped["metadata"]["annotations"]["qlora.dev/stopped-by-sweep"]
        await api.send("PATCH", f"{PATH}/qlorajobs/{name}-01/status", {"status": {"phase": "Suspended"}})
        await end(api, f"{name}-00")
        await settle(cluster, name, shared)
        sweep = await api.send("GET", f"{PATH}/qlorasweeps/{name}")
    return {**sweep["status"], "writes": len(writes.made)}


@pytest.mark.slow
def test_a_cell_is_stopped_once_wherever_the_operator_is_killed(plane: ControlPlane) -> None:
    asyncio.run(compare_halved_lives(plane))


async def compare_halved_lives(plane: ControlPlane) -> None:
    prepared(plane)
    undisturbed = await live_halved(plane, "halved")
    assert (undisturbed["phase"], undisturbed["stopped"], undisturbed["best"]["cell"]) == ("Succeeded", 1, "halved-00")
    assert undisturbed["cells"][1]["message"] == "stopped at step 10: 2nd of 2, the best goes on"
    for moment in get_args(Moment):
        for at in range(undisturbed["writes"]):
            name = f"halved-{moment}-{at}"
            status = await live_halved(plane, name, at, moment)
            assert compared(status, name) == compared(undisturbed, "halved"), (moment, at)


def test_nothing_is_written_for_a_sweep_at_rest(plane: ControlPlane) -> None:
    asyncio.run(pass_at_rest(plane))


async def pass_at_rest(plane: ControlPlane) -> None:
    prepared(plane)
    await live(plane, "rests")
    async with connect(plane.kubeconfig) as cluster:
        writes = Writes(cluster)
        reconciler = SweepReconciler(cluster, PROFILES, clock=lambda: datetime.now(UTC))
        assert await reconciler.reconcile((NAMESPACE, "rests")) is None
        assert writes.made == []
