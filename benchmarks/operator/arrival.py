"""A burst of new jobs: how fast each gets its first Job and its status, and at what cost.

Each run has its own control plane, and no pod is scheduled. The operator is compared with the least possible
work (`floor.py`) and with Kubeflow Trainer, whose TrainJobs become Jobs by way of JobSet.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any, Literal

from benchmarks.operator import audit, kubeflow, site
from benchmarks.operator.client import Client, connect, watch
from benchmarks.operator.objects import BATCH, CORE, NAMESPACE, jobs_path, qlora_job
from benchmarks.operator.site import Processes, spread
from benchmarks.operator.table import Run, Target, head, row, targets
from devcluster.controlplane import ControlPlane
from qlora_api.naming import JOB_LABEL

Subject = Literal["operator", "floor", "kubeflow-trainer", "kubeflow-trainer-unlimited"]
SUBJECTS: tuple[Subject, ...] = ("operator", "floor", "kubeflow-trainer", "kubeflow-trainer-unlimited")
_CREATED_AT_A_TIME = 32
_MOST_SECONDS = 300
_KUBEFLOW = ("kubeflow-trainer", "kubeflow-trainer-unlimited")
_KUBEFLOW_AGENTS = ("kubeflow-trainer", "jobset")


@dataclass
class Seen:
    """Times of each job's changes by its name, in seconds of the monotonic clock."""

    subject: tuple[subprocess.Popen[bytes], ...]
    created: dict[str, float] = field(default_factory=dict)
    """The answer of the job's own creation."""
    first_job: dict[str, float] = field(default_factory=dict)
    status: dict[str, float] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, found: dict[str, float], count: int, what: str) -> None:
        """Wait until `count` jobs have it.

        Raises TimeoutError, or ChildProcessError if the subject has ended.
        """
        deadline = time.monotonic() + _MOST_SECONDS
        while len(found) < count:
            self.changed.clear()
            if any(process.poll() is not None for process in self.subject):
                raise ChildProcessError(f"{len(found)} of {count} jobs have {what}, and what serves them has ended")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.changed.wait()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} of {count} jobs have {what} after {_MOST_SECONDS} s")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command line."""
    parser.add_argument("--jobs", type=int, nargs="+", default=[500, 1000], help="jobs of each run (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each, in turn; Trainer: one (%(default)s)")
    parser.add_argument("--workers", type=int, help="the operator's workers, if not its default")
    parser.add_argument(
        "--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS, help="what is measured (%(default)s)"
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs."""
    if any(subject in _KUBEFLOW for subject in options.subjects):
        kubeflow.build()
    runs = []
    for jobs in options.jobs:
        for repetition in range(options.repetitions):
            for subject in options.subjects:
                if subject in _KUBEFLOW and repetition:
                    continue
                print(f"{subject}: {jobs} jobs", file=sys.stderr, flush=True)
                runs.append({"subject": subject} | run(subject, jobs, options.workers))
                print(json.dumps(runs[-1], indent=2), flush=True)
    return {"runs": runs}


def run(subject: Subject, jobs: int, workers: int | None = None) -> dict[str, Any]:
    """The figures of one run."""
    with site.control_plane([NAMESPACE]) as plane, _started(subject, plane, workers) as started:
        return asyncio.run(_measure(subject, jobs, plane, started))


@contextmanager
def _started(
    subject: Subject, plane: ControlPlane, workers: int | None
) -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """The measured programs, as separate processes."""
    if subject in _KUBEFLOW:
        with kubeflow.kubeflow_trainer(plane, unlimited=subject == "kubeflow-trainer-unlimited") as started:
            yield started
    elif subject == "operator":
        with site.operator(plane, **({"workers": workers} if workers else {})) as process:
            yield (process,)
    else:
        command = [sys.executable, "-m", "benchmarks.operator.floor", str(plane.kubeconfig)]
        with site.program(plane, command) as process:
            yield (process,)


async def _measure(
    subject: Subject, jobs: int, plane: ControlPlane, started: tuple[subprocess.Popen[bytes], ...]
) -> dict[str, Any]:
    seen = Seen(started)
    measured, api_server = Processes(tuple(process.pid for process in started)), site.api_server(plane)
    async with _observed(plane, seen), connect(plane.kubeconfig) as client:
        # The first job waits for the subject to start; it does not count.
        await _create(client, subject, seen, 0)
        await seen.until(seen.first_job, 1, "a first Job")
        await site.until(lambda: _there_is_a_pod(client), "pod", *started)
        if subject == "operator":
            await seen.until(seen.status, 1, "a status")
        await _until_quiet(plane, subject)
        audit_from = plane.audit_log.stat().st_size
        load, idle_mib = os.getloadavg(), measured.resident_mib()
        before = measured.processor_seconds(), api_server.processor_seconds()
        began = time.monotonic()
        numbers = iter(range(1, jobs + 1))

        async def create_all() -> None:
            for number in numbers:
                await _create(client, subject, seen, number)

        await asyncio.gather(*(create_all() for _ in range(_CREATED_AT_A_TIME)))
        await seen.until(seen.first_job, jobs + 1, "a first Job")
        at_first_jobs = measured.processor_seconds(), api_server.processor_seconds()
        if subject == "operator":
            await seen.until(seen.status, jobs + 1, "a status")
        await _until_quiet(plane, subject)
        when_quiet = measured.processor_seconds(), api_server.processor_seconds()
        del seen.created["job-0"], seen.first_job["job-0"]
        calls = audit.requests(plane.audit_log, audit_from, _agents(subject))
        sizes = {} if subject in _KUBEFLOW else await _stored_bytes(client, "job-1", subject == "operator")
    figures = {
        "jobs": jobs,
        "loadAverage": [round(value, 2) for value in load],
        "firstJobsPerSecond": round(jobs / (max(seen.first_job.values()) - began), 1),
        "secondsToAllFirstJobs": round(max(seen.first_job.values()) - began, 2),
        "secondsToFirstJob": spread([seen.first_job[name] - created for name, created in seen.created.items()]),
        "processorMillisecondsPerJob": {
            who: {
                "untilAllFirstJobs": round(1000 * (first - start) / jobs, 1),
                "untilQuiet": round(1000 * (last - start) / jobs, 1),
            }
            for who, start, first, last in zip((subject, "apiServer"), before, at_first_jobs, when_quiet, strict=True)
        },
        "residentMiB": {"idle": idle_mib, "atTheEnd": measured.resident_mib(), "peak": measured.peak_mib()},
        "callsPerJob": audit.by_call(calls, jobs),
        "allCallsPerJob": round(len(calls) / jobs, 2),
        "storedBytes": sizes,
    }
    if subject == "operator":
        lags = [seen.status[name] - seen.first_job[name] for name in seen.created]
        figures["secondsFromFirstJobToStatus"] = spread(lags)
        figures["secondsToAllStatuses"] = round(max(seen.status.values()) - began, 2)
    return figures


def _agents(subject: Subject) -> tuple[str, ...]:
    return _KUBEFLOW_AGENTS if subject in _KUBEFLOW else audit.OPERATOR_AGENTS


async def _create(client: Client, subject: Subject, seen: Seen, number: int) -> None:
    trained_by_kubeflow = subject in _KUBEFLOW
    body = kubeflow.train_job(number) if trained_by_kubeflow else qlora_job(number)
    await client.create(kubeflow.TRAIN_JOBS if trained_by_kubeflow else jobs_path(), body)
    seen.created[body["metadata"]["name"]] = time.monotonic()


async def _there_is_a_pod(client: Client) -> bool:
    """Whether the Job controller works: without pods, less is stored and watched."""
    return bool(await client.items(f"{CORE}/namespaces/{NAMESPACE}/pods", metadata_only=True))


async def _until_quiet(plane: ControlPlane, subject: Subject) -> None:
    """Wait until the subject has changed nothing for two seconds."""
    while True:
        since = plane.audit_log.stat().st_size
        await asyncio.sleep(2)
        if not any(request.writes for request in audit.requests(plane.audit_log, since, _agents(subject))):
            return


@asynccontextmanager
async def _observed(plane: ControlPlane, seen: Seen) -> AsyncIterator[None]:
    """Record the events of separate watches, during the block."""

    async def see_first_jobs() -> None:
        async for event in watch(plane.kubeconfig, "jobs"):
            labels = event.body["metadata"].get("labels", {})
            if name := labels.get(JOB_LABEL) or labels.get(kubeflow.JOBSET_LABEL):
                seen.first_job.setdefault(name, event.seconds)
                seen.changed.set()

    async def see_statuses() -> None:
        async for event in watch(plane.kubeconfig, "qlorajobs"):
            if any(entry.get("subresource") == "status" for entry in event.body["metadata"]["managedFields"]):
                seen.status.setdefault(event.body["metadata"]["name"], event.seconds)
                seen.changed.set()

    async with site.background(see_first_jobs(), see_statuses()):
        yield


async def _stored_bytes(client: Client, name: str, operated: bool) -> dict[str, int]:
    """Return each object's size in etcd: JSON for the QLoRAJob, else protobuf."""
    job = await client.get(f"{jobs_path()}/{name}")
    sizes = {"QLoRAJob": len(json.dumps(job, separators=(",", ":")))}
    selector = [("labelSelector", f"{JOB_LABEL}={name}")]
    for kind, path in {"Job": BATCH, "Pod": CORE, "PersistentVolumeClaim": CORE}.items():
        sizes[kind] = await client.stored_bytes(f"{path}/namespaces/{NAMESPACE}/{kind.lower()}s", selector)
    if operated:
        selector = [("fieldSelector", f"involvedObject.uid={job['metadata']['uid']}")]
        sizes["Event"] = await client.stored_bytes(f"{CORE}/namespaces/{NAMESPACE}/events", selector)
    return sizes


_KIB = 1024
_TARGETS = (
    (500, Target("500 jobs: {} first Jobs per second", 63, lambda run: run["firstJobsPerSecond"], at_least=True)),
    (500, Target("500 jobs: 99 % have their first Job in {} s", 4, lambda run: run["secondsToFirstJob"]["p99"])),
    (
        500,
        Target("500 jobs: 99 % have their status {} s later", 8, lambda run: run["secondsFromFirstJobToStatus"]["p99"]),
    ),
    (1000, Target("1,000 jobs: all have their first Job in {} s", 15, lambda run: run["secondsToAllFirstJobs"])),
    (1000, Target("1,000 jobs: memory of the operator {} MiB", 110, lambda run: run["residentMiB"]["peak"])),
)
_COLUMNS = {
    "operator": "This operator",
    "floor": "A script that creates the objects",
    "kubeflow-trainer": "Kubeflow Trainer",
    "kubeflow-trainer-unlimited": "Kubeflow Trainer, limit raised",
}
_ROWS: tuple[tuple[str, Callable[[Run], str]], ...] = (
    ("First Jobs per second", lambda run: f"{run['firstJobsPerSecond']:.0f}"),
    ("Seconds until all have their first Job", lambda run: f"{run['secondsToAllFirstJobs']:.1f}"),
    ("Seconds until one has it, median / 99th percentile", lambda run: _spread(run["secondsToFirstJob"])),
    (
        "Seconds from there to its status, median / 99th percentile",
        lambda run: _spread(run.get("secondsFromFirstJobToStatus")),
    ),
    ("Requests for each job", lambda run: f"{run['allCallsPerJob']:.1f}"),
    ("Processor time for each job, controller / API server", lambda run: _processor(run)),
    ("Memory of the controller, before / at most", lambda run: _memory(run)),
    ("Load average of the machine before", lambda run: f"{run['loadAverage'][0]:.1f}"),
)


def tables(result: dict[str, Any]) -> str:
    """Tables in Markdown: the rate of new jobs, the targets, and the cost of one job."""
    lines: list[str] = []
    ours: dict[int, Run] = {}
    for jobs in sorted({run["jobs"] for run in result["runs"]}):
        chosen = {
            subject: _middle(runs)
            for subject in _COLUMNS
            if (runs := [run for run in result["runs"] if (run["subject"], run["jobs"]) == (subject, jobs)])
        }
        ours[jobs] = chosen["operator"]
        lines += head(f"{jobs:,} jobs in one burst", *(_COLUMNS[subject] for subject in chosen))
        lines += [row(name, *(cell(run) for run in chosen.values())) for name, cell in _ROWS]
        lines.append("")
    reached = targets([(target, ours[jobs]) for jobs, target in _TARGETS if jobs in ours])
    return "\n".join([*lines, *reached, "", *_sizes(ours[max(ours)]), ""])


def _middle(runs: Iterable[Run]) -> Run:
    """The run with the median rate: every figure is of one run, and of a real one."""
    by_rate = {run["firstJobsPerSecond"]: run for run in runs}
    return by_rate[median_low(by_rate)]


def _spread(values: dict[str, float] | None) -> str:
    return f"{values['p50']:.1f} / {values['p99']:.1f}" if values else "–"


def _processor(run: Run) -> str:
    used = run["processorMillisecondsPerJob"]
    return f"{used[run['subject']]['untilQuiet']:.1f} / {used['apiServer']['untilQuiet']:.1f} ms"


def _memory(run: Run) -> str:
    return f"{run['residentMiB']['idle']:.0f} / {run['residentMiB']['peak']:.0f} MiB"


def _sizes(run: Run) -> list[str]:
    growth = (run["residentMiB"]["peak"] - run["residentMiB"]["idle"]) * _KIB / run["jobs"]
    sizes = run["storedBytes"]
    return [
        *head("A job whose first pod waits", "KiB"),
        *(row(f"{kind} in etcd", f"{size / _KIB:.1f}") for kind, size in sizes.items()),
        row("all of them", f"{sum(sizes.values()) / _KIB:.1f}"),
        row("memory of the operator", f"{growth:.1f}"),
    ]
