"""Thousands of jobs from their creation to their end, served by several operators with a share of the namespaces each.

A node is simulated (`node.py`): pods start, and end well after a few seconds, without anything running in them.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.operator import audit, site
from benchmarks.operator.client import Client, connect, watch
from benchmarks.operator.node import playing
from benchmarks.operator.objects import BATCH, CORE, jobs_path, qlora_job
from benchmarks.operator.site import Processes
from benchmarks.operator.table import Run, Target, calls, head, row, targets
from devcluster.controlplane import ControlPlane
from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, STEP_LABEL

PHASES = ("Preparing", "Training", "Publishing", "Succeeded")
STEPS = 3
_AT_A_TIME = 16
_MOST_SECONDS = 1800
_REPORT_SECONDS = 5
_KIB = 1024


@dataclass(frozen=True)
class _Share:
    """One operator and the namespaces that it serves."""

    namespaces: tuple[str, ...]
    process: subprocess.Popen[bytes]

    @property
    def measured(self) -> Processes:
        return Processes((self.process.pid,))


@dataclass
class Lives:
    """Observed phases of each job, and a place for the next one when a job has ended."""

    places: asyncio.Semaphore
    phases: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    ended: int = 0
    last_end: float = 0.0
    """In seconds of the monotonic clock."""

    async def follow(self, plane: ControlPlane) -> None:
        """Follow all jobs."""
        async for event in watch(plane.kubeconfig, "qlorajobs", metadata_only=False):
            metadata, phase = event.body["metadata"], event.body.get("status", {}).get("phase")
            seen = self.phases[metadata["namespace"], metadata["name"]]
            if phase in ("Succeeded", "Failed") and phase not in seen:
                self.ended += 1
                self.last_end = event.seconds
                self.places.release()
            if phase:
                seen.add(phase)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--jobs", type=int, default=5000, help="jobs in all (%(default)s)")
    parser.add_argument("--at-once", type=int, default=150, help="how many have not ended at a time (%(default)s)")
    parser.add_argument("--operators", type=int, default=2, help="operators (%(default)s)")
    parser.add_argument("--namespaces", type=int, default=5, help="namespaces of each operator (%(default)s)")
    parser.add_argument("--train-seconds", type=float, default=5.0, help="how long training takes (%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    shares = [
        tuple(f"team-{operator}-{number}" for number in range(options.namespaces))
        for operator in range(options.operators)
    ]
    with ExitStack() as stack:
        everywhere = [name for share in shares for name in share]
        plane = stack.enter_context(site.control_plane(everywhere, site.HURRIED))
        operators = []
        for number, share in enumerate(shares):
            election = {"enabled": True, "namespace": share[0], "leaseName": f"qlora-operator-{number}"}
            process = stack.enter_context(site.operator(plane, namespaces=list(share), leaderElection=election))
            operators.append(_Share(share, process))
        return asyncio.run(_measure(plane, operators, options))


async def _measure(plane: ControlPlane, shares: Sequence[_Share], options: argparse.Namespace) -> dict[str, Any]:
    lives = Lives(asyncio.Semaphore(options.at_once))
    namespaces = [name for share in shares for name in share.namespaces]
    jobs = [qlora_job(number, namespaces[number % len(namespaces)]) for number in range(options.jobs)]
    # The benchmark simulates the node and follows all jobs.
    everybody = {**site.processes_of(plane), "benchmark": Processes((os.getpid(),))}
    async with (
        connect(plane.kubeconfig) as client,
        playing(plane, {"train": options.train_seconds}),
        site.background(lives.follow(plane)),
    ):
        await site.until(lambda: _all_lead(client, shares), "leader", *(share.process for share in shares))
        load, idle = os.getloadavg(), [share.measured.resident_mib() for share in shares]
        audit_from, began = plane.audit_log.stat().st_size, time.monotonic()
        before = {name: each.processor_seconds() for name, each in everybody.items()}
        idle_seconds = [share.measured.processor_seconds() for share in shares]

        async def all_have_ended() -> bool:
            print(f"{lives.ended:,} of {len(jobs):,} jobs have ended", file=sys.stderr, flush=True)
            return lives.ended == len(jobs)

        processes = [share.process for share in shares]
        async with site.background(create_in_turn(client, jobs, lives)):
            what = "end of all jobs"
            await site.until(all_have_ended, what, *processes, seconds=_MOST_SECONDS, every=_REPORT_SECONDS)
        seconds = lives.last_end - began
        used = {name: each.processor_seconds() - before[name] for name, each in everybody.items()}
        used_by_operators = [
            share.measured.processor_seconds() - first for share, first in zip(shares, idle_seconds, strict=True)
        ]
        requests = audit.requests(plane.audit_log, audit_from)
        children = await client.items(f"{BATCH}/jobs", JOB_LABEL, metadata_only=True)
        pods = await client.items(f"{CORE}/pods", JOB_LABEL, metadata_only=True)
        stored = await _stored_bytes(client, jobs[-1]["metadata"])
    return {
        "jobs": len(jobs),
        "atOnce": options.at_once,
        "loadAverage": [round(value, 2) for value in load],
        "seconds": round(seconds, 1),
        "jobsPerMinute": round(60 * len(jobs) / seconds, 1),
        "seenInPhase": {phase: sum(phase in seen for seen in lives.phases.values()) for phase in PHASES},
        "failed": sum("Failed" in seen for seen in lives.phases.values()),
        "batchJobs": batch_jobs(children, requests),
        "podsLeft": len(pods),
        "storedBytesOfOne": stored,
        "processorMillisecondsPerJob": {name: round(1000 * value / len(jobs), 1) for name, value in used.items()},
        "operators": [
            _figures_of(share, idle_mib, seconds_used, requests, jobs)
            for share, idle_mib, seconds_used in zip(shares, idle, used_by_operators, strict=True)
        ],
    }


async def _all_lead(client: Client, shares: Sequence[_Share]) -> bool:
    leases = await client.items("/apis/coordination.k8s.io/v1/leases")
    held = {each["metadata"]["namespace"] for each in leases if each["spec"].get("holderIdentity")}
    return all(share.namespaces[0] in held for share in shares)


async def create_in_turn(client: Client, jobs: list[dict[str, Any]], lives: Lives) -> None:
    """Create all jobs, each as soon as there is a place for it."""
    left = iter(jobs)

    async def create() -> None:
        for body in left:
            await lives.places.acquire()
            await client.create(jobs_path(body["metadata"]["namespace"]), body)

    await asyncio.gather(*(create() for _ in range(_AT_A_TIME)))


def _figures_of(
    share: _Share, idle_mib: float, seconds: float, requests: Sequence[audit.Request], jobs: list[dict[str, Any]]
) -> dict[str, Any]:
    own = [request for request in requests if request.namespace in share.namespaces]
    count = sum(body["metadata"]["namespace"] in share.namespaces for body in jobs)
    at_the_end = share.measured.resident_mib()
    return {
        "namespaces": list(share.namespaces),
        "jobs": count,
        "callsPerJob": audit.by_call(own, count),
        "allCallsPerJob": round(len(own) / count, 2),
        "processorMillisecondsPerJob": round(1000 * seconds / count, 1),
        "residentMiB": {"idle": idle_mib, "atTheEnd": at_the_end, "peak": share.measured.peak_mib()},
        "residentKiBPerFinishedJob": round((at_the_end - idle_mib) * _KIB / count, 1),
    }


def batch_jobs(children: Sequence[dict[str, Any]], requests: Sequence[audit.Request]) -> dict[str, int]:
    """Count Jobs for the steps, created and deleted ones, and steps with two."""
    of_step = Counter(
        (labels[JOB_UID_LABEL], labels[STEP_LABEL]) for labels in (each["metadata"]["labels"] for each in children)
    )
    made = [request for request in requests if request.resource == "jobs"]
    return {
        "there": len(children),
        "created": sum(request.verb == "create" and request.code == 201 for request in made),
        "deleted": sum(request.verb == "delete" for request in made),
        "stepsWithSeveral": sum(count > 1 for count in of_step.values()),
    }


async def _stored_bytes(client: Client, metadata: dict[str, Any]) -> dict[str, int]:
    """Size of a finished job's objects in etcd."""
    namespace, name = metadata["namespace"], metadata["name"]
    body = await client.get(f"{jobs_path(namespace)}/{name}")
    sizes = {"QLoRAJob": len(json.dumps(body, separators=(",", ":")))}
    selector = [("labelSelector", f"{JOB_LABEL}={name}")]
    for kind, path in {"Job": BATCH, "Pod": CORE, "PersistentVolumeClaim": CORE}.items():
        sizes[kind] = await client.stored_bytes(f"{path}/namespaces/{namespace}/{kind.lower()}s", selector)
    return sizes


_OPERATOR_ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("namespaces", lambda run: f"{len(run['namespaces'])}"),
    ("jobs", lambda run: f"{run['jobs']:,}"),
    ("processor time for each job", lambda run: f"{run['processorMillisecondsPerJob']:.0f} ms"),
    (
        "memory before / at most",
        lambda run: f"{run['residentMiB']['idle']:.0f} / {run['residentMiB']['peak']:.0f} MiB",
    ),
    ("memory of a finished job", lambda run: f"{run['residentKiBPerFinishedJob']:.0f} KiB"),
    ("requests for each job", lambda run: f"{run['allCallsPerJob']:.1f}"),
)


def tables(result: dict[str, Any]) -> str:
    """Return Markdown tables: ends of all jobs, needs of operators, remains of a job."""
    operators, sizes = result["operators"], result["storedBytesOfOne"]
    names = [f"Operator {number}" for number in range(1, len(operators) + 1)]
    asked = sorted({call for each in operators for call, _ in calls(each["callsPerJob"])})
    lines = [
        *head(f"{result['jobs']:,} jobs, at most {result['atOnce']:,} at a time", ""),
        row("minutes until the last has ended", f"{result['seconds'] / 60:.1f}"),
        *(row(f"seen as `{phase}`", f"{count:,}") for phase, count in result["seenInPhase"].items()),
        *(
            row(f"processor time for each job, `{name}`", f"{milliseconds:.0f} ms")
            for name, milliseconds in result["processorMillisecondsPerJob"].items()
            if name != "benchmark"
        ),
        row("load average of the machine before", f"{result['loadAverage'][0]:.1f}"),
        "",
        *head("", *names),
        *(row(name, *(cell(each) for each in operators)) for name, cell in _OPERATOR_ROWS),
        *(row(f"`{call}`", *(f"{each['callsPerJob'].get(call, 0):.2f}" for each in operators)) for call in asked),
        "",
        *head("Objects of a finished job in etcd", "KiB"),
        *(row(kind, f"{size / _KIB:.1f}") for kind, size in sizes.items()),
        row("all of them", f"{sum(sizes.values()) / _KIB:.1f}"),
        "",
        *targets([(target, result) for target in _targets(result["jobs"])]),
    ]
    return "\n".join([*lines, ""])


def _targets(jobs: int) -> tuple[Target, ...]:
    return (
        Target("jobs that have succeeded {}", jobs, lambda run: run["seenInPhase"]["Succeeded"], at_least=True),
        Target("steps with a second Job {}", 0, lambda run: run["batchJobs"]["stepsWithSeveral"]),
        Target("Jobs created {}", STEPS * jobs, lambda run: run["batchJobs"]["created"]),
    )
