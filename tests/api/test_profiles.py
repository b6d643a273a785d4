"""Profiles on a real API server: its schema, and what the operator makes of changes."""

import json
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from tests.support.cluster.nodeless import NAMESPACE, Nodeless, profile_objects
from tests.support.job_manifests import POD_OPTIONS, STEPS, build
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually

CPU = {"image": "example.org/qlora-trainer:none", "device": "cpu"}


def apply_profile(plane: ControlPlane, name: str, spec: dict[str, Any], *flags: str) -> dict[str, Any]:
    (profile,) = profile_objects({name: spec})
    arguments = ("apply", "--validate=strict", "--output=json", "--filename=-", *flags)
    return dict(json.loads(plane.kubectl(*arguments, input_text=json.dumps(profile))))


@pytest.mark.parametrize("step", STEPS)
def test_the_api_server_takes_pods_with_every_option(plane: ControlPlane, step: Any) -> None:
    stored = apply_profile(plane, "options", {"image": "example.org/trainer", **POD_OPTIONS}, "--dry-run=server")
    job = build(step, stored["spec"], resources={"nodes": 2})
    job["metadata"]["namespace"] = "default"
    options = ("--dry-run=server", "--validate=strict", "--filename=-")
    plane.kubectl("create", *options, input_text=json.dumps(job))


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "spec.image: Required value"),
        ({"device": "tpu"}, "spec.device: Unsupported value"),
        ({"gpus": 1}, 'unknown field "spec.gpus"'),
        ({"currency": "EUR"}, "gpuHourPrice and currency belong together"),
        ({"noProxy": ["example.org"]}, "noProxy and proxySecretName are for httpsProxy"),
        ({"allowedNamespaces": {}}, "set names, selector, or both"),
        ({"podLabels": {"qlora.dev/job": "other"}}, "are set by the operator and Kubernetes"),
        ({"extraResources": {"cpu": 4}}, "an extended resource is PREFIX/NAME"),
        ({"resourceClaims": [{"name": "a", "resourceClaimTemplateName": "b"}] * 2}, "Duplicate value"),
    ],
)
def test_the_api_server_rejects_a_wrong_profile_by_its_field(plane: ControlPlane, spec: Any, says: str) -> None:
    with pytest.raises(ClusterError) as rejected:
        apply_profile(plane, "wrong", ({"image": "example.org/trainer"} if spec else {}) | spec, "--dry-run=server")
    assert says in str(rejected.value)


def test_a_profile_has_a_name_that_jobs_can_use(plane: ControlPlane) -> None:
    with pytest.raises(ClusterError, match="must be one DNS label"):
        apply_profile(plane, "a.b", CPU, "--dry-run=server")


def submit(cluster: Nodeless, name: str, profile: str) -> None:
    job = MINIMAL | {"metadata": {"name": name, "namespace": NAMESPACE}}
    job["spec"] = job["spec"] | {"scheduling": {"profileName": profile}}
    cluster.kubectl.apply(json.dumps(job))


def wait_for_reason(cluster: Nodeless, name: str, reason: str) -> dict[str, Any]:
    def reached() -> dict[str, Any] | None:
        job = cluster.job(name)
        found = {each["type"]: each["reason"] for each in job["status"].get("conditions", ())}
        return job if found.get("Succeeded") == reason else None

    return eventually(reached, seconds=60, every=0.2, what=f"{name} with the reason {reason}") or {}


def test_a_job_waits_for_its_profile_and_then_for_its_namespaces_label(operated: Nodeless) -> None:
    submit(operated, "early", "late")
    wait_for_reason(operated, "early", "ProfileNotFound")
    admitted = {"selector": {"matchLabels": {"tier": "gold"}}}
    apply_profile(operated.plane, "late", CPU | {"allowedNamespaces": admitted})
    wait_for_reason(operated, "early", "ProfileNotAllowed")
    operated.kubectl("label", "namespace", NAMESPACE, "tier=gold")
    operated.wait_for_phase("early", "Preparing")
    operated.kubectl("label", "namespace", NAMESPACE, "tier-")
    operated.kubectl("wait", "--for=condition=Ready", "qloraprofile/late", "--timeout=60s")


def test_a_job_waits_until_a_node_has_the_driver_that_its_image_needs(operated: Nodeless) -> None:
    pool = {"pool": "driver"}
    labels = pool | {"nvidia.com/cuda.driver-version.major": "570", "nvidia.com/gpu.memory": "46068"}
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "old-gpu", "labels": labels}}
    operated.kubectl.apply(json.dumps(node))
    profile = {"image": CPU["image"], "nodeSelector": pool, "gpuResource": "nvidia.com/gpu"}
    apply_profile(operated.plane, "driver", profile)
    operated.kubectl("wait", "--for=condition=Ready", "qloraprofile/driver", "--timeout=60s")
    submit(operated, "driven", "driver")
    job = wait_for_reason(operated, "driven", "GPUNotSupported")
    messages = {each["type"]: each["message"] for each in job["status"]["conditions"]}
    assert "old-gpu with driver 570, and 580 is needed" in messages["Succeeded"]
    assert operated.children("driven") == []
    operated.kubectl("label", "node", "old-gpu", "--overwrite", "nvidia.com/cuda.driver-version.major=580")
    operated.wait_for_phase("driven", "Preparing")
    operated.kubectl("wait", "--for=jsonpath={.status.gpuMemory}=44Gi", "qloraprofile/driver", "--timeout=60s")
    name = operated.job("driven")["status"]["currentRevision"]
    revision = operated.kubectl.get("controllerrevision", name, f"--namespace={NAMESPACE}")
    assert json.loads(revision["data"]["document"])["spec"]["resources"]["gpuMemory"] == "44Gi"
    operated.kubectl("delete", "node", "old-gpu")


def test_a_pause_stops_a_running_job_and_another_change_does_not(operated: Nodeless) -> None:
    apply_profile(operated.plane, "paused", CPU)
    submit(operated, "held", "paused")
    operated.succeed("held", "prepare")
    pod = operated.pod("held", "train")
    operated.start_pod(pod)
    operated.wait_for_phase("held", "Training")
    apply_profile(operated.plane, "paused", CPU | {"image": "example.org/qlora-trainer:next", "paused": False})
    submit(operated, "next", "paused")
    operated.wait_for_phase("next", "Preparing")
    assert operated.children("held") == ["held-prepare-1", "held-train-1"]
    apply_profile(operated.plane, "paused", CPU | {"paused": True})
    operated.stop_pod(pod, 143)
    job = wait_for_reason(operated, "held", "ProfilePaused")
    assert job["status"]["image"] == CPU["image"]
    eventually(lambda: operated.children("held") == ["held-prepare-1"], seconds=60, what="no Job of held")
    apply_profile(operated.plane, "paused", CPU)
    operated.pod("held", "train")
    assert operated.children("held") == ["held-prepare-1", "held-train-2"]
    assert operated.job("held")["status"]["disruptions"] == 0
