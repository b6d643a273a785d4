"""Finished adapters are announced once, in the ConfigMap of the job's namespace."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.client import Cluster
from tests.support.cluster.played import NAMESPACE, STEPS, Api, connected, operator, prepared, settle

LABEL = "qlora.dev/announcements"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
ENTRY = {
    "name": "first",
    "uri": "pvc://a/b",
    "base": "org/model",
    "baseRevision": "c0ffee",
    "digest": f"sha256:{'a' * 64}",
    "rank": 48,
}


@pytest.fixture(scope="module")
def namespace(plane: ControlPlane) -> ControlPlane:
    return prepared(plane)


def play(namespace: ControlPlane, scenario: Callable[[Api], Awaitable[None]]) -> None:
    async def connect() -> None:
        async with connected(namespace) as api:
            await scenario(api)

    asyncio.run(connect())


async def succeed(api: Api, name: str, config_map: str) -> float | None:
    """Run a job with an announcement to its end; returns seconds until its next pass."""
    await api.apply(name, output={"announce": {"configMap": config_map}})
    uid = (await api.job(name))["metadata"]["uid"]
    for step in STEPS:
        await look(api, name)
        (job,) = [job for job in await api.children(name) if job["metadata"]["labels"]["qlora.dev/step"] == step]
        await api.end(job, uid)
    return await look(api, name)


async def look(api: Api, name: str) -> float | None:
    """A pass over the job by an operator that has just started."""
    return await settle(operator(Cluster(api.client)), (NAMESPACE, name))


async def data_of(api: Api, config_map: str) -> dict[str, str]:
    found = await api.send("GET", f"{CONFIG_MAPS}/{config_map}")
    return dict(found.get("data") or {})


async def announcement(api: Api, name: str) -> Object:
    return dict((await api.job(name))["status"]["announcement"])


def config_map(name: str, **metadata: Any) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **metadata}}


def test_an_adapter_is_announced_once_next_to_those_of_other_jobs(namespace: ControlPlane) -> None:
    async def scenario(api: Api) -> None:
        assert await succeed(api, "first", "adapters") is None
        assert {key: json.loads(text) for key, text in (await data_of(api, "adapters")).items()} == {
            "first.json": ENTRY
        }
        assert (await announcement(api, "first"))["entry"] == "adapters/first.json"

        await succeed(api, "second", "adapters")
        assert set(await data_of(api, "adapters")) == {"first.json", "second.json"}

        # A user takes an adapter out of service: no restart of the operator puts it back.
        await api.send("PATCH", f"{CONFIG_MAPS}/adapters", {"data": {"first.json": None}})
        assert await look(api, "first") is None
        assert set(await data_of(api, "adapters")) == {"second.json"}

    play(namespace, scenario)


def test_the_entry_of_a_deleted_job_is_removed(namespace: ControlPlane) -> None:
    async def scenario(api: Api) -> None:
        for name in ("kept", "deleted"):
            await succeed(api, name, "served")
        reconciler = operator(Cluster(api.client))
        await settle(reconciler, (NAMESPACE, "deleted"))
        await api.send("DELETE", f"/apis/qlora.dev/v1beta1/namespaces/{NAMESPACE}/qlorajobs/deleted")
        reconciler.store.gone((NAMESPACE, "deleted"))
        await settle(reconciler, (NAMESPACE, "deleted"))
        assert set(await data_of(api, "served")) == {"kept.json"}

    play(namespace, scenario)


def test_a_labelled_config_map_may_be_empty(namespace: ControlPlane) -> None:
    async def scenario(api: Api) -> None:
        await api.create(CONFIG_MAPS, config_map("from-git", labels={LABEL: "true"}))
        await succeed(api, "third", "from-git")
        assert set(await data_of(api, "from-git")) == {"third.json"}

    play(namespace, scenario)


def test_a_foreign_config_map_is_left_alone_and_the_job_still_succeeds(
    namespace: ControlPlane,
) -> None:
    async def scenario(api: Api) -> None:
        authorities = {"ca.crt": "-----BEGIN CERTIFICATE-----"}
        await api.create(CONFIG_MAPS, {**config_map("kube-root-ca.crt"), "data": authorities})
        assert await succeed(api, "hostile", "kube-root-ca.crt") == 5, "tried again later"
        assert await data_of(api, "kube-root-ca.crt") == authorities
        assert f'must have the label {LABEL}: "true"' in (await announcement(api, "hostile"))["rejection"]
        assert (await api.job("hostile"))["status"]["phase"] == "Succeeded"
        before = (await api.job("hostile"))["metadata"]["resourceVersion"]
        await look(api, "hostile")
        assert (await api.job("hostile"))["metadata"]["resourceVersion"] == before, "nothing new to say"

        # Its owner agrees.
        await api.send("PATCH", f"{CONFIG_MAPS}/kube-root-ca.crt", {"metadata": {"labels": {LABEL: "true"}}})
        assert await look(api, "hostile") is None
        assert set(await data_of(api, "kube-root-ca.crt")) == {"ca.crt", "hostile.json"}
        assert (await announcement(api, "hostile"))["entry"] == "kube-root-ca.crt/hostile.json"

    play(namespace, scenario)
