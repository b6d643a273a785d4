"""`qlora doctor` with a real API server: before and after installation, with few rights."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from devcluster.controlplane import ControlPlane
from qlora_api.profile import PROFILE_KIND
from qlora_cli.__main__ import main
from tests.support.cluster.nodeless import DEFAULT_PROFILE, apply_definitions
from tests.support.cluster.reported import Reported, reported
from tests.support.tenancy.tenancy import OPERATOR_NAMESPACE, rendered

NAMESPACE = "examined"
GPUS = "nvidia.com/gpu"
PROFILES = {
    "default": {"image": "registry.example.org/qlora-trainer:0.1.0"},
    "large": {"resources": {"train": {"memory": "200Gi"}}},
}
RIGHTS_TO_LIST = {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["get", "list", "watch"]}


@pytest.fixture(scope="module")
def team(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reported]:
    with reported(plane, tmp_path_factory.mktemp("kubelet"), NAMESPACE) as team:
        yield team
    plane.kubectl("delete", "node/gpu-1", "storageclass/fast", "qloraprofile/large", "--ignore-not-found")
    apply_definitions(plane, default=DEFAULT_PROFILE)
    for one in ("deployment/qlora-operator", "lease/qlora-operator"):
        plane.kubectl("delete", one, f"--namespace={OPERATOR_NAMESPACE}", "--ignore-not-found")


def examine(team: Reported, *options: str, code: int, kubeconfig: Path | None = None) -> dict[str, dict[str, str]]:
    """The checks by name, of a doctor that ends with that exit code."""
    where = ("--namespace", NAMESPACE, "--kubeconfig", str(kubeconfig or team.plane.kubeconfig))
    done = CliRunner().invoke(main, ["doctor", *where, "-o", "json", *options])
    assert done.exit_code == code, done.output
    answer = json.loads(done.output)
    assert answer["ready"] is (code == 0)
    return {check["name"]: check for check in answer["checks"]}


def install(plane: ControlPlane) -> None:
    """Apply the chart's objects with controllers' statuses, and a node with GPUs."""
    plane.kubectl.apply(json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPERATOR_NAMESPACE}}))
    objects = [each for each in rendered({"profiles": PROFILES}) if each["kind"] in ("Deployment", PROFILE_KIND)]
    plane.kubectl.apply(yaml.safe_dump_all(objects))
    patch_status(plane, "deployment", "qlora-operator", {"replicas": 1, "readyReplicas": 1}, OPERATOR_NAMESPACE)
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"
    spec = {"holderIdentity": "pod-1", "leaseDurationSeconds": 300, "renewTime": now}
    metadata = {"name": "qlora-operator", "namespace": OPERATOR_NAMESPACE}
    plane.kubectl.apply(
        json.dumps({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec})
    )
    labels = {"nvidia.com/gpu.present": "true"}
    plane.kubectl.apply(
        json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "gpu-1", "labels": labels}})
    )
    conditions = [{"type": "Ready", "status": "True", "reason": "Ready", "message": ""}]
    amounts = {GPUS: "4", "cpu": "64", "memory": "256Gi"}
    patch_status(plane, "node", "gpu-1", {"conditions": conditions, "allocatable": amounts, "capacity": amounts})
    # The test has no agent that marks the node as reachable.
    plane.kubectl("patch", "node", "gpu-1", "--type=merge", '--patch={"spec": {"taints": null}}')
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    plane.kubectl.apply(
        json.dumps(
            {
                "apiVersion": "storage.k8s.io/v1",
                "kind": "StorageClass",
                "metadata": {"name": "fast", "annotations": annotations},
                "provisioner": "csi.example.org",
                "volumeBindingMode": "WaitForFirstConsumer",
            }
        )
    )


def patch_status(plane: ControlPlane, kind: str, name: str, status: dict[str, Any], namespace: str = "default") -> None:
    options = ("--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}")
    plane.kubectl("patch", kind, name, f"--namespace={namespace}", *options)


def test_a_cluster_becomes_ready(team: Reported) -> None:
    before = examine(team, code=1)
    assert before["Kubernetes"]["verdict"] == before["Definitions"]["verdict"] == "ok"
    assert before["Operator"]["message"] == "there is no Deployment of the operator: install its chart"
    install(team.plane)
    after = examine(team, code=0)
    assert {name for name, check in after.items() if check["verdict"] != "ok"} == set()
    assert after["Profile default: nodes"]["message"] == f"1 node with 4 {GPUS} in all, and 4 on the largest"
    assert after["Profile large: storage"]["message"].startswith("the StorageClass fast makes its workspaces")


def test_an_admission_problem_is_found_without_creating_a_pod(team: Reported) -> None:
    install(team.plane)
    limits = {"limits": [{"type": "Container", "max": {"memory": "100Gi"}}]}
    team.create({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small"}, "spec": limits})
    try:
        checks = examine(team, code=1)
    finally:
        team.kubectl("delete", "limitrange", "small")
    assert checks["Admission, profile default"]["verdict"] == "ok"
    refused = checks["Admission, profile large"]
    assert refused["verdict"] == "problem"
    assert "maximum memory usage per Container is 100Gi" in refused["message"]
    assert "takes 200Gi: raise it" in checks["LimitRange small"]["message"]
    assert team.kubectl("get", "pods", "--output=name") == ""


def test_a_user_who_may_only_list_jobs_gets_the_missing_rules(team: Reported, tmp_path: Path) -> None:
    user = team.kubeconfig(tmp_path, "newcomer", RIGHTS_TO_LIST)
    checks = examine(team, code=0, kubeconfig=user)
    assert {check["verdict"] for check in checks.values()} == {"ok", "unknown", "warning"}
    assert {name for name, check in checks.items() if check["verdict"] == "ok"} == {
        "Kubernetes",
        "Definitions",
        "Jobs seen",
    }
    assert checks["Operator"]["message"] == (
        'you may not list deployments: a Role with the rule {apiGroups: ["apps"], resources: ["deployments"], verbs: '
        f'["list"]}} helps in {OPERATOR_NAMESPACE}, if that is where the operator runs (--operator-namespace)'
    )
    assert (
        'resources: ["qlorajobs"], verbs: ["create", "patch"]'
        in (checks["Your rights: submit, suspend, resume, retry and cancel jobs"]["message"])
    )


def test_the_table_has_a_line_for_each_check_and_the_counts(team: Reported) -> None:
    install(team.plane)
    where = ("--namespace", NAMESPACE, "--kubeconfig", str(team.plane.kubeconfig))
    done = CliRunner().invoke(main, ["doctor", *where])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert lines[0].split()[:2] == ["ok", "Kubernetes"]
    assert lines[-1] == f"{len(lines) - 2} ok"
