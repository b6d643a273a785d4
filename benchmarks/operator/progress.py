"""Many jobs that train and report their progress: their requests to the API server while they run.

A node is simulated (`node.py`): the operator reads the logs of its pods through the API server, as from a kubelet.
"""

import argparse
import asyncio
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks.operator import audit, site
from benchmarks.operator.client import Client, connect, watch
from benchmarks.operator.node import ENDLESS, playing
from benchmarks.operator.objects import NAMESPACE, jobs_path, qlora_job
from benchmarks.operator.site import Processes, spread
from benchmarks.operator.table import Target, calls, head, row, targets
from devcluster.controlplane import ControlPlane
from qlora_api.naming import JOB_LABEL

_SETTLE_SECONDS = 20
_AT_A_TIME = 16
_LONGEST_START_SECONDS = 3600
_NEW_JOBS, _SECONDS_BETWEEN_NEW_JOBS = 20, 3
_LOGS = "get pods/log"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--jobs", type=int, nargs="+", default=[200, 2000], help="jobs that train (%(default)s)")
    parser.add_argument("--seconds", type=int, default=120, help="how long is measured (%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a run for each number of jobs."""
    return {"seconds": options.seconds, "runs": [_run(jobs, options.seconds) for jobs in options.jobs]}


def _run(jobs: int, seconds: int) -> dict[str, Any]:
    with site.control_plane([NAMESPACE], site.HURRIED) as plane, site.operator(plane) as operator:
        return asyncio.run(_measure(plane, operator, jobs, seconds))


async def _measure(plane: ControlPlane, operator: subprocess.Popen[bytes], jobs: int, seconds: int) -> dict[str, Any]:
    measured, api_server = Processes((operator.pid,)), site.api_server(plane)
    async with connect(plane.kubeconfig) as client, playing(plane, {"train": ENDLESS}):
        await _start(plane, client, operator, jobs)
        # Until then first reads have come before their turn.
        await asyncio.sleep(_SETTLE_SECONDS)
        load, audit_from = os.getloadavg(), plane.audit_log.stat().st_size
        before = measured.processor_seconds(), api_server.processor_seconds()
        await asyncio.sleep(seconds)
        used = measured.processor_seconds() - before[0], api_server.processor_seconds() - before[1]
        requests = audit.requests(plane.audit_log, audit_from)
        waits = await _waits_of_new_jobs(plane, client, operator)
    minutes = seconds / 60
    return {
        "jobs": jobs,
        "loadAverage": [round(value, 2) for value in load],
        "callsPerJobAndMinute": audit.by_call(requests, jobs * minutes),
        "allCallsPerSecond": round(len(requests) / seconds, 2),
        "readsPerSecond": round(sum(request.call == _LOGS for request in requests) / seconds, 2),
        "failedLogReads": sum(request.call == _LOGS and request.code != 200 for request in requests),
        "secondsBetweenReads": spread(pauses(requests, _LOGS)),
        "statusWrites": status_writes(requests),
        "shareOfACore": {
            who: round(value / seconds, 3) for who, value in zip(("operator", "apiServer"), used, strict=True)
        },
        "secondsToFirstJob": spread(waits),
        "residentMiB": {"atTheEnd": measured.resident_mib(), "peak": measured.peak_mib()},
    }


async def _start(plane: ControlPlane, client: Client, operator: subprocess.Popen[bytes], jobs: int) -> None:
    """Create the jobs, and return when each has shown progress in its status."""
    reported: set[str] = set()

    async def note() -> None:
        async for event in watch(plane.kubeconfig, "qlorajobs", metadata_only=False):
            if event.body.get("status", {}).get("progress", {}).get("step"):
                reported.add(event.body["metadata"]["name"])

    async def all_have() -> bool:
        return len(reported) == jobs

    async with site.background(note()):
        await create_all(client, [qlora_job(number) for number in range(jobs)])
        await site.until(all_have, f"progress of {jobs} jobs", operator, seconds=_LONGEST_START_SECONDS)


async def _waits_of_new_jobs(plane: ControlPlane, client: Client, operator: subprocess.Popen[bytes]) -> list[float]:
    """Create jobs while the others train, and return the seconds until each had its first Job."""
    created: dict[str, float] = {}
    first_jobs: dict[str, float] = {}
    async with site.background(note_first_jobs(plane, first_jobs)):
        await asyncio.sleep(_SETTLE_SECONDS)
        for number in range(_NEW_JOBS):
            body = qlora_job(0, name=f"new-{number}")
            await client.create(jobs_path(), body)
            created[body["metadata"]["name"]] = time.monotonic()
            await asyncio.sleep(_SECONDS_BETWEEN_NEW_JOBS)

        async def all_have_a_job() -> bool:
            return created.keys() <= first_jobs.keys()

        await site.until(all_have_a_job, "first Job of every new job", operator)
    return [max(0.0, first_jobs[name] - moment) for name, moment in created.items()]


async def note_first_jobs(plane: ControlPlane, found: dict[str, float]) -> None:
    """Note when a watch shows the first Job of each job, until canceled."""
    async for event in watch(plane.kubeconfig, "jobs"):
        if name := event.body["metadata"].get("labels", {}).get(JOB_LABEL):
            found.setdefault(name, event.seconds)


async def create_all(client: Client, bodies: Iterable[dict[str, Any]]) -> None:
    """Create these QLoRAJobs, several at a time."""
    left = iter(bodies)

    async def create() -> None:
        for body in left:
            await client.create(jobs_path(body["metadata"]["namespace"]), body)

    await asyncio.gather(*(create() for _ in range(_AT_A_TIME)))


async def all_report(client: Client, jobs: int, selector: str = "") -> bool:
    """Whether so many jobs, of those with these labels, train and show their progress."""
    found = [body.get("status", {}) for body in await client.items(jobs_path(), selector)]
    training = [status for status in found if status.get("phase") == "Training"]
    return sum(status.get("progress", {}).get("step", 0) > 0 for status in training) >= jobs


def status_writes(requests: Iterable[audit.Request]) -> dict[str, float]:
    """Status writes in ten seconds, in the mean and of the busiest job, and the shortest pause.

    The rate of a job is that between its first write and its last.
    """
    several = [each for each in _moments(requests, "patch qlorajobs/status") if len(each) > 1]
    if not several:
        return {}
    rates = [10 * (len(each) - 1) / (each[-1] - each[0]) for each in several]
    return {
        "perJobAndTenSeconds": round(sum(rates) / len(rates), 2),
        "ofTheBusiestJob": round(max(rates), 2),
        "shortestPauseSeconds": round(min(later - earlier for each in several for earlier, later in pairwise(each)), 2),
    }


def pauses(requests: Iterable[audit.Request], call: str) -> list[float]:
    """The seconds between two such requests for one object, of all objects."""
    return [later - earlier for each in _moments(requests, call) for earlier, later in pairwise(each)]


def _moments(requests: Iterable[audit.Request], call: str) -> list[list[float]]:
    """When such requests arrived, for each object."""
    moments: dict[tuple[str, str], list[float]] = defaultdict(list)
    for request in requests:
        if request.call == call:
            moments[request.namespace, request.name].append(request.seconds)
    return [sorted(each) for each in moments.values()]


_TARGETS = (
    Target("each running job is read every {} s", 20, lambda run: run["secondsBetweenReads"]["max"]),
    Target("all of them take {} reads per second", 125, lambda run: run["readsPerSecond"]),
    Target(
        "status writes of a job in 10 s, that of the busiest: {}", 1, lambda run: run["statusWrites"]["ofTheBusiestJob"]
    ),
)


def _rate(call: str, run: dict[str, Any]) -> str:
    return f"{run['callsPerJobAndMinute'].get(call, 0):.2f}"


def tables(result: dict[str, Any]) -> str:
    """Return Markdown tables: requests of running jobs to the API server, and targets."""
    runs = result["runs"]
    called = {call for run in runs for call, _ in calls(run["callsPerJobAndMinute"])}
    most = sorted(called, key=lambda call: (-runs[0]["callsPerJobAndMinute"].get(call, 0), call))

    def line(name: str, figure: Callable[[dict[str, Any]], str]) -> str:
        return row(name, *map(figure, runs))

    lines = [
        *head(f"For {result['seconds']} s", *(f"{run['jobs']:,} jobs train" for run in runs)),
        *(line(f"`{call}`, for each job and minute", partial(_rate, call)) for call in most),
        line("requests per second", lambda run: f"{run['allCallsPerSecond']:.1f}"),
        line("reads of logs per second", lambda run: f"{run['readsPerSecond']:.1f}"),
        line(
            "seconds between two reads of a job, median / at most",
            lambda run: f"{run['secondsBetweenReads']['p50']:.1f} / {run['secondsBetweenReads']['max']:.1f}",
        ),
        line(
            "shortest pause between two status writes of a job",
            lambda run: f"{run['statusWrites']['shortestPauseSeconds']:.1f} s",
        ),
        line(
            "share of a core, operator / API server",
            lambda run: " / ".join(f"{100 * run['shareOfACore'][who]:.0f} %" for who in ("operator", "apiServer")),
        ),
        line(
            "seconds until a new job has its first Job, median / at most",
            lambda run: f"{run['secondsToFirstJob']['p50']:.2f} / {run['secondsToFirstJob']['max']:.2f}",
        ),
        line("memory of the operator", lambda run: f"{run['residentMiB']['peak']:.0f} MiB"),
        line("load average of the machine before", lambda run: f"{run['loadAverage'][0]:.1f}"),
        "",
        *targets([(target, run) for target in _TARGETS for run in runs]),
    ]
    return "\n".join([*lines, ""])
