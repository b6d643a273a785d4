"""The API server admits every example, the command line reads those of jobs, and the walk deletes no others."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from examples.walk import preparation
from qlora_cli.manifest import load_manifest
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually

LIST = {"apiVersion": "v1", "kind": "List"}

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml")) + sorted((ROOT / "examples" / "serving").glob("*.yaml"))
JOBS = [path for path in EXAMPLES if "kind: QLoRAJob\n" in path.read_text()]


@pytest.fixture(scope="module")
def with_kserve(plane: ControlPlane) -> ControlPlane:
    """The API server with KServe's kinds too, as far as the examples use them."""
    definitions = list(yaml.safe_load_all((ROOT / "tests" / "support" / "kserve" / "crds.yaml").read_text()))
    plane.kubectl("apply", "--server-side", "--filename=-", input_text=json.dumps({"items": definitions} | LIST))
    for kind in ("inferenceservices", "llminferenceservices"):
        eventually(partial(plane.kubectl, "get", kind, "--output=json"), seconds=60, what=kind)
    return plane


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_admitted(with_kserve: ControlPlane, path: Path) -> None:
    manifest = path.read_text().replace("namespace: demo", "namespace: default")
    admitted = ("apply", "--dry-run=server", "--validate=strict", "--filename=-")
    assert "created" in with_kserve.kubectl(*admitted, input_text=manifest)


def test_an_unknown_field_of_a_server_is_rejected(with_kserve: ControlPlane) -> None:
    path = ROOT / "examples" / "serving" / "kserve-llminferenceservice.yaml"
    manifest = path.read_text().replace("maxRank:", "maxLoraRank:")
    with pytest.raises(ClusterError, match=r'unknown field "spec\.model\.lora\.maxLoraRank"'):
        with_kserve.kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", input_text=manifest)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_an_example_is_read_by_the_command_line(path: Path) -> None:
    assert load_manifest(path).spec


def test_the_walk_deletes_no_job_of_another_namespace(plane: ControlPlane) -> None:
    own, work = preparation.NAMESPACE, "work-of-a-user"
    # Other tests have left some.
    plane.kubectl("delete", "qlorajobs,qlorasweeps", "--all", "--all-namespaces")
    for namespace in (own, work):
        plane.kubectl("create", "namespace", namespace)
    try:
        job = json.dumps(MINIMAL | {"metadata": {"name": "tune"}})
        plane.kubectl("apply", f"--namespace={own}", "--filename=-", input_text=job)
        preparation.reject_work(plane.kubectl)
        plane.kubectl("apply", f"--namespace={work}", "--filename=-", input_text=job)
        with pytest.raises(ClusterError, match=rf"has other jobs or sweeps \({work}/tune\).*`make cluster-down`"):
            preparation.reject_work(plane.kubectl)
    finally:
        # Without a controller a namespace stays, and the other tests list all jobs.
        for namespace in (own, work):
            plane.kubectl("delete", "qlorajobs", "--all", f"--namespace={namespace}")
