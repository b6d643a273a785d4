"""Needs of the pods of a job of several nodes: workspace, release, Service, NetworkPolicy."""

from typing import Any

import pytest

from qlora_api.profile import Profile
from qlora_operator.decisions.manifests.network import Dns
from qlora_operator.decisions.manifests.objects import build_job, build_peer_policy, build_peer_service
from tests.support.builders import NAME, PROFILE, UID, follow, make_job, message_of, present, reason_of, resolved
from tests.support.cluster.nodes import INTERRUPTED
from tests.support.job_manifests import environment_of
from tests.support.resolved import DECIDED

SHARED = {"topology": "shared", "accessMode": "ReadWriteMany"}


@pytest.mark.parametrize(
    ("workspace", "claim", "reason"),
    [
        ({}, {}, "WorkspaceNotShared"),
        ({"topology": "shared"}, {}, "WorkspaceNotShared"),
        ({"topology": "shared"}, {"accessModes": ["ReadWriteMany"]}, "Pending"),
        ({"topology": "shared"}, {"claimName": "team"}, "Pending"),
        ({"topology": "zonal"}, {"claimName": "team"}, "WorkspaceNotShared"),
        (SHARED, {}, "Pending"),
        (SHARED, {"accessModes": ["ReadWriteOnce"]}, "WorkspaceNotShared"),
    ],
)
def test_a_job_whose_pods_could_not_share_the_workspace_does_not_start(
    workspace: dict[str, Any], claim: dict[str, Any], reason: str
) -> None:
    profile = Profile.model_validate(PROFILE.dump() | {"workspace": workspace})
    job = make_job(resources={"nodes": 2}, workspace=claim)

    status = follow(job, profiles={"default": profile})

    assert reason_of(status) == reason
    assert (status.resolved is None) == (reason == "WorkspaceNotShared")


def test_the_limit_of_gpus_is_that_of_all_nodes() -> None:
    profile = Profile.model_validate(PROFILE.dump() | {"workspace": SHARED, "limits": {"gpus": 8}})
    job = make_job(resources={"nodes": 4, "gpus": 4})

    status = follow(job, profiles={"default": profile})

    assert reason_of(status) == "LimitExceeded"
    assert "spec.resources.gpus × nodes is 16" in message_of(status)
    job = make_job(resources={"nodes": 2, "gpus": 4})
    assert reason_of(follow(job, profiles={"default": profile})) == "Pending"


@pytest.mark.parametrize(("nodes", "version"), [(None, 2), (1, 2), (2, 3)])
def test_only_a_job_of_several_nodes_needs_a_release_that_supports_them(nodes: int | None, version: int) -> None:
    profile = Profile.model_validate(PROFILE.dump() | {"workspace": SHARED})
    job = make_job(resources={} if nodes is None else {"nodes": nodes}, **DECIDED)

    status = follow(job, profiles={"default": profile})

    assert present(status.resolved).contract_version == version


def train_job(**profile: Any) -> dict[str, Any]:
    job = make_job(resources={"nodes": 2, "gpus": 4}, retry={"maxFailures": 5})
    return build_job(job, resolved(Profile.model_validate(PROFILE.dump() | profile)), "train", 3)


def test_a_train_job_of_several_nodes_is_indexed_and_fails_as_a_whole() -> None:
    body = train_job()
    spec = body["spec"]

    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert spec["backoffLimit"] == 0
    ignored = [rule for rule in spec["podFailurePolicy"]["rules"] if rule["action"] == "Ignore"]
    assert [rule["onExitCodes"]["values"] for rule in ignored] == [[INTERRUPTED]]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert environment_of(body)["QLORA_RENDEZVOUS"] == f"{NAME}-train-3-0.qlora-{UID}:29500"
    index = next(entry for entry in container["env"] if entry["name"] == "QLORA_NODE")
    assert "job-completion-index" in index["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("step", ["prepare", "publish", "clean"])
def test_the_other_steps_stay_one_pod(step: Any) -> None:
    body = build_job(make_job(resources={"nodes": 2}), resolved(), step, 1)

    assert (body["spec"]["completions"], body["spec"]["parallelism"]) == (1, 1)
    assert "completionMode" not in body["spec"]
    assert "QLORA_RENDEZVOUS" not in environment_of(body)


def test_nccls_settings_are_the_profiles_and_only_of_train_pods_that_use_it() -> None:
    settings = {"NCCL_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN"}
    assert environment_of(train_job(nccl=settings)).items() >= settings.items()
    alone = build_job(make_job(), resolved(Profile.model_validate(PROFILE.dump() | {"nccl": settings})), "train", 1)
    assert not environment_of(alone).keys() & settings.keys()
    with pytest.raises(ValueError, match="NCCL_ and capital letters"):
        Profile.model_validate(PROFILE.dump() | {"nccl": {"LD_PRELOAD": "/workspace/evil.so"}})
    with pytest.raises(ValueError, match=r"found NCCL_BLOCKING_WAIT, .* turn off the watchdog"):
        Profile.model_validate(PROFILE.dump() | {"nccl": {"NCCL_BLOCKING_WAIT": "1"}})


def test_the_train_pods_of_a_job_reach_each_other_and_nothing_else() -> None:
    job = make_job(resources={"nodes": 2})
    pod_spec = train_job()["spec"]["template"]
    service, policy = build_peer_service(job), build_peer_policy(job, Dns(ports=(5353,)))

    selectors = [service["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"]]
    for selector in selectors:
        assert pod_spec["metadata"]["labels"].items() >= selector.items()
        assert UID in selector.values()
    assert pod_spec["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    (ingress,) = policy["spec"]["ingress"]
    to_peers, dns = policy["spec"]["egress"]
    assert ingress["from"] == to_peers["to"] == [{"podSelector": {"matchLabels": selectors[0]}}]
    assert {(entry["port"], entry["protocol"]) for entry in dns["ports"]} == {(5353, "UDP"), (5353, "TCP")}
    for manifest in (service, policy):
        assert manifest["metadata"]["ownerReferences"][0]["uid"] == UID
