"""A neighbor's new jobs while another namespace's jobs arrive by the hundred: how long each waits for its first Job.

Measured on a quiet cluster and during the flood, in two parts: until the operator's first request for the job, and from
there to its Job. The floor is the time of the same two requests, for a claim and a Job, of a client that does
nothing else, at the same time.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.operator import site
from benchmarks.operator.client import Client, connect
from benchmarks.operator.objects import BATCH, CORE, NAMESPACE, PROFILE, jobs_path, qlora_job
from benchmarks.operator.progress import create_all
from benchmarks.operator.site import spread
from benchmarks.operator.table import Target, head, row, targets
from devcluster.controlplane import ControlPlane
from qlora_api.naming import JOB_UID_LABEL, child_job_name
from qlora_operator.decisions.manifests.objects import build_claim, build_job
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.decisions.resolution import resolve

NEIGHBOR = "neighbor"
_PAUSE_SECONDS = 0.4


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--jobs", type=int, default=1000, help="jobs of the flood (%(default)s)")
    parser.add_argument("--quiet", type=int, default=20, help="the neighbor's jobs before the flood (%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    with site.control_plane([NAMESPACE, NEIGHBOR]) as plane, site.operator(plane) as operator:
        load = os.getloadavg()
        names, floors = asyncio.run(_measure(plane, operator, options.jobs, options.quiet))
        audited = _audited(plane.audit_log)
    figures = {}
    for when, found in names.items():
        waits = [_waits(audited, name) for name in found]
        figures[when] = {
            "jobs": len(found),
            "secondsToFirstRequest": spread([first for first, _ in waits]),
            "secondsFromThereToJob": spread([rest for _, rest in waits]),
            "secondsToFirstJob": spread([first + rest for first, rest in waits]),
            "secondsOfTheFloor": spread(floors[when]),
        }
    return {"jobs": options.jobs, "loadAverage": [round(value, 2) for value in load], "neighbor": figures}


async def _measure(
    plane: ControlPlane, operator: subprocess.Popen[bytes], jobs: int, quiet: int
) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """Return names of the neighbor's jobs, and seconds: floor, quiet and in the flood."""
    names: dict[str, list[str]] = {"quiet": [], "flooded": []}
    floors: dict[str, list[float]] = {"quiet": [], "flooded": []}
    async with connect(plane.kubeconfig) as client:

        async def started(namespace: str, count: int) -> bool:
            path = f"{BATCH}/namespaces/{namespace}/jobs"
            return len(await client.items(path, JOB_UID_LABEL, metadata_only=True)) >= count

        await client.create(jobs_path(NEIGHBOR), qlora_job(0, NEIGHBOR))
        await site.until(lambda: started(NEIGHBOR, 1), "a first Job", operator)
        for _ in range(quiet):
            await _sample(client, names["quiet"], floors["quiet"], "quiet")
        flood = create_all(client, [qlora_job(number) for number in range(jobs)])
        async with _running(flood) as arriving:
            while not arriving.done() or not await started(NAMESPACE, jobs):
                await _sample(client, names["flooded"], floors["flooded"], "flooded")
        await site.until(lambda: started(NEIGHBOR, 1 + sum(map(len, names.values()))), "Jobs of all", operator)
    return names, floors


@contextlib.asynccontextmanager
async def _running(work: Any) -> AsyncIterator[asyncio.Task[None]]:
    task: asyncio.Task[None] = asyncio.create_task(work)
    try:
        yield task
        await task
    finally:
        task.cancel()


async def _sample(client: Client, names: list[str], floors: list[float], kind: str) -> None:
    name = f"{kind}-{len(names)}"
    body = qlora_job(0, NEIGHBOR)
    body = await client.create(jobs_path(NEIGHBOR), body | {"metadata": {"name": name, "namespace": NEIGHBOR}})
    names.append(name)
    floors.append(await _floor(client, body))
    await asyncio.sleep(_PAUSE_SECONDS)


async def _floor(client: Client, body: dict[str, Any]) -> float:
    """Return the seconds to create an equal claim and Job, for a job of another name."""
    job = parse_job(body | {"metadata": body["metadata"] | {"name": f"{body['metadata']['name']}-floor"}})
    resolved = resolve(job.status, Facts(job, Observed(), {"default": PROFILE}, datetime.now(UTC))).resolved
    if resolved is None:
        raise AssertionError("the job cannot start")
    claim, first = build_claim(job, resolved), build_job(job, resolved, "prepare", 1)
    began = time.monotonic()
    await client.create(f"{CORE}/namespaces/{NEIGHBOR}/persistentvolumeclaims", _of_nobody(claim))
    await client.create(f"{BATCH}/namespaces/{NEIGHBOR}/jobs", _of_nobody(first))
    return time.monotonic() - began


def _of_nobody(manifest: dict[str, Any]) -> dict[str, Any]:
    """The object without its labels for the operator and its owner."""
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
    """Return seconds from a job's creation to its first request, and on to its Job."""
    created = _moment(audited["qlorajobs", name]["stageTimestamp"])
    job = audited["jobs", child_job_name(name, "prepare", 1)]
    claims = (
        entry for (kind, claim), entry in audited.items() if kind == "persistentvolumeclaims" and claim[:-9] == name
    )
    first = _moment(next(claims)["requestReceivedTimestamp"])
    return first - created, _moment(job["stageTimestamp"]) - first


def _moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


_WAITS = {
    "until the operator's first request for the job": "secondsToFirstRequest",
    "from there to its first Job": "secondsFromThereToJob",
    "together": "secondsToFirstJob",
    "the same two requests of a client that does nothing else": "secondsOfTheFloor",
}
_TARGETS = (
    Target(
        "a neighbor's first Job during the flood, against a quiet cluster: {} times",
        1.1,
        lambda run: (
            run["neighbor"]["flooded"]["secondsToFirstJob"]["p50"]
            / run["neighbor"]["quiet"]["secondsToFirstJob"]["p50"]
        ),
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the waits of a neighbor's jobs, and the targets."""
    quiet, flooded = result["neighbor"]["quiet"], result["neighbor"]["flooded"]
    lines = [
        *head("Seconds, median / 99th percentile", "Quiet", f"While {result['jobs']:,} jobs of another one arrive"),
        *(row(name, _spread(quiet[key]), _spread(flooded[key])) for name, key in _WAITS.items()),
        row("jobs of the neighbor", str(quiet["jobs"]), str(flooded["jobs"])),
        row("load average of the machine before", f"{result['loadAverage'][0]:.1f}", ""),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['p50']:.3f} / {figure['p99']:.3f}"
