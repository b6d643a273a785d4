"""Pod options of a profile: which pods get them, and what a tenant's job cannot change."""

from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.profile import Profile
from qlora_operator.decisions.usage.usage import gpus_of_a_pod
from tests.support.builders import make_job, resolved, status_in
from tests.support.job_manifests import POD_OPTIONS, build, container_of, pod_of


def test_where_train_runs_also_prepare_and_publish_run_unless_the_workspace_is_shared() -> None:
    fields = {"schedulerName", "affinity", "nodeSelector"}
    for step, topology, found in (("train", "shared", True), ("publish", "zonal", True), ("prepare", "shared", False)):
        pod = pod_of(build(step, POD_OPTIONS | {"workspace": {"topology": topology}}))  # type: ignore[arg-type]
        assert fields.issubset(pod) == found
        assert fields.isdisjoint(pod) != found


def test_devices_are_for_train_only() -> None:
    train, prepare = build("train", POD_OPTIONS), build("prepare", POD_OPTIONS)
    claims = [{"name": "nics", "resourceClaimTemplateName": "fast-nics"}]
    assert pod_of(train)["resourceClaims"] == claims
    given = container_of(train)["resources"]
    assert given["claims"] == [{"name": "nics"}]
    assert given["limits"] | {"rdma/hca": "2", "nvidia.com/gpu": "1"} == given["limits"]
    given = container_of(prepare)["resources"]
    assert (given.keys(), "resourceClaims" in pod_of(prepare)) == ({"requests", "limits"}, False)
    assert given["limits"].keys() == {"memory"}


def test_the_pods_of_several_nodes_are_spread_and_no_others() -> None:
    assert "topologySpreadConstraints" not in pod_of(build("train", POD_OPTIONS))
    (spread,) = pod_of(build("train", POD_OPTIONS, resources={"nodes": 2}))["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].keys() == {"qlora.dev/job-uid", "qlora.dev/step"}
    assert (spread["topologyKey"], spread["maxSkew"], spread["whenUnsatisfiable"]) == ("rack", 1, "DoNotSchedule")


@pytest.mark.parametrize("step", ["prepare", "train", "publish", "clean"])
def test_labels_and_annotations_are_on_every_pod_beside_the_operators(step: Any) -> None:
    plain, given = (build(step, profile)["spec"]["template"]["metadata"] for profile in ({}, POD_OPTIONS))
    assert given["labels"] == plain["labels"] | {"cost-center": "42"}
    assert given["annotations"] == plain["annotations"] | {"k8s.v1.cni.cncf.io/networks": "rdma"}


@pytest.mark.parametrize(
    "options",
    [
        {"podLabels": {"qlora.dev/job": "other"}},
        {"podLabels": {"kueue.x-k8s.io/queue-name": "gpus"}},
        {"podAnnotations": {"karpenter.kubernetes.io/x": "y"}},
        {"extraResources": {"cpu": 4}},
        {"extraResources": {"rdma/hca": 0}},
        {"resourceClaims": [{"name": "a", "resourceClaimTemplateName": "b"}] * 2},
        {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}}},
    ],
)
def test_options_that_break_the_operators_pods_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Profile.model_validate({"image": "trainer", **options})


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 4), ("cpu", 0)])
def test_gpus_that_a_claim_gives_are_counted(device: str, gpus: int) -> None:
    claim = {"name": "gpus", "resourceClaimTemplateName": "gpus"}
    profile = Profile.model_validate({"image": "trainer", "device": device, "resourceClaims": [claim]})
    status = status_in("train", resolved=resolved(profile).dump())
    assert gpus_of_a_pod(make_job(status, resources={"gpus": 4}), status) == gpus
