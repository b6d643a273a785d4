"""`qlora` on a cluster: create, list and change jobs, with few rights and bad networks."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from devcluster.controlplane import ControlPlane
from qlora_cli.__main__ import main
from qlora_client.jobs.follow import PATIENCE_SECONDS, follow_job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import UnreachableError
from tests.support.cluster.reported import Reported, reported
from tests.support.manifests import FULL, MINIMAL
from tests.support.services.api_proxy import ApiProxy, Reply, serve_api
from tests.support.sweeps import FULL_SWEEP

ALL = {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["*"]}


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    with reported(plane, tmp_path_factory.mktemp("kubelet"), "people") as team:
        yield team


def qlora(kubeconfig: Path, *arguments: str, answer: str | None = None) -> Result:
    """A command that asks the cluster, which never ends with a traceback."""
    result = CliRunner().invoke(main, [*arguments, "--kubeconfig", str(kubeconfig)], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def done(team: Reported, *arguments: str, answer: str | None = None) -> str:
    """Output of a command that succeeds, as an administrator."""
    result = qlora(team.plane.kubeconfig, *arguments, "--namespace", team.namespace, answer=answer)
    assert result.exit_code == 0, result.output
    return result.stdout


def denied(team: Reported, *arguments: str, code: int = 1) -> str:
    """The only line of a command that fails."""
    result = qlora(team.plane.kubeconfig, *arguments, "--namespace", team.namespace)
    assert (result.exit_code, result.stdout) == (code, "")
    [line] = result.stderr.splitlines()
    return line


def rows(table: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()]


def test_the_api_server_stores_a_job_made_of_options(team: Reported) -> None:
    options = ("--model", "hf://org/Tiny.Model", "--data", "hf://org/rows", "--rank", "8", "--learning-rate", "3e-4")
    created = done(team, "submit", *options, "--gpus", "2")
    match = re.fullmatch(r"qlorajob\.qlora\.dev/(tiny-model-[0-9a-f]{6}) created\n", created)
    assert match is not None
    spec = team.stored(match[1])["spec"]
    assert (spec["model"]["source"], spec["lora"]["rank"], spec["resources"]["gpus"]) == ("hf://org/Tiny.Model", 8, 2)
    assert spec["training"]["learningRate"] == 3e-4


def test_a_manifest_that_a_dry_run_prints_is_accepted_as_it_is(team: Reported, tmp_path: Path) -> None:
    options = ("--name", "again", "--model", "hf://org/1e5", "--revision", "2e-4", "--data", "hf://org/on")
    printed = done(team, "submit", *options, "--dry-run=client", "-o", "yaml")
    listed = json.loads(team.kubectl("get", "qlorajobs", "--output=json"))["items"]
    assert "again" not in [job["metadata"]["name"] for job in listed]
    (tmp_path / "job.yaml").write_text(printed)
    assert done(team, "submit", str(tmp_path / "job.yaml"), "-o", "name") == "qlorajob.qlora.dev/again\n"
    assert team.stored("again")["spec"]["model"]["revision"] == "2e-4"
    # kubectl reads the same of it.
    said = team.kubectl("diff", "--filename=-", input_text=printed)
    assert said == ""


@pytest.mark.parametrize("manifest", [FULL, FULL_SWEEP], ids=["job", "sweep"])
def test_the_api_server_checks_a_file_without_storing_it(
    team: Reported, manifest: dict[str, object], tmp_path: Path
) -> None:
    content = {**manifest, "metadata": {"name": "checked", "namespace": team.namespace}}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(content))
    said = done(team, "submit", "-f", str(tmp_path / "full.yaml"), "--dry-run=server")
    kind = str(manifest["kind"]).lower()
    assert said == f"{kind}.qlora.dev/checked created (server dry run)\n"
    assert team.kubectl("get", kind, "--ignore-not-found", "checked") == ""


def test_a_rejection_by_the_api_server_keeps_its_message(team: Reported) -> None:
    line = denied(team, "submit", "--name", "x" * 46, "--model", "hf://org/m", "--data", "hf://org/rows")
    assert line.startswith("Error: --name: found 'xxx")
    done(team, "submit", "--name", "twice", "--model", "hf://org/m", "--data", "hf://org/rows")
    line = denied(team, "submit", "--name", "twice", "--model", "hf://org/m", "--data", "hf://org/rows")
    assert line == 'Error: qlorajobs.qlora.dev "twice" already exists'


def test_a_manifest_goes_into_the_namespace_that_it_names(team: Reported, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "metadata": {"name": "placed", "namespace": team.namespace}}))
    result = qlora(team.plane.kubeconfig, "submit", str(file))
    assert result.output == "qlorajob.qlora.dev/placed created\n"
    assert team.stored("placed")
    result = qlora(team.plane.kubeconfig, "submit", str(file), "--namespace", "default")
    assert "--namespace is default, and the manifest names the namespace people" in result.stderr


def test_the_list_shows_progress_loss_and_gpu_hours(team: Reported) -> None:
    done_at = {"step": 100, "totalSteps": 100, "percent": 100, "loss": 1.25, "summary": "100% 100/100", "remaining": ""}
    team.job("listed-done", kind="listed")
    forecast = {"gpuHours": "12.50", "basis": "Measured", "cost": "31.25 EUR"}
    spent: dict[str, Any] = {"usage": {"gpuSeconds": 9000, "cost": "6.25 EUR"}, "forecast": forecast}
    team.report("listed-done", "Succeeded", progress=done_at, failures=1, disruptions=2, **spent)
    team.job("listed-new", kind="listed")
    header, *jobs = rows(done(team, "list", "-l", "kind=listed"))
    assert header == ["Name", "Phase", "Progress", "Loss", "Left", "Recoveries", "GPU hours", "Age"]
    by_name = {row[0]: row[1:-1] for row in jobs}
    assert by_name["listed-done"] == ["Succeeded", "100% 100/100", "1.250", "-", "3", "2.50"]
    assert by_name["listed-new"] == ["Pending", "-", "-", "-", "-", "-"]
    wide = rows(done(team, "list", "-l", "kind=listed", "-o", "wide"))
    assert wide[0] == [*header[:-1], "Cost", "Forecast", "Budget", "Age"]
    assert {row[0]: row[7:-1] for row in wide[1:]}["listed-done"] == ["6.25 EUR", "12.50 (31.25 EUR)", "-"]
    everywhere = rows(done(team, "list", "-A", "-l", "kind=listed"))
    assert [row[:2] for row in everywhere[1:]] == [["people", "listed-done"], ["people", "listed-new"]]
    listed = json.loads(done(team, "list", "-l", "kind=listed", "-o", "json"))
    assert [job["status"].get("phase") for job in listed["items"]] == ["Succeeded", None]
    assert yaml.safe_load(done(team, "list", "-l", "kind=listed", "-o", "yaml")) == listed


def test_an_empty_list_is_reported_on_stderr(team: Reported) -> None:
    result = qlora(team.plane.kubeconfig, "list", "--namespace", "nobody")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "No QLoRAJobs found in the namespace nobody.\n"


def test_jobs_are_suspended_and_resumed(team: Reported) -> None:
    team.job("night")
    team.job("shift")
    assert "night is suspended" in done(team, "suspend", "night", "shift")
    assert team.stored("shift")["spec"]["suspend"] is True
    assert done(team, "suspend", "night") == "night is suspended already\n"
    assert done(team, "resume", "night") == "night is resumed\n"
    assert team.stored("night")["spec"]["suspend"] is False
    team.report("night", "Failed")
    assert denied(team, "suspend", "night") == "Error: night has ended (Failed), so there is nothing to suspend"


def test_a_failed_job_is_retried_with_a_higher_number_than_any_before(team: Reported) -> None:
    team.job("flaky", {"retry": {"request": 2}})
    assert denied(team, "retry", "flaky") == "Error: flaky is Pending, and only a failed job can be retried"
    team.report("flaky", "Failed", retryRequest=4)
    assert done(team, "retry", "flaky") == "flaky is retried\n"
    assert team.stored("flaky")["spec"]["retry"]["request"] == 5


def test_a_job_is_deleted_only_after_a_yes(team: Reported) -> None:
    team.job("unwanted")
    result = qlora(team.plane.kubeconfig, "cancel", "unwanted", "--namespace", team.namespace, answer="n\n")
    assert result.exit_code == 1
    assert "Delete unwanted, which is Pending? (its workspace stays)" in result.stderr
    assert team.stored("unwanted")
    nobody = qlora(team.plane.kubeconfig, "cancel", "unwanted", "--namespace", team.namespace)
    assert nobody.exit_code == 1
    reason = "there was no answer: pass --yes to skip the question"
    assert nobody.stderr.endswith(f"\nError: unwanted is not deleted, because {reason}\n")
    done(team, "cancel", "unwanted", "--yes")
    assert team.kubectl("get", "qlorajob", "unwanted", "--ignore-not-found") == ""


@pytest.mark.parametrize("command", [("suspend", "none"), ("retry", "none"), ("cancel", "none"), ("watch", "none")])
def test_a_missing_job_is_named_with_its_namespace(team: Reported, command: Sequence[str]) -> None:
    line = denied(team, *command)
    assert line.startswith('Error: qlorajobs.qlora.dev "none" not found in the namespace people of the context ')


def test_a_missing_right_is_named_as_a_rule(team: Reported, tmp_path: Path) -> None:
    reads = {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["get", "list", "watch"]}
    reader = team.kubeconfig(tmp_path, "reader", reads)
    team.job("read-only")
    failure = {"step": "train", "reason": "Diverged", "exitCode": 14, "time": "2026-01-02T03:04:05Z"}
    team.report("read-only", "Failed", lastFailure=failure)
    jobs = 'apiGroups: ["qlora.dev"], resources: ["qlorajobs"]'
    for command, rule in {
        ("list", "-A"): f'ClusterRole with the rule {{{jobs}, verbs: ["list"]}}',
        ("retry", "read-only"): f'Role with the rule {{{jobs}, verbs: ["patch"]}}',
        ("logs", "read-only"): 'Role with the rule {apiGroups: [""], resources: ["pods"], verbs: ["list"]}',
    }.items():
        result = qlora(reader, *command)
        assert result.exit_code == 1
        [line] = result.stderr.splitlines()
        assert line.endswith(f"ask for a {rule}")
    # Other fields of a picture are left out, and named once.
    watched = qlora(reader, "watch", "read-only")
    assert watched.exit_code == 14
    assert 'resources: ["events"], verbs: ["list"]' in watched.stderr


def test_a_cluster_without_the_operators_kinds_has_its_own_message(team: Reported) -> None:
    proxy = proxy_of(team)
    proxy.weather = lambda _request: Reply(404, b"404 page not found\n", {"Content-Type": "text/plain"})
    with serve_api(proxy):
        line = asked_through(team, proxy, "list")
    assert "does not know QLoRAJobs: install the operator there" in line


def proxy_of(team: Reported) -> ApiProxy:
    return ApiProxy(team.plane.server.removeprefix("https://"), team.plane.directory / "certificates" / "ca.crt")


def asked_through(team: Reported, proxy: ApiProxy, *command: str) -> str:
    document = yaml.safe_load(team.plane.kubeconfig.read_text())
    document["clusters"][0]["cluster"] = {"server": proxy.url}
    document["users"][0]["user"] = {"token": "none"}
    file = team.plane.directory / "proxied.kubeconfig"
    file.write_text(yaml.safe_dump(document))
    result = qlora(file, *command)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(401), "does not accept your credentials: log in again"),
        (Reply(500), "answered with HTTP 500: the weather is 500"),
        (Reply(502, b"<html>Bad gateway</html>"), "answered with HTTP 502: "),
        (Reply(200, b"<html>Log in</html>"), "has answered something else than an object"),
    ],
    ids=["credentials", "error", "page", "portal"],
)
def test_an_answer_from_another_server_is_reported_in_one_sentence(team: Reported, reply: Reply, words: str) -> None:
    proxy = proxy_of(team)
    proxy.weather = lambda _request: reply
    with serve_api(proxy):
        assert words in asked_through(team, proxy, "list")


def test_a_job_is_watched_although_its_pods_and_events_cannot_be_read(team: Reported, tmp_path: Path) -> None:
    team.job("beside")
    failure = {"step": "train", "reason": "Diverged", "exitCode": 14, "time": "2026-01-02T03:04:05Z"}
    team.report("beside", "Failed", progress={"step": 3, "totalSteps": 9, "loss": 2.0}, lastFailure=failure)
    proxy = proxy_of(team)
    proxy.weather = lambda request: (
        None if "qlorajobs" in request.path else Reply(500 if "pods" in request.path else 400)
    )
    with serve_api(proxy):
        watched = qlora(team.kubeconfig(tmp_path, "watcher", ALL, server=proxy.url), "watch", "beside")
    assert watched.exit_code == 14
    assert watched.stderr == "the weather is 400\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no kubeconfig can be read"),
        ("clusters: [", "the kubeconfig cannot be read: while parsing a flow node"),
        ("contexts: []\ncurrent-context: x\n", "no kubeconfig can be read"),
    ],
)
def test_an_invalid_kubeconfig_is_reported(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "config"
    if content is not None:
        file.write_text(content)
    result = qlora(file, "list")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith(f"Error: {words}")


def test_a_context_is_chosen_by_name_and_a_failed_credential_plugin_is_reported(team: Reported, tmp_path: Path) -> None:
    document = yaml.safe_load(team.plane.kubeconfig.read_text())
    [context] = document["contexts"]
    document["contexts"] += [
        {"name": "team", "context": {**context["context"], "namespace": team.namespace}},
        {"name": "broken", "context": {**context["context"], "user": "broken"}},
    ]
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": "false", "interactiveMode": "Never"}
    document["users"].append({"name": "broken", "user": {"exec": plugin}})
    file = tmp_path / "config"
    file.write_text(yaml.safe_dump(document))
    team.job("in-context")
    assert "in-context" in qlora(file, "list", "--context", "team").stdout
    assert "in-context" not in qlora(file, "list").stdout
    [line] = qlora(file, "list", "--context", "mine").stderr.splitlines()
    assert line == "Error: found the context 'mine', must be one of the kubeconfig: devcluster, team, broken"
    [line] = qlora(file, "list", "--context", "broken").stderr.splitlines()
    assert line.startswith("Error: the context broken gets no credentials from its plugin: exec: process returned 1")


def test_names_of_jobs_are_completed(team: Reported) -> None:
    team.job("complete-me")
    team.job("complete-too")
    words = f"qlora suspend --kubeconfig {team.plane.kubeconfig} --namespace {team.namespace} complete-too com"
    environment = {"COMP_WORDS": words, "COMP_CWORD": "7", "_QLORA_COMPLETE": "bash_complete"}
    result = CliRunner().invoke(main, prog_name="qlora", env=environment)
    assert result.output.split() == ["plain,complete-me"]
    # Nothing is printed where the cluster is away.
    environment["COMP_WORDS"] = words.replace(str(team.plane.kubeconfig), "/nowhere")
    assert CliRunner().invoke(main, prog_name="qlora", env=environment).output.split() == []


def test_a_watch_survives_lost_connections_and_ends_if_the_cluster_stays_away(team: Reported, tmp_path: Path) -> None:
    proxy = proxy_of(team)
    team.job("followed")
    said: list[str] = []
    clock = iter(range(0, 100_000, 100))
    with serve_api(proxy):
        kubeconfig = team.kubeconfig(tmp_path, "follower", ALL, server=proxy.url)
        cluster = Cluster.connect(kubeconfig=str(kubeconfig))
        jobs = follow_job(cluster, "followed", say=said.append, sleep=lambda _: None, monotonic=lambda: next(clock))
        assert next(jobs).phase == "Pending"
        team.report("followed", "Training")
        assert next(jobs).phase == "Training"
        proxy.cut()
        team.report("followed", "Suspended")
        assert next(jobs).phase == "Suspended"
        away = iter([Reply(503), Reply(429), Reply(500)])
        proxy.weather = lambda _request: next(away, None)
        proxy.cut()
        team.report("followed", "Training")
        assert next(jobs).phase == "Training"
        assert next(away, None) is None
        proxy.fall()
        before = len(said)
        with pytest.raises(UnreachableError, match="Connection refused"):
            next(jobs)
    assert len(said) == before + 1
    assert said[-1].endswith(f"trying again for {PATIENCE_SECONDS / 60:.0f} minutes")
