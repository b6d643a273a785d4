"""Metrics, alerts and dashboards of a real operator with Prometheus' programs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import packages, toolchain
from devcluster.errors import ClusterError
from devcluster.layout import from_environment
from devcluster.processes import run
from tests.support.cluster.nodeless import GPU, NAMESPACE, Nodeless
from tests.support.project.alerts import CASES, FILE, alerts
from tests.support.project.dashboards import dashboards, panels, queries
from tests.support.services.prometheus import Prometheus, running_prometheus, serving_metrics
from tests.support.waiting import eventually

CHART = Path(__file__).parents[3] / "helm" / "qlora-operator"
Object = dict[str, Any]
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


def template(file: str, **values: Any) -> list[Object]:
    """The objects of one file of the chart."""
    helm = toolchain.built(from_environment(), ["helm"])["helm"]
    shown = ("--show-only", f"templates/{file}.yaml", "--namespace", "qlora-system", "--values", "-")
    text = run([helm, "template", "release", CHART, *shown], input_text=json.dumps(values), seconds=60)
    return list(yaml.safe_load_all(text))


def installed_groups(**values: Any) -> list[Object]:
    """The groups of rules as the chart installs them."""
    (rule,) = template("prometheusrule", metrics={"prometheusRule": {"enabled": True, **values}})
    return list(rule["spec"]["groups"])


def installed_rules(**values: Any) -> dict[str, Object]:
    """Each rule as the chart installs it, by the name of its alert."""
    return {rule["alert"]: rule for group in installed_groups(**values) for rule in group["rules"]}


def test_the_chart_installs_the_alerts_of_the_file() -> None:
    assert installed_rules() == alerts()
    for name, rule in installed_rules(siteURL=f"{SITE}/").items():
        assert rule["annotations"].pop("runbook_url") == f"{SITE}/runbooks/{name}.html"
        assert rule == alerts()[name]


def test_an_administrator_leaves_alerts_out_and_replaces_their_fields() -> None:
    of_operator = [name for name in alerts() if name.startswith(("QLoRAOperator", "QLoRARec", "QLoRANam", "QLoRASch"))]
    given = {"expr": "vector(1)", "for": "1d", "labels": {"severity": "critical", "team": "a"}}
    groups = installed_groups(disabled=of_operator, overrides={"QLoRAQueueTooLong": given})
    assert [group["name"] for group in groups] == ["qlora-jobs"], "a group without rules would be left over"
    (rule,) = [rule for rule in groups[0]["rules"] if rule["alert"] == "QLoRAQueueTooLong"]
    assert rule == alerts()["QLoRAQueueTooLong"] | given


@pytest.mark.parametrize("given", [{"disabled": ["QLoRAQueue"]}, {"overrides": {"QLoRAQueue": {"for": "1h"}}}])
def test_an_alert_that_does_not_exist_is_named(given: Object) -> None:
    with pytest.raises(
        ClusterError, match="there is no alert QLoRAQueue; there are: QLoRAJobStalled, QLoRAJobsFailing"
    ):
        installed_groups(**given)


def test_the_chart_installs_the_dashboards_where_grafana_reads_them() -> None:
    values = {"enabled": True, "namespace": "monitoring", "annotations": {"grafana_folder": "QLoRA"}}
    maps = template("dashboards", metrics={"dashboards": values})
    assert {name: json.loads(text) for each in maps for name, text in each["data"].items()} == {
        f"qlora-{name}.json": content for name, content in dashboards().items()
    }
    for each in maps:
        assert each["metadata"]["namespace"] == "monitoring"
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["annotations"] == {"grafana_folder": "QLoRA"}


@pytest.mark.parametrize("file", ["prometheusrule", "dashboards"])
def test_neither_is_installed_by_default(file: str) -> None:
    # Helm's report on a file that makes no object.
    with pytest.raises(ClusterError, match="could not find template"):
        template(file)
    # `helm upgrade --reuse-values` from a chart that did not have them.
    with pytest.raises(ClusterError, match="could not find template"):
        template(file, metrics={"prometheusRule": None, "dashboards": None})


def test_the_administrator_sets_who_may_read_the_metrics() -> None:
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    for peers in ([], [prometheus]):
        (policy,) = template("networkpolicy", networkPolicy={"enabled": True, "metricsFrom": peers})
        rules = {rule["ports"][0]["port"]: rule for rule in policy["spec"]["ingress"]}
        assert rules["metrics"].get("from", []) == peers
        assert "from" not in rules["probes"], "the kubelet probes from any node"


def test_each_alert_fires_when_it_should_and_only_then(programs: Programs, tmp_path: Path) -> None:
    tests = yaml.safe_load(CASES.read_text()) | {"rule_files": [str(FILE)]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    assert "SUCCESS" in run([programs.promtool, "test", "rules", tmp_path / "tests.yaml"], seconds=60)


def test_the_rules_that_the_chart_installs_are_valid(programs: Programs, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": installed_groups(siteURL=SITE)}))
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
    manifest = {
        "apiVersion": "qlora.dev/v1alpha1",
        "kind": "QLoRAJob",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {"source": "hf://org/model"},
            "dataset": {"source": "hf://org/rows"},
            "scheduling": {"profile": GPU},
        },
    }
    operated.kubectl.apply(json.dumps(manifest))


@pytest.fixture(scope="module")
def prometheus(
    programs: Programs, operated: Nodeless, job: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Scrape the operator and a kubelet's figures of the job's claim, with the alerts."""
    claim = operated.job(job)["status"]["resolved"]["claimName"]
    labels = f'{{namespace="{NAMESPACE}",persistentvolumeclaim="{claim}"}}'
    kubelet = "".join(
        f"# TYPE {name} gauge\n{name}{labels} {value}\n"
        for name, value in (
            ("kubelet_volume_stats_available_bytes", 5e9),
            ("kubelet_volume_stats_capacity_bytes", 1e11),
        )
    )
    groups = installed_groups(siteURL=SITE, overrides={"QLoRAWorkspaceNearlyFull": {"for": "1s"}})
    folder = tmp_path_factory.mktemp("prometheus") / "server"
    with serving_metrics(kubelet) as port:
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
    claim = operated.job(job)["status"]["resolved"]["claimName"]
    labels = {"alertname": "QLoRAWorkspaceNearlyFull", "severity": "warning"}
    assert alert["labels"] == labels | {"namespace": NAMESPACE, "persistentvolumeclaim": claim}
    assert alert["annotations"]["runbook_url"] == f"{SITE}/runbooks/QLoRAWorkspaceNearlyFull.html"


def test_the_series_of_a_job_end_with_it(
    prometheus: Prometheus, operated: Nodeless, jobs: Callable[[str], str]
) -> None:
    name = jobs("short")
    operated.run(name, "prepare")
    operated.wait_for_phase(name, "Preparing")
    eventually(lambda: prometheus.query(f'{{name="{name}"}}'), seconds=30, every=0.5, what="series of the job")
    operated.succeed(name)
    operated.wait_for_phase(name, "Succeeded")
    eventually(lambda: not prometheus.query(f'{{name="{name}"}}'), seconds=30, every=0.5, what="the end of its series")
    took = 'qlora_job_phase_duration_seconds_count{phase="Publishing"}'
    eventually(lambda: prometheus.value(took), seconds=30, every=0.5, what="the time that it published")
