"""Metrics, alerts and dashboards of a real operator with Prometheus' programs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from devcluster import packages, toolchain
from devcluster.layout import from_environment
from devcluster.processes import run
from tests.support.chart.rendered import Helm, Object, only
from tests.support.cluster.nodeless import GPU, NAMESPACE, Nodeless
from tests.support.manifests import MINIMAL, with_value
from tests.support.project.alerts import CASES, FILE, alerts
from tests.support.project.dashboards import dashboards, panels, queries
from tests.support.services.prometheus import Prometheus, running_prometheus, serving_metrics
from tests.support.sweeps import SWEEP
from tests.support.waiting import eventually

SITE = "https://docs.example.org/qlora"
PROGRESS = {
    "step": 120,
    "totalSteps": 400,
    "loss": 1.5,
    "evalLoss": 1.75,
    "tokensPerSecond": 900.5,
    "remainingSeconds": 4320,
    "peakMemoryBytes": 2**34,
    "goodput": 0.875,
}

FIRST_STEP = """# TYPE qlora_job_time_to_first_step_seconds histogram
qlora_job_time_to_first_step_seconds_bucket{waiting="included",le="60"} 1
qlora_job_time_to_first_step_seconds_bucket{waiting="included",le="+Inf"} 1
qlora_job_time_to_first_step_seconds_sum{waiting="included"} 30
qlora_job_time_to_first_step_seconds_count{waiting="included"} 1
"""
"""Of the operator, which reads no log without a kubelet."""


@dataclass(frozen=True)
class Programs:
    """Prometheus' two programs, and which release they are of."""

    release: str
    prometheus: Path
    promtool: Path


@pytest.fixture(scope="module", params=["debian", pytest.param("newest", marks=pytest.mark.slow)])
def programs(request: pytest.FixtureRequest) -> Programs:
    """Debian's, and those of the newest release."""
    layout = from_environment()
    if request.param == "debian":
        return Programs("debian", packages.unpacked(layout, "prometheus"), packages.unpacked(layout, "promtool"))
    return Programs("newest", **toolchain.built(layout, ("prometheus", "promtool")))


@pytest.fixture(scope="module")
def groups(helm: Helm) -> list[Object]:
    """The groups of rules as the chart installs them; an alert of the job fires immediately."""
    fires = {"QLoRAWorkspaceNearlyFull": {"for": "1s"}}
    values = {"metrics": {"prometheusRule": {"enabled": True, "siteURL": SITE, "overrides": fires}}}
    return list(only(helm.template(values), "PrometheusRule")["spec"]["groups"])


def test_each_alert_fires_when_it_should_and_only_then(programs: Programs, tmp_path: Path) -> None:
    tests = yaml.safe_load(CASES.read_text()) | {"rule_files": [str(FILE)]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in run([programs.promtool, "test", "rules", tmp_path / "tests.yaml"], seconds=60)


def test_the_rules_that_the_chart_installs_are_valid(programs: Programs, groups: list[Object], tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}))
    said = run([programs.promtool, "check", "rules", "--lint-fatal", tmp_path / "rules.yaml"], seconds=60)
    assert f"{len(alerts())} rules found" in said


@pytest.fixture(scope="module")
def job(operated: Nodeless) -> Iterator[str]:
    """A job that trains, whose figures are in its status as if its log had been read."""
    name = "watched"
    apply(operated, name)
    operated.succeed(name, "prepare")
    operated.run(name, "train")
    operated.wait_for_phase(name, "Training")
    patch = json.dumps({"status": {"progress": PROGRESS}})
    operated.kubectl(
        *("patch", "qlorajob", name, f"--namespace={NAMESPACE}", "--subresource=status", "--type=merge"),
        f"--patch={patch}",
    )
    yield name
    operated.kubectl("delete", "qlorajob", name, f"--namespace={NAMESPACE}", "--ignore-not-found")


def apply(operated: Nodeless, name: str) -> None:
    manifest = MINIMAL | {"metadata": {"name": name, "namespace": NAMESPACE}}
    operated.kubectl.apply(json.dumps(with_value(manifest, "spec.scheduling.profileName", GPU)))


@pytest.fixture(scope="module")
def prometheus(
    programs: Programs,
    operated: Nodeless,
    groups: list[Object],
    job: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    """Scrape the operator and a kubelet's figures of the job's claim, with the alerts."""
    claim = operated.job(job)["status"]["workspace"]["claimName"]
    labels = f'{{namespace="{NAMESPACE}",persistentvolumeclaim="{claim}"}}'
    kubelet = "".join(
        f"# TYPE {name} gauge\n{name}{labels} {value}\n"
        for name, value in (
            ("kubelet_volume_stats_available_bytes", 5e9),
            ("kubelet_volume_stats_capacity_bytes", 1e11),
        )
    )
    folder = tmp_path_factory.mktemp("prometheus") / "server"
    with serving_metrics(kubelet + FIRST_STEP) as port:
        targets = {"qlora-operator-metrics": operated.operator.metrics_port, "kubelet": port}
        with running_prometheus(programs.prometheus, folder, targets, groups) as server:
            yield server


def test_promtool_accepts_the_metrics_of_a_working_operator(programs: Programs, operated: Nodeless, job: str) -> None:
    # The operator has seen the job's figures a moment after they are stored.
    page = eventually(lambda: text if f'name="{job}"' in (text := operated.metrics()) else "", seconds=30, every=0.2)
    assert run([programs.promtool, "check", "metrics"], input_text=page, seconds=60) == ""


@pytest.fixture
def jobs(operated: Nodeless, programs: Programs) -> Iterator[Callable[[str], str]]:
    """Creates jobs named after this release, and deletes them after the test."""
    created: list[str] = []

    def create(name: str) -> str:
        created.append(f"{name}-{programs.release}")
        apply(operated, created[-1])
        return created[-1]

    yield create
    for name in created:
        operated.kubectl("delete", "qlorajob", name, f"--namespace={NAMESPACE}", "--wait=false")


def test_every_query_of_the_dashboards_has_an_answer(
    prometheus: Prometheus, operated: Nodeless, job: str, jobs: Callable[[str], str]
) -> None:
    suspended = with_value(SWEEP, "spec.suspend", True)
    operated.kubectl.apply(json.dumps(with_value(suspended, "metadata.namespace", NAMESPACE)))
    waits, diverges = jobs("waits"), jobs("diverges")
    operated.succeed(waits, "prepare")
    operated.wait_for_phase(waits, "Queued")
    operated.succeed(diverges, "prepare")
    operated.run(diverges, "train")
    operated.fail(diverges, "train", 14, "Diverged", "the loss is not a number")
    operated.wait_for_phase(diverges, "Failed")
    asked = {
        f"{name}: {panel['title']}: {query}": query
        for name, dashboard in dashboards().items()
        for panel in panels(dashboard)
        for query in queries(panel)
    }

    def all_answered() -> bool:
        unanswered = [where for where, query in asked.items() if not prometheus.query(query)]
        assert unanswered == []
        return True

    # A rate has an answer from the second scrape on.
    eventually(all_answered, seconds=30, every=1, what="an answer to each query")
    assert prometheus.value(f'qlora_job_loss{{name="{job}"}}') == PROGRESS["loss"]
    # A rate has an answer before the scrape that has the failure.
    failures = 'sum(increase(qlora_job_failures_total{reason="Diverged"}[1h]))'
    eventually(lambda: (prometheus.value(failures) or 0) > 0, seconds=30, every=1, what="the failure")


def test_the_alerts_are_evaluated_without_an_error_and_fire(
    prometheus: Prometheus, operated: Nodeless, job: str
) -> None:
    def evaluated() -> bool:
        return all(rule["health"] == "ok" for rule in prometheus.rules())

    eventually(evaluated, seconds=30, every=0.5, what="an evaluation of each rule")
    assert {rule["name"] for rule in prometheus.rules()} == set(alerts())
    (alert,) = eventually(prometheus.alerts, seconds=30, every=0.5, what="an alert")
    claim = operated.job(job)["status"]["workspace"]["claimName"]
    labels = {"alertname": "QLoRAWorkspaceNearlyFull", "severity": "warning"}
    assert alert["labels"] == labels | {"namespace": NAMESPACE, "persistentvolumeclaim": claim}
    assert alert["annotations"]["runbook_url"] == f"{SITE}/runbooks/QLoRAWorkspaceNearlyFull.html"


def test_the_series_of_a_job_end_with_it(
    prometheus: Prometheus, operated: Nodeless, jobs: Callable[[str], str]
) -> None:
    # Other jobs have published, and in other profiles.
    took = 'sum(qlora_job_phase_duration_seconds_count{phase="Publishing"})'
    before = prometheus.value(took) or 0
    name = jobs("short")
    operated.run(name, "prepare")
    operated.wait_for_phase(name, "Preparing")
    eventually(lambda: prometheus.query(f'{{name="{name}"}}'), seconds=30, every=0.5, what="series of the job")
    operated.succeed(name)
    operated.wait_for_phase(name, "Succeeded")
    eventually(lambda: not prometheus.query(f'{{name="{name}"}}'), seconds=30, every=0.5, what="the end of its series")
    eventually(lambda: (prometheus.value(took) or 0) > before, seconds=30, every=0.5, what="the time that it published")
