"""What the API server denies a sweep is in its status, and is not asked for again at each event.

There are no controllers and no operator for the cells.
"""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.connection import connect
from qlora_operator.kube.errors import RejectedError
from qlora_operator.reconcile.sweep import SweepReconciler
from tests.support.builders import PROFILES
from tests.support.cluster.played import NAMESPACE, Api, prepared
from tests.support.sweeps import SWEEP

PATH = f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}"
Object = dict[str, Any]


class Operator:
    """Passes over one sweep at set times; the API server denies the kinds in `denies`."""

    def __init__(self, cluster: Cluster, api: Api, name: str) -> None:
        self.denies: Callable[[str, str], bool] = lambda _method, _path: False
        self.denied = 0
        self.seconds = 0.0
        self._api, self._name = api, name
        self._send = cluster._request
        cluster._request = self._request  # type: ignore[method-assign]
        start = datetime.now(UTC)
        self._reconciler = SweepReconciler(cluster, PROFILES, clock=lambda: start + timedelta(seconds=self.seconds))

    async def _request(self, method: str, path: str, **options: Any) -> bytes:
        if self.denies(method, path):
            self.denied += 1
            raise RejectedError("exceeded quota")
        return await self._send(method, path, **options)

    async def pass_at(self, seconds: float) -> float | None:
        self.seconds = seconds
        return await self._reconciler.reconcile((NAMESPACE, self._name))

    async def reason(self) -> str:
        status = (await self._api.send("GET", f"{PATH}/qlorasweeps/{self._name}"))["status"]
        (found,) = [entry["reason"] for entry in status["conditions"] if entry["type"] == "Succeeded"]
        return str(found)


def denies_creation(method: str, path: str) -> bool:
    return method == "POST" and path.endswith("/qlorajobs")


def denies_the_list(method: str, path: str) -> bool:
    return method == "GET" and path.endswith("/qlorajobs")


async def with_operator(plane: ControlPlane, name: str, play: Callable[[Operator, Api], Any]) -> None:
    prepared(plane)
    async with connect(plane.kubeconfig) as users, connect(plane.kubeconfig) as cluster:
        api = Api(users)
        await api.create(f"{PATH}/qlorasweeps", SWEEP | {"metadata": {"name": name}})
        await play(Operator(cluster, api, name), api)


def test_a_denied_cell_waits_for_its_time_unless_the_spec_changes(plane: ControlPlane) -> None:
    async def play(operator: Operator, api: Api) -> None:
        operator.denies = denies_creation
        assert await operator.pass_at(0) == 5.0
        assert [await operator.pass_at(seconds) for seconds in (1, 4)] == pytest.approx([4.0, 1.0])
        assert (operator.denied, await operator.reason()) == (1, "CellRejected")
        assert await operator.pass_at(5) == 10.0
        assert operator.denied == 2
        await api.send("PATCH", f"{PATH}/qlorasweeps/denied", {"spec": {"parallelism": 1, "suspend": True}})
        assert await operator.pass_at(6) is None, "nothing is to be created"
        await api.send("PATCH", f"{PATH}/qlorasweeps/denied", {"spec": {"suspend": False}})
        assert await operator.pass_at(7) == 5.0
        assert operator.denied == 3
        operator.denies = lambda _method, _path: False
        assert await operator.pass_at(8) == pytest.approx(4.0)
        assert await operator.pass_at(12) is None
        assert (await api.job("denied-00"))["metadata"]["name"] == "denied-00"
        assert await operator.reason() == "Running"

    asyncio.run(with_operator(plane, "denied", play))


def test_cells_that_may_not_be_read_are_a_condition_until_they_may(plane: ControlPlane) -> None:
    async def play(operator: Operator, _: Api) -> None:
        operator.denies = denies_the_list
        assert await operator.pass_at(0) == 5.0
        assert await operator.reason() == "CellsNotReadable"
        operator.denies = lambda _method, _path: False
        assert await operator.pass_at(5) is None
        assert await operator.reason() == "Running"
        operator.denies = denies_the_list
        await operator.pass_at(6)
        assert await operator.reason() == "CellsNotReadable"

    asyncio.run(with_operator(plane, "unlisted", play))


def test_a_sweep_that_this_release_cannot_read_says_so_and_keeps_its_table(plane: ControlPlane) -> None:
    async def play(operator: Operator, api: Api) -> None:
        assert await operator.pass_at(0) is None
        get = operator._reconciler.cluster.get_sweep

        async def of_a_newer_release(namespace: str, name: str) -> Object | None:
            body = dict(await get(namespace, name) or {})
            return body | {"spec": {**body["spec"], "newer": True}}

        operator._reconciler.cluster.get_sweep = of_a_newer_release  # type: ignore[method-assign]
        assert await operator.pass_at(1) is None
        assert await operator.reason() == "InvalidSpec"
        status = (await api.send("GET", f"{PATH}/qlorasweeps/unread"))["status"]
        assert (status["phase"], status["cells"][0]["name"], status["pending"]) == ("Running", "unread-00", 3)
        version = (await api.send("GET", f"{PATH}/qlorasweeps/unread"))["metadata"]["resourceVersion"]
        await operator.pass_at(2)
        after = (await api.send("GET", f"{PATH}/qlorasweeps/unread"))["metadata"]["resourceVersion"]
        assert after == version, "it is said once"

    asyncio.run(with_operator(plane, "unread", play))
