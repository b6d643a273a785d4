"""Helm waits for a job in a chart until it has started, as Flux does without expressions."""

import json
from pathlib import Path

import pytest

from devcluster import toolchain
from devcluster.errors import ClusterError
from devcluster.layout import from_environment
from devcluster.processes import run
from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.manifests import MINIMAL, Manifest, with_value


def install(cluster: Nodeless, folder: Path, manifest: Manifest, timeout: str = "60s") -> str:
    """Install a chart with this job as a release of the same name."""
    name = manifest["metadata"]["name"]
    (folder / "templates").mkdir()
    (folder / "Chart.yaml").write_text(json.dumps({"apiVersion": "v2", "name": name, "version": "0.1.0"}))
    (folder / "templates" / "job.yaml").write_text(json.dumps(manifest))
    helm = toolchain.built(from_environment(), ["helm"])["helm"]
    options = ["--namespace", NAMESPACE, "--wait", "--timeout", timeout]
    return run([helm, "--kubeconfig", cluster.kubectl.kubeconfig, "install", name, folder, *options], seconds=120)


def named(name: str) -> Manifest:
    return MINIMAL | {"metadata": {"name": name, "namespace": NAMESPACE}}


def test_an_installation_ends_when_the_job_has_started(operated: Nodeless, tmp_path: Path) -> None:
    assert "STATUS: deployed" in install(operated, tmp_path, named("helm-started"))
    assert operated.job("helm-started")["status"]["phase"] == "Preparing"


def test_an_installation_of_a_suspended_job_ends(operated: Nodeless, tmp_path: Path) -> None:
    assert "STATUS: deployed" in install(operated, tmp_path, with_value(named("helm-suspended"), "spec.suspend", True))


def test_an_installation_of_a_job_that_cannot_start_fails_and_names_it(operated: Nodeless, tmp_path: Path) -> None:
    unknown = with_value(named("helm-waiting"), "spec.scheduling.profileName", "h100")
    with pytest.raises(ClusterError, match=r"QLoRAJob/team/helm-waiting not ready. status: InProgress"):
        install(operated, tmp_path, unknown, timeout="3s")
