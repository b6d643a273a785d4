"""Measures how long a neighbor's new job waits for its first Job while another namespace's jobs arrive by the hundred.

Prints, for a quiet cluster and during the flood, where the time goes: until the operator's first request for the job,
and from there to its Job. Beside it, the floor: what the same two requests, for a claim and a Job, take a client that
does nothing else at the same time.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.operator.objects import NAMESPACE, PROFILE, qlora_job
from benchmarks.operator.run import ROOT, started
from devcluster.controlplane import running
from qlora_api.naming import child_job_name
from qlora_operator.cluster import Cluster, connect
from qlora_operator.decisions.facts import Facts
from qlora_operator.decisions.manifests import build_claim, build_job
from qlora_operator.decisions.observe import Observed, parse_job
from qlora_operator.decisions.resolution import resolve

NEIGHBOR = "neighbor"
_CREATED_AT_A_TIME = 32
_PAUSE_SECONDS = 0.4
_MOST_SECONDS = 120


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operator.neighbor", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of the flood (%(default)s)")
    parser.add_argument("--quiet", type=int, default=20, help="the neighbor's jobs before the flood (%(default)s)")
    options = parser.parse_args()
    with running(controller_manager=True) as plane:
        plane.kubectl.apply((ROOT / "crds" / "qlorajobs.qlora.dev.yaml").read_text())
        for namespace in (NAMESPACE, NEIGHBOR):
            plane.kubectl("create", "namespace", namespace)
        plane.kubectl("wait", "--for=condition=Established", "crd/qlorajobs.qlora.dev")
        with started("operator", plane, None):
            names, floors = asyncio.run(_measure(plane.kubeconfig, options.jobs, options.quiet))
        audited = _audited(plane.audit_log)
    figures = {}
    for when, found in names.items():
        waits = [_waits(audited, name) for name in found]
        figures[when] = {
            "jobs": len(found),
            "secondsToFirstRequest": _spread([first for first, _ in waits]),
            "secondsFromThereToJob": _spread([rest for _, rest in waits]),
            "secondsToFirstJob": _spread([first + rest for first, rest in waits]),
            "secondsOfTheFloor": _spread(floors[when]),
        }
    json.dump(figures, sys.stdout, indent=2)
    return 0


async def _measure(kubeconfig: Path, jobs: int, quiet: int) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Names of the neighbor's jobs, and seconds of the floor, quiet and during the flood."""
    names: dict[str, list[str]] = {"quiet": [], "flooded": []}
    floors: dict[str, list[float]] = {"quiet": [], "flooded": []}
    async with connect(kubeconfig) as cluster:
        await _until_served(cluster)
        for _ in range(quiet):
            await _sample(cluster, names["quiet"], floors["quiet"], "quiet")
        async with _flood(cluster, jobs) as flood:
            while not flood.done():
                await _sample(cluster, names["flooded"], floors["flooded"], "flooded")
        await _until_jobs(cluster, NEIGHBOR, 1 + sum(map(len, names.values())))
    return names, floors


@contextlib.asynccontextmanager
async def _flood(cluster: Cluster, jobs: int) -> AsyncIterator[asyncio.Future[Any]]:
    """Jobs of another namespace, as fast as the API server takes them; done when each has its first Job."""
    numbers = iter(range(jobs))

    async def create_all() -> None:
        for number in numbers:
            await _create(cluster, NAMESPACE, f"job-{number}")

    async def until_started() -> None:
        await asyncio.gather(*(create_all() for _ in range(_CREATED_AT_A_TIME)))
        await _until_jobs(cluster, NAMESPACE, jobs)

    flood = asyncio.ensure_future(until_started())
    try:
        yield flood
        await flood
    finally:
        flood.cancel()


async def _until_jobs(cluster: Cluster, namespace: str, count: int) -> None:
    async with asyncio.timeout(_MOST_SECONDS):
        while len((await cluster.list_versions("jobs", namespace))[0]) < count:  # noqa: ASYNC110 - it is seldom asked
            await asyncio.sleep(1)


async def _until_served(cluster: Cluster) -> None:
    """Wait until the operator works, and the Job controller too."""
    await _create(cluster, NEIGHBOR, "first")
    async with asyncio.timeout(_MOST_SECONDS):
        while not (await cluster._json("GET", f"/api/v1/namespaces/{NEIGHBOR}/pods"))["items"]:  # noqa: ASYNC110
            await asyncio.sleep(0.5)


async def _sample(cluster: Cluster, names: list[str], floors: list[float], kind: str) -> None:
    name = f"{kind}-{len(names)}"
    body = await _create(cluster, NEIGHBOR, name)
    names.append(name)
    floors.append(await _floor(cluster, body))
    await asyncio.sleep(_PAUSE_SECONDS)


async def _create(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    path = f"/apis/qlora.dev/v1alpha1/namespaces/{namespace}/qlorajobs"
    return await cluster._json("POST", path, body=qlora_job(0) | {"metadata": metadata})


async def _floor(cluster: Cluster, body: dict[str, Any]) -> float:
    """Seconds that a claim and a Job of the same content take, for a job of another name."""
    metadata = body["metadata"] | {"name": f"{body['metadata']['name']}-floor"}
    job = parse_job(body | {"metadata": metadata})
    facts = Facts(job, Observed(), {"default": PROFILE}, datetime.now().astimezone())
    resolved = resolve(job.status, facts).resolved
    if resolved is None:
        raise AssertionError("the job cannot start")
    began = time.monotonic()
    await cluster.create_claim(NEIGHBOR, _of_nobody(build_claim(job, resolved)))
    await cluster.create_job(NEIGHBOR, _of_nobody(build_job(job, resolved, "prepare", 1)))
    return time.monotonic() - began


def _of_nobody(manifest: dict[str, Any]) -> dict[str, Any]:
    """The object without what makes it the operator's, or the garbage collector's."""
    return manifest | {"metadata": {"name": manifest["metadata"]["name"]}}


def _audited(log: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The creation of each object of the neighbor, by resource and name."""
    found = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        reference = entry.get("objectRef", {})
        if entry["verb"] == "create" and reference.get("namespace") == NEIGHBOR:
            found[reference.get("resource", ""), reference.get("name", "")] = entry
    return found


def _waits(audited: dict[tuple[str, str], dict[str, Any]], name: str) -> tuple[float, float]:
    """Seconds from the job's creation to the operator's first request for it, and from there to its Job."""
    created = _moment(audited["qlorajobs", name]["stageTimestamp"])
    job = audited["jobs", child_job_name(name, "prepare", 1)]
    claim = next(
        entry for (kind, claim), entry in audited.items() if kind == "persistentvolumeclaims" and claim[:-9] == name
    )
    first = _moment(claim["requestReceivedTimestamp"])
    return first - created, _moment(job["stageTimestamp"]) - first


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _spread(values: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(values, n=20, method="inclusive")
    return {"p50": round(median(values), 3), "p95": round(cuts[18], 3), "max": round(max(values), 3)}


if __name__ == "__main__":
    sys.exit(main())
