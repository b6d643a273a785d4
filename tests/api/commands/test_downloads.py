"""`qlora adapter`, `report` and `compare` over claims, with a real API server."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from devcluster.controlplane import ControlPlane
from qlora_cli.__main__ import main
from qlora_client import ClusterBackendConfig, QLoRAClient, Row
from tests.support.cluster.claim_node import ClaimNode, claim_node
from tests.support.cluster.reported import Reported, progress, reported
from tests.support.commands.typed import typed
from tests.support.waiting import eventually

NAMESPACE = "downloads"
WEIGHTS = bytes(range(256)) * 4000
PROFILE = {"image": "registry.example.org/qlora-trainer:1", "runAs": {"user": 10001, "group": 10001, "fsGroup": 10001}}
READER = {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "delete"]}
EXEC = {"apiGroups": [""], "resources": ["pods/exec"], "verbs": ["create", "get"]}
REVISIONS = {"apiGroups": ["apps"], "resources": ["controllerrevisions"], "verbs": ["get"]}
JOBS = {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["get"]}


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    with reported(plane, tmp_path_factory.mktemp("kubelet"), NAMESPACE) as team:
        # As strict as tenants have it: the pods of readers must be admitted.
        plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
        yield team


@pytest.fixture(scope="module")
def node(team: Reported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClaimNode]:
    with claim_node(team.plane, tmp_path_factory.mktemp("node"), NAMESPACE) as node:
        yield node


@pytest.fixture(autouse=True)
def _as_it_was(node: ClaimNode) -> Iterator[None]:
    yield
    node.hold, node.instead = False, None


def described(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


def ended_job(team: Reported, node: ClaimNode, folder: Path, name: str, **spec: Any) -> Path:
    """A succeeded job with its workspace on the claim NAME; returns its folder there."""
    body = team.job(name, spec)
    workspace = folder / name / "work"
    node.claims[name] = folder / name
    contents = {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": b"{}", "README.md": b"# card"}
    (workspace / "adapter").mkdir(parents=True)
    for file, content in contents.items():
        (workspace / "adapter" / file).write_bytes(content)
    manifest = {"files": {file: described(content) for file, content in contents.items()}}
    (workspace / "adapter" / "manifest.json").write_text(json.dumps(manifest))
    (workspace / "report").mkdir()
    (workspace / "report" / "report.html").write_text("<h1>The report</h1>")
    lines = [{"step": 0, "evalLoss": 3.0}, *({"step": step, "loss": 3 - step / 50} for step in range(1, 101))]
    (workspace / "report" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    team.report(
        name,
        "Succeeded",
        progress={"step": 100, "totalSteps": 100, "loss": 1.0, "evalLoss": 1.25},
        adapter={
            "uri": f"pvc://{name}/work/adapter",
            "sha256": described(WEIGHTS)["sha256"],
            "sizeBytes": len(WEIGHTS),
            "baseModel": "hf://org/model",
            "baseRevision": "c0ffee",
            "rank": 16,
            "quantization": "nf4",
        },
        currentRevision=f"{name}-1",
        workspace={"claimName": name, "path": "work"},
    )
    revision = {"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": f"{name}-1"}, "revision": 1}
    team.create(revision | {"data": {"profile": PROFILE}})
    assert body["metadata"]["name"] == name
    return workspace


def run(team: Reported, *arguments: str, code: int = 0, kubeconfig: Path | None = None) -> str:
    """All that the command prints, which must end with that exit code."""
    options = ("--namespace", NAMESPACE, "--kubeconfig", str(kubeconfig or team.plane.kubeconfig))
    done = CliRunner().invoke(main, [*arguments, *options])
    assert done.exit_code == code, done.output
    return done.output


def test_an_adapter_is_downloaded_with_the_users_own_rights_and_no_pod_is_left(
    team: Reported, node: ClaimNode, tmp_path: Path
) -> None:
    ended_job(team, node, tmp_path, "plain")
    target = tmp_path / "out"
    user = team.kubeconfig(tmp_path, "downloader", JOBS, REVISIONS, READER, EXEC)
    said = run(team, "adapter", "plain", "--output", str(target), kubeconfig=user)
    assert "reading the claim plain through a pod" in said
    assert f"{target}: downloaded, SHA-256 {described(WEIGHTS)['sha256']} as in the status" in said
    assert (target / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert {path.name for path in target.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "manifest.json",
    }
    eventually(lambda: not node.readers(), seconds=30, what="no pod")
    assert "is there already" in run(team, "adapter", "plain", "--output", str(target), kubeconfig=user)


def test_a_program_downloads_compares_and_draws(team: Reported, node: ClaimNode, tmp_path: Path) -> None:
    ended_job(team, node, tmp_path, "drawn", lora={"rank": 8})
    ended_job(team, node, tmp_path, "drawn-too", lora={"rank": 32})
    user = team.kubeconfig(tmp_path, "program", JOBS, REVISIONS, READER, EXEC)
    client = QLoRAClient(ClusterBackendConfig(namespace=NAMESPACE, config_file=user))
    target = client.get_adapter("drawn", tmp_path / "out")
    assert (target / "adapter_model.safetensors").read_bytes() == WEIGHTS
    compared = client.compare("drawn", "drawn-too")
    assert Row("lora.rank", ("8", "32")) in compared.settings
    assert Row("Best held-out loss", ("3.0000 at step 0", "3.0000 at step 0")) in compared.results
    axes = Figure().add_subplot()
    assert client.plot("drawn", "drawn-too", axes=axes) is axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["drawn", "drawn-too"]
    assert list(axes.lines[0].get_ydata())[:2] == [2.98, 2.96]
    eventually(lambda: not node.readers(), seconds=30, what="no pod")


def test_ctrl_c_deletes_the_pod(team: Reported, node: ClaimNode, tmp_path: Path) -> None:
    ended_job(team, node, tmp_path, "interrupted")
    node.hold = True
    options = ("--namespace", NAMESPACE, "--kubeconfig", str(team.plane.kubeconfig), "--output", str(tmp_path / "out"))
    with typed("adapter", "interrupted", *options, terminal=False) as command:
        eventually(node.readers, seconds=60, what="the pod")
        command.interrupt()
        assert command.end() != 0
    assert "Traceback" not in command.shown
    assert not node.readers()
    assert not (tmp_path / "out").exists()


def test_a_report_is_saved(team: Reported, node: ClaimNode, tmp_path: Path) -> None:
    ended_job(team, node, tmp_path, "told")
    target = tmp_path / "report.html"
    assert run(team, "report", "told", "--output", str(target)).splitlines()[-1] == str(target)
    assert target.read_text() == "<h1>The report</h1>"


def test_a_missing_report_is_explained_by_the_jobs_phase(team: Reported, node: ClaimNode, tmp_path: Path) -> None:
    workspace = ended_job(team, node, tmp_path, "early")
    (workspace / "report" / "report.html").unlink()
    team.report("early", "Training")
    said = run(team, "report", "early", "--output", str(tmp_path / "r.html"), code=1)
    assert "Error: early is Training and has no report: it is written when the adapter is published" in said
    team.job("fresh")
    assert "Error: fresh is Pending: the report is written once it is trained" in run(team, "report", "fresh", code=1)


def test_jobs_are_compared_by_their_logs_and_workspaces(team: Reported, node: ClaimNode, tmp_path: Path) -> None:
    ended_job(team, node, tmp_path, "rank-16", lora={"rank": 16})
    job = team.job("rank-64", {"lora": {"rank": 64}})
    team.report("rank-64", "Training", progress={"step": 60, "totalSteps": 100, "loss": 1.5})
    team.plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce-")
    team.pod(job, "rank-64-train-1", "train")
    team.plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    uid = team.pod_uid("rank-64-train-1")
    team.kubelet.logs["rank-64-train-1"].add(*(progress(job, uid, step, 3 - step / 40) for step in range(1, 61)))
    team.start("rank-64-train-1")
    picture = tmp_path / "curves.png"
    said = run(team, "compare", "rank-16", "rank-64", "--picture", str(picture))
    lines = [line.split() for line in said.splitlines()]
    assert ["lora.rank", "16", "64"] in lines
    assert ["Training", "loss", "1.0000", "1.5000"] in lines
    assert ["Optimizer", "steps", "100/100", "60/100"] in lines
    assert ["A", "rank-16"] in lines
    assert ["B", "rank-64"] in lines
    assert "⠒" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The running job's volume may be attached elsewhere, and its log shows the run.
    assert "reading the claim rank-16 through a pod" in said
    listed = json.loads(run(team, "compare", "rank-16", "rank-64", "-o", "json").partition("\n")[2])
    assert listed["losses"]["rank-16"] == {
        "training": {str(step): 3 - step / 50 for step in range(1, 101)},
        "heldOut": {"0": 3.0},
    }
    assert listed["settings"] == {"lora.rank": {"rank-16": "16", "rank-64": "64"}}


def test_a_comparison_without_the_right_to_read_curves_still_has_its_tables(
    team: Reported, node: ClaimNode, tmp_path: Path
) -> None:
    for name in ("left", "right"):
        ended_job(team, node, tmp_path, name)
    user = team.kubeconfig(tmp_path, "reader", JOBS)
    said = run(team, "compare", "left", "right", kubeconfig=user)
    assert "The jobs have the same settings." in said
    assert "the logs of left cannot be read" in said
    assert 'resources: ["pods"], verbs: ["list"]' in said
    assert "Training loss" in said


def test_jobs_that_cannot_be_compared_are_rejected(team: Reported) -> None:
    assert "found 1 different jobs, must be 2 to 12" in run(team, "compare", "plain", "plain", code=2)
    assert 'qlorajobs.qlora.dev "absent" not found' in run(team, "compare", "absent", "other", code=1)
    said = run(team, "compare", "a", "b", "--picture", "curves.pdf", code=1)
    assert "found the picture curves.pdf, must end in .png or .svg" in said
