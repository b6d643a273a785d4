"""A day of a busy cluster, compressed: thousands of finished jobs, hundreds that train, and a new one now and then.

The finished jobs are copies (`seeding.py`), and lists that the operator takes every five minutes follow each other.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks.operator import audit, seeding, site
from benchmarks.operator.client import Client, connect, watch
from benchmarks.operator.node import ENDLESS, playing
from benchmarks.operator.objects import NAMESPACE, jobs_path, qlora_job
from benchmarks.operator.progress import all_report, create_all, note_first_jobs
from benchmarks.operator.site import Processes, spread
from benchmarks.operator.table import Target, head, row, targets
from devcluster.controlplane import ControlPlane

# The jobs of a resync are read within half of it, and a watch has as long to show the changes of a list: with
# much less, the day would be a load that no operator has.
_RESYNC_SECONDS = 30
_SECONDS_BETWEEN_NEW_JOBS = 3.0
_SETTLE_SECONDS = 15
_LOGS = "get pods/log"
# The namespace of the job that is created when a standby takes over.
_ELSEWHERE = "elsewhere"
# Label of the jobs that train.
_RUNNING = "running"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument(
        "--cleaned-up", type=int, default=4000, help="finished jobs without Jobs and pods (%(default)s)"
    )
    parser.add_argument("--kept", type=int, default=1000, help="finished jobs with Jobs and pods (%(default)s)")
    parser.add_argument("--running", type=int, default=200, help="jobs that train (%(default)s)")
    parser.add_argument("--quiet-seconds", type=int, default=40, help="how long it is quiet (%(default)s)")
    parser.add_argument("--day-seconds", type=int, default=150, help="how long the day takes (%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    with site.control_plane([NAMESPACE, _ELSEWHERE], site.HURRIED) as plane:
        return asyncio.run(_measure(plane, options))


async def _measure(plane: ControlPlane, options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "finished": {"cleanedUp": options.cleaned_up, "kept": options.kept},
        "running": options.running,
        "loadAverage": [round(value, 2) for value in os.getloadavg()],
    }
    async with connect(plane.kubeconfig) as client, playing(plane, {}) as node:
        _say("two jobs end, and are copied")
        await _seed(plane, client, options)
        _say("the others start to train")
        jobs = [qlora_job(number) for number in range(options.running)]
        for body in jobs:
            body["metadata"]["labels"] = {_RUNNING: ""}
        node.set_seconds("train", ENDLESS)
        with site.operator(plane) as operator:
            await create_all(client, jobs)
            await site.until(lambda: all_report(client, len(jobs), _RUNNING), "progress of all jobs", operator, every=3)
            node.stop_reporting()
            await asyncio.sleep(_SETTLE_SECONDS)
            _say("quiet")
            figures["quiet"] = await _quiet(plane, operator, options.quiet_seconds)
        _say("a standby takes over")
        figures["takeover"] = await _take_over(plane, client, len(jobs))
        _say("the day")
        node.report_again()
        node.set_seconds("train", 0.0)
        figures["day"] = await _day(plane, client, options.day_seconds)
    return figures


def _say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


async def _seed(plane: ControlPlane, client: Client, options: argparse.Namespace) -> None:
    """Let one job end and stay, and another end and be cleaned up, and copy both."""
    with site.operator(plane) as operator:
        await client.create(jobs_path(), qlora_job(0, name="original-kept"))
        await client.create(jobs_path(), qlora_job(0, name="original-cleaned-up", cleanupAfterSeconds=0))
        await site.until(lambda: _is(client, "original-kept", "Succeeded"), "success", operator)
        await site.until(lambda: _is(client, "original-cleaned-up", "CleanedUp"), "clean-up", operator)
    kept = await seeding.template(client, "original-kept")
    # A day after its end, the clean-up Job is gone too (`finishedJobSeconds` of the profile).
    cleaned_up = replace(await seeding.template(client, "original-cleaned-up"), children=(), pods=())
    with site.controllers_paused(plane):
        await seeding.copy(client, kept, [f"kept-{number}" for number in range(options.kept)])
        await seeding.copy(client, cleaned_up, [f"cleaned-up-{number}" for number in range(options.cleaned_up)])


async def _is(client: Client, name: str, condition: str) -> bool:
    status = (await client.get(f"{jobs_path()}/{name}")).get("status", {})
    return any((each["type"], each["status"]) == (condition, "True") for each in status.get("conditions", ()))


async def _quiet(plane: ControlPlane, operator: subprocess.Popen[bytes], seconds: int) -> dict[str, Any]:
    """Measure the operator's requests while no log grows and no job is created."""
    measured, audit_from = Processes((operator.pid,)), plane.audit_log.stat().st_size
    before = measured.processor_seconds()
    await asyncio.sleep(seconds)
    requests = audit.requests(plane.audit_log, audit_from)
    logs = sum(request.call == _LOGS for request in requests)
    return {
        "seconds": seconds,
        "callsPerSecond": audit.by_call(requests, seconds),
        "logReadsPerSecond": round(logs / seconds, 2),
        "otherCallsPerSecond": round((len(requests) - logs) / seconds, 2),
        "writes": sum(request.writes for request in requests),
        "processorShare": round((measured.processor_seconds() - before) / seconds, 3),
        "residentMiB": measured.resident_mib(),
    }


async def _take_over(plane: ControlPlane, client: Client, running: int) -> dict[str, Any]:
    """End the leader: the standby starts a new job, reads every running one and writes nothing about them."""
    first_job: list[float] = []

    async def see_first_job() -> None:
        async for event in watch(plane.kubeconfig, "jobs"):
            if event.body["metadata"]["namespace"] == _ELSEWHERE and not first_job:
                first_job.append(event.seconds)

    election = {"leaderElection": {"enabled": True, "namespace": NAMESPACE}}
    with ExitStack() as stack:
        leader = stack.enter_context(site.operator(plane, **election))
        await site.until(lambda: _is_led(client), "leader", leader)
        standby = stack.enter_context(site.operator(plane, **election))
        async with site.background(see_first_job()):
            await asyncio.sleep(2 * _SETTLE_SECONDS)
            resident = Processes((standby.pid,)).resident_mib()
            audit_from, began = plane.audit_log.stat().st_size, time.monotonic()
            leader.terminate()
            await client.create(jobs_path(_ELSEWHERE), qlora_job(0, _ELSEWHERE, name="late"))

            async def has_looked_at_all() -> bool:
                read = {each.name for each in audit.requests(plane.audit_log, audit_from) if each.call == _LOGS}
                return len(read) >= running and bool(first_job)

            await site.until(has_looked_at_all, "look at all running jobs", standby)
            seconds = time.monotonic() - began
            await asyncio.sleep(_SETTLE_SECONDS)
            requests = audit.requests(plane.audit_log, audit_from)
    return {
        "secondsUntilFirstJob": round(first_job[0] - began, 2),
        "secondsUntilAllWereLookedAt": round(seconds, 1),
        "writes": sum(each.writes and each.namespace == NAMESPACE and each.resource != "leases" for each in requests),
        "lists": sum(request.verb == "list" for request in requests),
        "residentMiBOfStandby": resident,
    }


async def _is_led(client: Client) -> bool:
    leases = await client.items(f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases")
    return any(each["spec"].get("holderIdentity") for each in leases)


async def _day(plane: ControlPlane, client: Client, seconds: int) -> dict[str, Any]:
    """Measure memory and the delay of new jobs, while resyncs follow each other."""
    created: dict[str, float] = {}
    arrived: list[float] = []
    first_job: dict[str, float] = {}
    samples: list[tuple[float, float]] = []

    with ExitStack() as stack:
        operator = stack.enter_context(site.operator(plane, resyncSeconds=_RESYNC_SECONDS))
        measured = Processes((operator.pid,))
        async with site.background(note_first_jobs(plane, first_job)):
            # The memory of the first resyncs is kept for the next: that is no growth.
            await asyncio.sleep(2 * _RESYNC_SECONDS)
            audit_from, began = plane.audit_log.stat().st_size, time.monotonic()
            due = began
            while (now := time.monotonic()) - began < seconds:
                samples.append((now - began, measured.resident_mib()))
                if now >= due:
                    due += _SECONDS_BETWEEN_NEW_JOBS
                    body = qlora_job(len(created), name=f"new-{len(created)}")
                    arrived.append(time.time())
                    await client.create(jobs_path(), body)
                    created[body["metadata"]["name"]] = time.monotonic()
                await asyncio.sleep(1)

            async def all_have_a_job() -> bool:
                return created.keys() <= first_job.keys()

            await site.until(all_have_a_job, "first Job of every new job", operator)
            requests = audit.requests(plane.audit_log, audit_from)
    lists = resyncs(requests)
    return {
        "seconds": seconds,
        "resyncs": len(lists),
        "secondsOfOneResync": round(median(end - start for start, end in lists), 2),
        "newJobs": len(created),
        "newJobsDuringResyncs": sum(any(start <= moment <= end for start, end in lists) for moment in arrived),
        "secondsToFirstJob": spread([first_job[name] - moment for name, moment in created.items()]),
        "residentMiB": figures_of_memory([mib for _, mib in samples]),
        "samples": [[round(second), mib] for second, mib in samples[:: max(1, len(samples) // 30)]],
        "callsPerSecond": audit.by_call(requests, seconds),
    }


def resyncs(requests: Sequence[audit.Request]) -> list[tuple[float, float]]:
    """When the first request of each resync arrived, and when the last one did, in seconds since 1970.

    Each lists the QLoRAJobs of all namespaces, page by page, then the Jobs and the pods.
    """
    found: list[tuple[float, float]] = []
    before = ""
    for request in requests:
        if request.verb != "list" or request.namespace:
            continue
        begins = request.resource == "qlorajobs" != before
        if begins or found:
            found.append((request.seconds if begins else found.pop()[0], request.seconds))
        before = request.resource
    return found


def figures_of_memory(samples: Sequence[float]) -> dict[str, float]:
    """Return medians of the first and last quarter, their growth and the peak, in MiB."""
    quarter = max(1, len(samples) // 4)
    first, last = median(samples[:quarter]), median(samples[-quarter:])
    return {
        "firstQuarter": round(first, 1),
        "lastQuarter": round(last, 1),
        "growth": round(last - first, 1),
        "peak": round(max(samples), 1),
    }


_TARGETS = (
    Target("memory grows over the day by {} MiB", 5, lambda run: run["day"]["residentMiB"]["growth"]),
    Target("when quiet, {} requests per second besides log reads", 5, lambda run: run["quiet"]["otherCallsPerSecond"]),
    Target("a standby has taken over after {} s", 3, lambda run: run["takeover"]["secondsUntilFirstJob"]),
    Target("and writes {} times about known jobs", 0, lambda run: run["takeover"]["writes"]),
    Target(
        "every new job, during a resync or not, has its first Job in {} s",
        1,
        lambda run: run["day"]["secondsToFirstJob"]["max"],
    ),
)


def tables(result: dict[str, Any]) -> str:
    """Return Markdown tables: the operator when quiet, taking over, over a day, targets."""
    quiet, takeover, day, finished = result["quiet"], result["takeover"], result["day"], result["finished"]
    memory, wait = day["residentMiB"], day["secondsToFirstJob"]
    jobs = (
        f"{sum(finished.values()):,} finished jobs, {finished['cleanedUp']:,} of them cleaned up, "
        f"and {result['running']:,} that train"
    )
    lines = [
        *head(jobs, ""),
        row("When quiet: log reads per second", f"{quiet['logReadsPerSecond']:.1f}"),
        row("other requests per second", f"{quiet['otherCallsPerSecond']:.2f}"),
        row("share of one core", f"{100 * quiet['processorShare']:.1f} %"),
        row("memory", f"{quiet['residentMiB']:.0f} MiB"),
        row("Takeover: seconds until a new job has its first Job", f"{takeover['secondsUntilFirstJob']:.2f}"),
        row("seconds until every running job was read", f"{takeover['secondsUntilAllWereLookedAt']:.1f}"),
        row("lists", f"{takeover['lists']}"),
        row("writes", f"{takeover['writes']}"),
        row("memory of the standby before", f"{takeover['residentMiBOfStandby']:.0f} MiB"),
        row(
            f"Day, compressed into {day['seconds']} s: resyncs",
            f"{day['resyncs']}, as in {day['resyncs'] / 12:.1f} hours",
        ),
        row("new jobs / of them while a resync ran", f"{day['newJobs']} / {day['newJobsDuringResyncs']}"),
        row(
            "memory in the first quarter / in the last",
            f"{memory['firstQuarter']:.0f} / {memory['lastQuarter']:.0f} MiB",
        ),
        row("seconds until a new job has its first Job, median / at most", f"{wait['p50']:.2f} / {wait['max']:.2f}"),
        row("Load average of the machine before", f"{result['loadAverage'][0]:.1f}"),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])
