"""`qlora` on a cluster: create, list and change jobs, with few rights and bad networks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from devcluster.controlplane import ControlPlane
from qlora_cli.__main__ import main
from qlora_client.jobs.follow import PATIENCE_SECONDS, follow_job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import RejectedError, UnreachableError
from qlora_client.kube.resources import JOBS
from tests.support.cluster.reported import Reported, reported
from tests.support.manifests import FULL
from tests.support.services.api_proxy import ApiProxy, Reply, serve_api
from tests.support.sweeps import FULL_SWEEP

ALL = {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["*"]}


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    with reported(plane, tmp_path_factory.mktemp("kubelet"), "people") as team:
        yield team


def qlora(kubeconfig: Path, *arguments: str) -> Result:
    """A command that asks the cluster, which never ends with a traceback."""
    result = CliRunner().invoke(main, [*arguments, "--kubeconfig", str(kubeconfig)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def done(team: Reported, *arguments: str) -> str:
    """Output of a command that succeeds, as an administrator."""
    result = qlora(team.plane.kubeconfig, *arguments, "--namespace", team.namespace)
    assert result.exit_code == 0, result.output
    return result.stdout


def denied(team: Reported, *arguments: str) -> str:
    """The only line of a command that fails."""
    result = qlora(team.plane.kubeconfig, *arguments, "--namespace", team.namespace)
    assert (result.exit_code, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    return line


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
    done(team, "submit", "--name", "twice", "--model", "hf://org/m", "--data", "hf://org/rows")
    line = denied(team, "submit", "--name", "twice", "--model", "hf://org/m", "--data", "hf://org/rows")
    assert line == 'Error: qlorajobs.qlora.dev "twice" already exists'


def test_a_job_is_changed_and_another_of_its_name_is_not(team: Reported) -> None:
    """Objects that the server stores; see tests/unit/qlora_cli for the rest."""
    uid = team.job("unwanted")["metadata"]["uid"]
    done(team, "suspend", "unwanted")
    assert team.stored("unwanted")["spec"]["suspend"] is True
    done(team, "cancel", "unwanted", "--yes")
    assert team.stored("unwanted")["spec"]["cancel"] is True
    cluster = Cluster.connect(kubeconfig=str(team.plane.kubeconfig), namespace=team.namespace)
    cluster.delete(JOBS, "unwanted", uid)
    line = denied(team, "cancel", "unwanted", "--yes")
    assert line.startswith('Error: qlorajobs.qlora.dev "unwanted" not found in the namespace people of the context ')
    team.job("unwanted")
    with pytest.raises(RejectedError, match=rf"the UID in the precondition \({uid}\) does not match"):
        cluster.delete(JOBS, "unwanted", uid)
    with pytest.raises(RejectedError, match=uid):
        cluster.merge(JOBS, "unwanted", {"metadata": {"uid": uid}, "spec": {"cancel": True}})
    assert "cancel" not in team.stored("unwanted")["spec"]


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


def proxy_of(team: Reported) -> ApiProxy:
    return ApiProxy(team.plane.server.removeprefix("https://"), team.plane.directory / "certificates" / "ca.crt")


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
