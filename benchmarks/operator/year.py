"""A year of jobs that end by themselves, compressed: memory, etcd and claims at the end of each month.

The profile deletes jobs and claims; jobs set a destination and their clean-up. Each job lives from its creation to its
deletion with the real operator, API server, etcd and controllers; a node is simulated (`node.py`). One job stands for
many: the load shows whether what is stored and held depends on the jobs so far.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.operator import site
from benchmarks.operator.client import Client, connect
from benchmarks.operator.node import playing
from benchmarks.operator.objects import BATCH, CORE, NAMESPACE, PROFILE, QLORA, jobs_path, profile, qlora_job
from benchmarks.operator.simulation import Lives, create_in_turn
from benchmarks.operator.site import MIB, Processes
from benchmarks.operator.table import Target, head, row, targets
from devcluster.controlplane import ControlPlane
from qlora_api.naming import JOB_LABEL
from qlora_api.profile import Profile

_MONTHS = 12
_JOBS_OF_A_DAY = 2000
_AT_ONCE = 24
_MOST_SECONDS = 1800
# A week, when a year takes eight minutes.
_TTL_SECONDS, _CLEANUP_SECONDS = 10, 2
_SETTLE_SECONDS = 3
_COUNTED = {
    "stored": f"{QLORA}/qlorajobs",
    "claims": f"{CORE}/persistentvolumeclaims",
    "batchJobs": f"{BATCH}/jobs",
    "pods": f"{CORE}/pods",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--jobs", type=int, default=1460, help="jobs of the year (%(default)s)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run."""
    policy = {"whenDeleted": "Delete", "whenFinished": "Delete"}
    workspace = PROFILE.workspace.dump() | {"persistentVolumeClaimRetentionPolicy": policy}
    deleting = Profile.model_validate(
        PROFILE.dump() | {"ttlSecondsAfterFinished": _TTL_SECONDS, "workspace": workspace}
    )
    with site.control_plane([NAMESPACE], site.HURRIED) as plane, site.operator(plane) as operator:
        plane.kubectl.apply(json.dumps(profile(deleting)))
        return asyncio.run(_measure(plane, Processes((operator.pid,)), options.jobs))


async def _measure(plane: ControlPlane, operator: Processes, count: int) -> dict[str, Any]:
    lives, load = Lives(asyncio.Semaphore(_AT_ONCE)), os.getloadavg()
    jobs = [_job(number) for number in range(count)]
    ends = [len(jobs) * month // _MONTHS for month in range(_MONTHS + 1)]
    months: list[dict[str, Any]] = []
    async with (
        connect(plane.kubeconfig) as client,
        playing(plane, {"train": 1.0}),
        site.background(lives.follow(plane)),
    ):
        for first, last in itertools.pairwise(ends):
            await create_in_turn(client, jobs[first:last], lives)
            months.append({"jobs": last} | await _look(plane, client, operator))
            print(f"month {len(months)}: {months[-1]}", file=sys.stderr, flush=True)

        async def all_are_gone() -> bool:
            return not await client.items(jobs_path(), metadata_only=True)

        await site.until(all_are_gone, "deletion of all jobs", seconds=_MOST_SECONDS, every=2)
        await asyncio.sleep(_SETTLE_SECONDS)
        months.append({"jobs": len(jobs)} | await _look(plane, client, operator))
    return {
        "jobs": count,
        "standsFor": round(365 * _JOBS_OF_A_DAY / count),
        "atOnce": _AT_ONCE,
        "ttlSeconds": _TTL_SECONDS,
        "succeeded": sum("Succeeded" in seen for seen in lives.phases.values()),
        "loadAverage": [round(value, 2) for value in load],
        "months": months,
    }


def _job(number: int) -> dict[str, Any]:
    output = {"destination": f"s3://adapters/{number}"}
    return qlora_job(number, output=output, cleanupAfterSeconds=_CLEANUP_SECONDS)


async def _look(plane: ControlPlane, client: Client, operator: Processes) -> dict[str, Any]:
    """Count the objects, and measure the operator and etcd.

    Events live for an hour, and old versions for five minutes: for this year, that is no time.
    """
    plane.kubectl("delete", "--raw", f"{CORE}/namespaces/{NAMESPACE}/events")
    etcd = _address_of_etcd(plane)
    revision = _ask(etcd, "maintenance/status")["header"]["revision"]
    await asyncio.sleep(_SETTLE_SECONDS)
    _ask(etcd, "kv/compaction", revision=revision, physical=True)
    counts = {
        name: len(await client.items(path, "" if name == "stored" else JOB_LABEL, metadata_only=True))
        for name, path in _COUNTED.items()
    }
    size = _ask(etcd, "maintenance/status")
    return counts | {
        "residentMiB": operator.resident_mib(),
        "etcdInUseMiB": round(int(size["dbSizeInUse"]) / MIB, 2),
        "etcdFileMiB": round(int(size["dbSize"]) / MIB, 2),
    }


def _address_of_etcd(plane: ControlPlane) -> str:
    (pid,) = site.processes_of(plane)["etcd"].pids
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    flag = "--advertise-client-urls="
    return next(word.removeprefix(flag) for word in words if word.startswith(flag))


def _ask(etcd: str, what: str, **body: Any) -> dict[str, Any]:
    """Send a request to etcd's JSON gateway."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{etcd}/v3/{what}", data=json.dumps(body).encode(), timeout=30) as answer:
        return dict(json.loads(answer.read()))


def _growth(figure: str) -> Any:
    """The growth from the second month, when everything has run once, to the last."""
    return lambda run: run["months"][_MONTHS - 1][figure] - run["months"][1][figure]


_TARGETS = (
    Target("memory of the operator grows by {} MiB", 5, _growth("residentMiB")),
    Target("etcd grows by {} MiB", 1, _growth("etcdInUseMiB")),
    Target("claims grow by {}", _AT_ONCE, _growth("claims")),
    Target("claims left once the last job is deleted {}", 0, lambda run: run["months"][-1]["claims"]),
)


def tables(result: dict[str, Any]) -> str:
    """Return Markdown tables: each month, targets."""
    names = ("stored", "claims", "batchJobs", "pods", "residentMiB", "etcdInUseMiB", "etcdFileMiB")
    lines = [
        *head(
            "End of month",
            "jobs so far",
            "QLoRAJobs stored",
            "claims",
            "Jobs",
            "pods",
            "operator, MiB",
            "etcd in use, MiB",
            "etcd's file, MiB",
        ),
        *(
            row(
                f"{number}" if number <= _MONTHS else "all deleted",
                f"{month['jobs'] * result['standsFor']:,}",
                *(f"{month[name]:,}" for name in names),
            )
            for number, month in enumerate(result["months"], 1)
        ),
        "",
        (
            f"One job stands for {result['standsFor']}; at most {result['atOnce']} at a time; each is deleted "
            f"{result['ttlSeconds']} seconds after its end, a week of this year. {result['succeeded']:,} jobs have "
            f"succeeded. Load average of the machine before: {result['loadAverage'][0]:.1f}."
        ),
        "",
        *targets([(target, result) for target in _TARGETS]),
    ]
    return "\n".join([*lines, ""])
