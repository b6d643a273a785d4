"""Many jobs that train and report their progress: their requests to the API server while they run.

A node is simulated (`node.py`): the operator reads the logs of its pods through the API server, as from a kubelet.
"""

import argparse
import asyncio
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from benchmarks.operator import audit, site
from benchmarks.operator.client import Client, connect
from benchmarks.operator.node import ENDLESS, playing
from benchmarks.operator.objects import NAMESPACE, jobs_path, qlora_job
from benchmarks.operator.site import Processes
from benchmarks.operator.table import Target, calls, head, row, targets
from devcluster.controlplane import ControlPlane

_SETTLE_SECONDS = 20
_AT_A_TIME = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--jobs", type=int, default=200, help="jobs that train (%(default)s)")
    parser.add_argument("--seconds", type=int, default=120, help="how long is measured (%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    with site.control_plane([NAMESPACE], site.HURRIED) as plane, site.operator(plane) as operator:
        return asyncio.run(_measure(plane, operator, options.jobs, options.seconds))


async def _measure(plane: ControlPlane, operator: subprocess.Popen[bytes], jobs: int, seconds: int) -> dict[str, Any]:
    measured, api_server = Processes((operator.pid,)), site.api_server(plane)
    async with connect(plane.kubeconfig) as client, playing(plane, {"train": ENDLESS}):
        await create_all(client, [qlora_job(number) for number in range(jobs)])
        await site.until(lambda: all_report(client, jobs), f"progress of {jobs} jobs", operator)
        # Until then first reads have come before their turn.
        await asyncio.sleep(_SETTLE_SECONDS)
        load, audit_from = os.getloadavg(), plane.audit_log.stat().st_size
        before = measured.processor_seconds(), api_server.processor_seconds()
        await asyncio.sleep(seconds)
        used = measured.processor_seconds() - before[0], api_server.processor_seconds() - before[1]
        requests = audit.requests(plane.audit_log, audit_from)
    minutes = seconds / 60
    return {
        "jobs": jobs,
        "seconds": seconds,
        "loadAverage": [round(value, 2) for value in load],
        "callsPerJobAndMinute": audit.by_call(requests, jobs * minutes),
        "allCallsPerSecond": round(len(requests) / seconds, 2),
        "failedLogReads": sum(request.resource == "pods/log" and request.code != 200 for request in requests),
        "statusWrites": status_writes(requests),
        "processorMillisecondsPerJobAndMinute": {
            who: round(1000 * value / (jobs * minutes), 1)
            for who, value in zip(("operator", "apiServer"), used, strict=True)
        },
        "residentMiB": {"atTheEnd": measured.resident_mib(), "peak": measured.peak_mib()},
    }


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
    moments: dict[tuple[str, str], list[float]] = defaultdict(list)
    for request in requests:
        if request.call == "patch qlorajobs/status":
            moments[request.namespace, request.name].append(request.seconds)
    several = [sorted(each) for each in moments.values() if len(each) > 1]
    if not several:
        return {}
    rates = [10 * (len(each) - 1) / (each[-1] - each[0]) for each in several]
    pauses = [later - earlier for each in several for earlier, later in pairwise(each)]
    return {
        "perJobAndTenSeconds": round(sum(rates) / len(rates), 2),
        "ofTheBusiestJob": round(max(rates), 2),
        "shortestPauseSeconds": round(min(pauses), 2),
    }


_TARGETS = (
    Target(
        "status writes of a job in 10 s, that of the busiest: {}", 1, lambda run: run["statusWrites"]["ofTheBusiestJob"]
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Return Markdown tables: requests of running jobs to the API server, and targets."""
    used = result["processorMillisecondsPerJobAndMinute"]
    lines = [
        *head(f"{result['jobs']:,} jobs that train, for {result['seconds']} s", "For each job and minute"),
        *(row(f"`{call}`", f"{rate:.2f}") for call, rate in calls(result["callsPerJobAndMinute"])),
        row("processor time of the operator", f"{used['operator']:.0f} ms"),
        row("processor time of the API server", f"{used['apiServer']:.0f} ms"),
        "",
        *head("Of all together", ""),
        row("requests per second", f"{result['allCallsPerSecond']:.1f}"),
        row(
            "shortest pause between two status writes of a job",
            f"{result['statusWrites']['shortestPauseSeconds']:.1f} s",
        ),
        row("memory of the operator", f"{result['residentMiB']['peak']:.0f} MiB"),
        row("load average of the machine before", f"{result['loadAverage'][0]:.1f}"),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])
