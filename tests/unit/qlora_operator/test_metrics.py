"""Metrics of the jobs and of the operator's work, and the maximum number of series."""

import asyncio
import dataclasses
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from qlora_api.contract import ExitCode
from qlora_api.status import Phase, QLoRAJobStatus
from qlora_operator import decisions
from qlora_operator.decisions.usage.budget import BUDGET_EXCEEDED
from qlora_operator.metrics.jobs import SERIES_PER_RUNNING_JOB, JobMetrics
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.metrics.requests import RESOURCES, resource_of
from qlora_operator.metrics.shown import FAILURE_REASONS
from qlora_operator.metrics.watches import WatchMetrics
from qlora_operator.reconcile.queue import WorkQueue
from tests.support.builders import (
    NAME,
    PROFILE,
    VirtualLoop,
    after,
    condition,
    job_body,
    make_job,
    resolved,
    status_in,
    time,
)

JOB = {"namespace": "team", "name": NAME}


def training(**progress: Any) -> dict[str, Any]:
    """The status of a job that trains."""
    figures = {
        "step": 120,
        "totalSteps": 400,
        "loss": 1.5,
        "evalLoss": 1.75,
        "tokensPerSecond": 900.5,
        "remainingSeconds": 4320,
        "peakMemoryBytes": 2**34,
        "goodput": 0.875,
    }
    status = status_in("train", phase="Training", phaseSince=time(-500), progress=figures | progress).dump()
    status["step"] |= {"progressedAt": time(-30)}
    return status | {"workspace": {"claimName": "tune-0a1b2c3d", "path": "tune-0a1b2c3d"}}


def named(name: str, status: Mapping[str, Any], namespace: str = "team") -> dict[str, Any]:
    body = job_body(status)
    return body | {"metadata": body["metadata"] | {"name": name, "namespace": namespace, "uid": name}}


def page(metrics: Metrics) -> str:
    return metrics.page()[0].decode()


def series_of(metrics: Metrics, name: str) -> list[str]:
    """Every series that has the job's name."""
    return [line for line in page(metrics).splitlines() if f'name="{name}"' in line]


def test_a_standby_operator_reports_no_job_no_sweep_and_no_namespace() -> None:
    metrics = Metrics()
    metrics.works((lambda: 3, lambda: 2))
    depths = ('qlora_operator_queue_depth{kind="QLoRAJob"}', 'qlora_operator_queue_depth{kind="QLoRASweep"}')
    assert all(f"{depth} {number}.0" in page(metrics) for depth, number in zip(depths, (3, 2), strict=True))
    metrics.jobs.show(job_body(training()))
    metrics.sweeps.show(("team", "rates"), {"status": {"phase": "Running"}})
    metrics.namespace_is_denied("forgotten", True)

    metrics.works(None)

    text = page(metrics)
    assert "team" not in text
    assert "qlora_jobs_without_progress 0.0" in text
    assert all(f"{depth} 0.0" in text for depth in depths)
    assert "forgotten" not in text


def test_a_running_job_has_the_metrics_of_its_status() -> None:
    metrics = Metrics()
    metrics.jobs.show(job_body(training()))
    found = metrics.registry.get_sample_value
    assert {name: found(f"qlora_job_{name}", JOB) for name in ("optimizer_steps", "planned_optimizer_steps")} == {
        "optimizer_steps": 120,
        "planned_optimizer_steps": 400,
    }
    assert found("qlora_job_loss", JOB) == 1.5
    assert found("qlora_job_eval_loss", JOB) == 1.75
    assert found("qlora_job_tokens_per_second", JOB) == 900.5
    assert found("qlora_job_remaining_seconds", JOB) == 4320
    assert found("qlora_job_peak_memory_bytes", JOB) == 2**34
    assert found("qlora_job_goodput_ratio", JOB) == 0.875
    assert found("qlora_job_last_progress_timestamp_seconds", JOB) == after(-30).timestamp()
    assert found("qlora_job_without_progress", JOB) == 0
    claim = training()["workspace"]["claimName"]
    info = {"phase": "Training", "profile": "default", "persistentvolumeclaim": claim}
    assert found("qlora_job_info", JOB | info) == 1
    assert len(series_of(metrics, NAME)) == SERIES_PER_RUNNING_JOB


def test_a_job_that_makes_no_progress_is_named() -> None:
    metrics = Metrics()
    stalled = training()
    stalled["conditions"] = [condition("Progressing", "False")]
    metrics.jobs.show(job_body(stalled))
    assert metrics.registry.get_sample_value("qlora_job_without_progress", JOB) == 1


@pytest.mark.parametrize(
    "end",
    [
        job_body(training() | {"phase": "Succeeded"}),
        job_body(training() | {"phase": "Failed"}),
        job_body(training() | {"phase": "Suspended"}),
        job_body(training() | {"phase": "Queued"}),
        job_body({}),
    ],
    ids=["succeeded", "failed", "suspended", "waits again", "without status"],
)
def test_the_series_of_a_job_end_when_it_no_longer_runs(end: dict[str, Any]) -> None:
    metrics = Metrics()
    metrics.jobs.show(job_body(training()))
    metrics.jobs.show(end)
    assert series_of(metrics, NAME) == []


def test_the_series_of_a_job_end_when_it_is_deleted_or_replaced() -> None:
    metrics = Metrics()
    metrics.jobs.show(job_body(training()))
    metrics.jobs.show(job_body(training()), deleted=True)
    assert series_of(metrics, NAME) == []
    metrics.jobs.show(job_body(training()))
    metrics.job_is_gone(("team", NAME), replaced_by="new")
    assert series_of(metrics, NAME) == []


def test_a_missing_figure_of_a_job_has_no_series() -> None:
    """Zero would be a loss, a speed and a time left that were never measured."""
    metrics = Metrics()
    preparing = status_in("prepare", phase="Preparing", progress={"summary": "downloading", "step": 0}).dump()
    preparing["step"] |= {"progressedAt": time()}
    metrics.jobs.show(job_body(preparing))
    names = {line.partition("{")[0] for line in series_of(metrics, NAME)}
    assert names == {"qlora_job_info", "qlora_job_without_progress", "qlora_job_last_progress_timestamp_seconds"}
    foreign = training(evalLoss=None, remainingSeconds=None)
    foreign["progress"] |= {"loss": "NaN", "goodput": True}
    metrics.jobs.show(job_body(foreign))
    assert len(series_of(metrics, NAME)) == SERIES_PER_RUNNING_JOB - 4


def test_publish_reports_nothing_so_its_silence_is_not_measured() -> None:
    metrics = Metrics()
    metrics.jobs.show(job_body(training() | {"phase": "Publishing"}))
    assert metrics.registry.get_sample_value("qlora_job_last_progress_timestamp_seconds", JOB) is None
    assert metrics.registry.get_sample_value("qlora_job_loss", JOB) == 1.5


def test_the_number_of_running_jobs_with_series_is_bounded() -> None:
    metrics = Metrics(running_jobs=2)
    # As a restarted operator lists them: by name.
    for age, name in ((2, "fourth"), (4, "second"), (3, "third")):
        metrics.jobs.show(named(name, training() | {"startTime": time(-3600 * age)}))
    metrics.jobs.show(named("first", training(step=121) | {"startTime": time(-3600 * 5)}))

    def shown() -> set[str]:
        return {name for name in ("first", "second", "third", "fourth") if series_of(metrics, name)}

    assert shown() == {"first", "second"}
    assert metrics.registry.get_sample_value("qlora_jobs_left_out") == 2
    metrics.jobs.show(named("first", training() | {"phase": "Succeeded"}))
    assert shown() == {"second", "third"}
    assert metrics.registry.get_sample_value("qlora_jobs_left_out") == 1
    nobody = Metrics(running_jobs=0)
    nobody.jobs.show(job_body(training()))
    assert NAME not in page(nobody)


def test_gpu_seconds_start_at_zero_before_a_job_has_used_any() -> None:
    """Prometheus adds up increases, and misses the first value of a series."""
    metrics, status = Metrics(), status_in("train")
    metrics.gpu_seconds.note(make_job(status), status)
    of = {"namespace": "team", "profile": "default"}
    assert metrics.registry.get_sample_value("qlora_gpu_seconds_total", of) == 0
    for cause in ("startup", "disruption", "failure", "suspension"):
        assert metrics.registry.get_sample_value("qlora_gpu_lost_seconds_total", of | {"cause": cause}) == 0
    later = Metrics()
    later.show(job_body(training() | {"usage": {}}))
    assert later.registry.get_sample_value("qlora_gpu_seconds_total", of) == 0, "after a restart"
    cpu, status = Metrics(), status_in("train", resolved=resolved(PROFILE.model_copy(update={"gpu_resource": None})))
    cpu.gpu_seconds.note(make_job(status), status)
    cpu.show(job_body({"phase": "Pending"}, scheduling={"profileName": "made-up"}))
    assert "qlora_gpu_seconds_total{" not in page(cpu)


def test_jobs_are_counted_by_namespace_and_phase() -> None:
    jobs = JobMetrics()
    for number, (namespace, phase) in enumerate([("a", "Training"), ("a", "Training"), ("b", "Queued")]):
        jobs.show(named(str(number), {"phase": phase}, namespace))
    counted = {
        (sample.labels["namespace"], sample.labels["phase"]): sample.value
        for family in jobs.collect()
        if family.name == "qlora_jobs"
        for sample in family.samples
    }
    assert {key: value for key, value in counted.items() if value} == {("a", "Training"): 2, ("b", "Queued"): 1}
    assert counted["a", "Failed"] == 0, "a rate needs the zero before the first one"


def test_failed_jobs_are_counted_by_namespace_and_known_reason() -> None:
    metrics = Metrics()
    for name, reason in (("a", "Diverged"), ("b", "Diverged"), ("c", "Invented"), ("d", None)):
        status: dict[str, Any] = {"phase": "Failed"}
        metrics.jobs.show(
            named(name, status | ({"conditions": [condition("Failed", "True", reason=reason)]} if reason else {}))
        )
    found = metrics.registry.get_sample_value
    assert found("qlora_jobs_failed", {"namespace": "team", "reason": "Diverged"}) == 2
    assert found("qlora_jobs_failed", {"namespace": "team", "reason": "Other"}) == 2
    metrics.jobs.show(named("a", {"phase": "Queued"}))
    assert found("qlora_jobs_failed", {"namespace": "team", "reason": "Diverged"}) == 1


def test_the_queue_shows_since_when_the_first_job_waits() -> None:
    metrics = Metrics()
    for name, since in (("late", -60), ("early", -7200), ("unknown", None)):
        status = {"phase": "Queued"} | ({} if since is None else {"phaseSince": time(since)})
        metrics.jobs.show(named(name, status))
    metrics.jobs.show(named("elsewhere", {"phase": "Queued", "phaseSince": time(-5)}, "other"))
    found = metrics.registry.get_sample_value
    name = "qlora_jobs_queued_since_timestamp_seconds"
    assert found(name, {"namespace": "team"}) == after(-7200).timestamp()
    assert found(name, {"namespace": "other"}) == after(-5).timestamp()
    metrics.jobs.show(named("elsewhere", training(), "other"))
    assert found(name, {"namespace": "other"}) is None


def write(
    metrics: Metrics,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    profile: str = "default",
    namespace: str = "team",
) -> None:
    """The operator stores that status of a job that is an hour old."""
    job = make_job(QLoRAJobStatus.model_validate(before), scheduling={"profileName": profile})
    job = dataclasses.replace(job, namespace=namespace)
    metrics.transitions.written(job, QLoRAJobStatus.model_validate(after), time(-3600))


def test_the_time_in_a_phase_is_measured_when_a_job_leaves_it() -> None:
    metrics = Metrics()
    metrics.transitions.expect("h100")
    queued = {"phase": "Queued", "phaseSince": time(-3000)}
    write(metrics, queued, queued | {"observedGeneration": 2}, "h100")
    write(metrics, queued, {"phase": "Training", "phaseSince": time()}, "h100")
    write(metrics, {"phase": "Queued"}, {"phase": "Training", "phaseSince": time()}, "h100")
    write(metrics, {"phase": "Failed", "phaseSince": time(-9e5)}, {"phase": "Queued", "phaseSince": time()}, "h100")
    found = metrics.registry.get_sample_value
    labels = {"namespace": "team", "phase": "Queued", "profile": "h100"}
    assert found("qlora_job_phase_duration_seconds_count", labels) == 1
    assert found("qlora_job_phase_duration_seconds_sum", labels) == 3000
    assert found("qlora_job_phase_duration_seconds_bucket", labels | {"le": "1800.0"}) == 0
    assert found("qlora_job_phase_duration_seconds_bucket", labels | {"le": "3600.0"}) == 1
    assert found("qlora_job_phase_duration_seconds_count", labels | {"phase": "Failed"}) is None


def test_a_bounded_number_of_namespaces_has_its_own_histograms() -> None:
    metrics = Metrics(namespaces=2)
    queued, runs = {"phase": "Queued", "phaseSince": time(-300)}, {"phase": "Training", "phaseSince": time()}
    for namespace in ("first", "second", "third", "first", "fourth"):
        write(metrics, queued, runs, namespace=namespace)
    write(metrics, runs, runs | {"progress": {"step": 1, "updatedAt": time()}}, namespace="fifth")
    counted = {
        (family.name, sample.labels["namespace"]): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.endswith("_count") and "namespace" in sample.labels
    }
    phases, first_step = "qlora_job_phase_duration_seconds", "qlora_job_time_to_first_step_seconds"
    assert counted == {(phases, "first"): 2, (phases, "second"): 1, (phases, "_other"): 2, (first_step, "_other"): 1}


TRAINS = {"phase": "Training", "phaseSince": time(-60)}
WAITS = {"summary": "waits for other nodes", "updatedAt": time(-30)}
STARTS: dict[str, Any] = TRAINS | {"progress": WAITS}


@pytest.mark.parametrize(
    ("before", "after", "seconds"),
    [
        (TRAINS, {"progress": {"step": 1, "updatedAt": time(-5)}}, [3595, 3095]),
        (STARTS, {"progress": {"step": 4, "updatedAt": time()}}, [3600, 3100]),
        (STARTS, {"progress": {"step": 0, "updatedAt": time()}}, [None, None]),
        (TRAINS | {"progress": {"step": 1}}, {"progress": {"step": 2, "updatedAt": time()}}, [None, None]),
        (STARTS, {"progress": {**WAITS, "step": 9}, "phase": "Publishing"}, [None, None]),
        (TRAINS, {"progress": {"step": 1, "updatedAt": time()}, "firstAttempt": 2}, [None, None]),
    ],
    ids=["reported", "after a wait for nodes", "no step", "a later step", "only in the result", "retried"],
)
def test_the_time_to_the_first_step_is_measured_once_with_and_without_waiting(
    before: dict[str, Any], after: dict[str, Any], seconds: list[float | None]
) -> None:
    metrics, waited = Metrics(), {"waitedSeconds": 500}
    write(metrics, before | waited, before | waited | after)
    labels = {"namespace": "team", "profile": "default"}
    name = "qlora_job_time_to_first_step_seconds_sum"
    found = [
        metrics.registry.get_sample_value(name, labels | {"waiting": waiting}) for waiting in ("included", "excluded")
    ]
    assert found == seconds


def failure(reason: str, at: float = 0) -> dict[str, Any]:
    return {"lastFailure": {"step": "train", "reason": reason, "time": time(at)}}


def test_each_failure_counts_once_by_its_reason() -> None:
    metrics = Metrics()
    reason = ExitCode.UNREACHABLE.reason
    labels = {"profile": "default", "reason": reason}
    assert metrics.registry.get_sample_value("qlora_job_failures_total", labels) == 0, "what increases begins at zero"
    first, second = failure(reason), failure(reason, 60)
    for before, after_ in (({}, first), (first, first), (first, second), (second, {})):
        write(metrics, before, after_)
    labels = {"profile": "default", "reason": reason}
    assert metrics.registry.get_sample_value("qlora_job_failures_total", labels) == 2


def test_ends_are_counted() -> None:
    metrics = Metrics()
    phases: tuple[Phase, ...] = ("Publishing", "Succeeded", "Succeeded")
    for before, after_ in itertools.pairwise(phases):
        write(metrics, {"phase": before}, {"phase": after_})
    labels = {"profile": "default", "phase": "Succeeded"}
    assert metrics.registry.get_sample_value("qlora_jobs_ended_total", labels) == 1


def test_text_of_a_tenant_makes_no_series() -> None:
    """A profile that does not exist, and a reason that its pod has made up."""
    metrics = Metrics()
    before = len(page(metrics).splitlines())
    for number in range(100):
        write(metrics, {}, failure(f"Mine{number}") | {"phase": "Failed"}, f"mine-{number}")
    added = [line for line in page(metrics).splitlines()[before:] if line.startswith("qlora_job")]
    labels = {"profile": "unknown", "reason": "Other"}
    assert metrics.registry.get_sample_value("qlora_job_failures_total", labels) == 100
    assert len(added) < 10


def test_every_failure_reason_of_trainer_and_operator_has_its_own_series() -> None:
    sources = "\n".join(file.read_text() for file in (Path(decisions.__path__[0])).rglob("*.py"))
    found = set(re.findall(r'failure_of\([\w."]+, "([A-Z]\w+)"', sources))
    found |= set(re.findall(r'return (?:pod\.reason or )?"([A-Z]\w+)", f?["_]', sources))
    assert {"DeadlineExceeded", "ResultUnreadable", "HostOutOfMemory", "Evicted", "PodFailed"} <= found
    assert found | {BUDGET_EXCEEDED} | {code.reason for code in ExitCode} <= FAILURE_REASONS


@pytest.mark.parametrize(
    ("path", "resource"),
    [
        ("/apis/qlora.dev/v1beta1/namespaces/team/qlorajobs/tune/status", "qlorajobs/status"),
        ("/apis/qlora.dev/v1beta1/namespaces/team/qlorajobs/status", "qlorajobs"),
        ("/apis/qlora.dev/v1beta1/qlorasweeps", "qlorasweeps"),
        ("/api/v1/namespaces/team/pods/tune-train-1/log", "pods/log"),
        ("/api/v1/namespaces/pods/persistentvolumeclaims/pods", "persistentvolumeclaims"),
        ("/apis/coordination.k8s.io/v1/namespaces/qlora-system/leases/qlora-operator", "leases"),
        ("/openapi/v3/apis/qlora.dev/v1beta1", "openapi"),
        ("/api/v1/namespaces", "namespaces"),
        ("/apis/example.org/v1/namespaces/team/gadgets", "other"),
        ("/", "other"),
        ("/api/v1/namespaces/team/configmaps/adapters", "configmaps"),
    ],
)
def test_a_request_is_counted_by_its_resource(path: str, resource: str) -> None:
    assert resource_of(path) == resource


def test_every_resource_of_the_operators_role_has_a_name_in_its_metrics() -> None:
    templates = Path(__file__).parents[3] / "helm/qlora-operator/templates"
    granted = "\n".join((templates / name).read_text() for name in ("_rules.tpl", "leaderelection.yaml"))
    found = {word.strip() for line in re.findall(r"resources: \[(.*)\]", granted) for word in line.split(",")}
    assert {"pods/log", "configmaps", "leases"} <= found
    assert found <= RESOURCES


def test_no_path_and_no_answer_makes_more_than_a_bounded_number_of_series() -> None:
    metrics = Metrics()
    for number in range(600):
        metrics.requests.observe("GET", f"/apis/qlora.dev/v1beta1/namespaces/n{number}/qlorajobs/j", number, 0.1)
        metrics.requests.observe("GET", f"/apis/example.org/v1/things{number}", None, 0.1)
    labels = {"method": "GET", "resource": "other", "code": "none"}
    assert metrics.registry.get_sample_value("qlora_operator_api_requests_total", labels) == 600
    counted = [line for line in page(metrics).splitlines() if line.startswith("qlora_operator_api_requests_total")]
    assert len(counted) < 100
    assert "qlorajobs/status" in RESOURCES


def test_the_queue_reports_how_long_a_job_was_due_before_a_worker_took_it() -> None:
    waited: list[float] = []

    async def measure() -> None:
        loop = asyncio.get_running_loop()

        async def work(key: tuple[str, str]) -> None:
            await asyncio.sleep(7)

        queue = WorkQueue(work, monotonic=loop.time, workers=1, on_start=waited.append)
        queue.add(("team", "first"))
        queue.add(("team", "second"))
        queue.add(("team", "later"), 100)
        running = asyncio.create_task(queue.run())
        await asyncio.sleep(150)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(measure())
    assert [round(seconds, 3) for seconds in waited] == [0, 7, 0]


def test_the_watches_show_their_events_their_restarts_and_when_each_was_last_heard() -> None:
    registry, clock = CollectorRegistry(), iter([100.0, 160.0, 170.0])
    watches = WatchMetrics(registry, lambda: next(clock))
    found = registry.get_sample_value
    deleted = {"resource": "qlorasweeps", "type": "DELETED"}
    assert found("qlora_operator_watch_events_total", deleted) == 0, "what increases begins at zero"
    for resource, kind in (("pods", None), ("pods", "MODIFIED"), ("qlorasweeps", "DELETED")):
        watches.event(resource, kind)
    watches.restarted()
    assert found("qlora_operator_watch_events_total", {"resource": "pods", "type": "LISTED"}) == 1
    assert found("qlora_operator_watch_events_total", deleted) == 1
    assert found("qlora_operator_watch_last_event_timestamp_seconds", {"resource": "pods"}) == 160
    assert found("qlora_operator_watch_restarts_total") == 1
