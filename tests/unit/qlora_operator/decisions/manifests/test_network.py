"""Destinations that the NetworkPolicies leave to the pods of jobs, by the rules of the API."""

from collections.abc import Iterable, Mapping
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, STEP_LABEL
from qlora_api.profile import Profile
from qlora_operator.decisions.manifests.environment import identity_labels
from qlora_operator.decisions.manifests.network import Dns, JobNetworkPolicies, build_policies
from qlora_operator.decisions.manifests.objects import build_peer_policy
from tests.support.builders import NAME, PROFILE, UID, make_job

Object = dict[str, Any]
Target = str | Mapping[str, str]
"""An address outside the cluster, or the labels of a pod, with those of its namespace."""

# The ends of 169.254.0.0/16, and the servers of metadata, which give a node's credentials to each pod that asks.
METADATA = (
    *("169.254.0.0", "169.254.169.254", "169.254.170.2", "169.254.255.255", "100.100.100.200", "168.63.129.16"),
    *("fe80::1", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254"),
)
SERVER = "192.0.2.7"
_SYSTEM = {"kubernetes.io/metadata.name": "kube-system"}
DNS_POD, NODE_LOCAL_POD = {**_SYSTEM, "k8s-app": "kube-dns"}, {**_SYSTEM, "k8s-app": "node-local-dns"}
NODE_LOCAL = "169.254.20.10"
FALSE_DNS: tuple[Target, ...] = (SERVER, {"kubernetes.io/metadata.name": "team", "k8s-app": "kube-dns"}, *METADATA)
"""Where an attacker's server may answer at port 53, in the cluster or not."""


def profile(**keys: Any) -> Profile:
    return Profile.model_validate(PROFILE.dump() | keys)


def pod(step: Any, made_for: Profile = PROFILE) -> dict[str, str]:
    """The labels of the pod of a step."""
    return {JOB_LABEL: NAME, JOB_UID_LABEL: UID, STEP_LABEL: step} | identity_labels(made_for, step)


def policies(*profiles: Profile, **settings: Any) -> list[Object]:
    return build_policies(JobNetworkPolicies.model_validate(settings), profiles or (PROFILE,))


def reaches(found: Iterable[Object], labels: Mapping[str, str], target: Target, port: int, protocol: str) -> bool:
    rules = [rule for each in found if _selects(each["spec"]["podSelector"], labels) for rule in _egress(each)]
    return any(
        {"port": port, "protocol": protocol} in rule["ports"] and any(_admits(peer, target) for peer in rule["to"])
        for rule in rules
        if "ports" in rule
    )


def _egress(policy: Object) -> list[Object]:
    assert "Egress" in policy["spec"]["policyTypes"]
    return list(policy["spec"]["egress"])


def _selects(selector: Object, labels: Mapping[str, str]) -> bool:
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    listed = selector.get("matchExpressions", ())
    return wanted and all(
        each["key"] in labels and labels[each["key"]] in each.get("values", labels.values()) for each in listed
    )


def _admits(peer: Object, target: Target) -> bool:
    if isinstance(target, str):
        block = peer.get("ipBlock")
        if block is None:
            return False
        inside = [ip_address(target) in ip_network(each) for each in (block["cidr"], *block.get("except", ()))]
        return inside[0] and not any(inside[1:])
    selectors = [peer[key] for key in ("namespaceSelector", "podSelector") if key in peer]
    return bool(selectors) and all(_selects(each, target) for each in selectors)


def test_train_and_clean_reach_nothing_and_no_pod_is_reached() -> None:
    found = policies(profile(hubEndpoint="http://hub.example.org:8080"))
    for step in ("train", "clean"):
        targets = [(target, port) for target in (SERVER, DNS_POD, NODE_LOCAL) for port in (53, 80, 443, 8080)]
        assert [each for each in targets if reaches(found, pod(step), *each, "TCP")] == []
    closed = [each["spec"] for each in found if "Ingress" in each["spec"]["policyTypes"]]
    assert [each["ingress"] for each in closed] == [[]]
    assert _selects(closed[0]["podSelector"], pod("train"))


@pytest.mark.parametrize("step", ["prepare", "publish"])
def test_names_are_resolved_by_the_dns_pods_and_by_no_other_server(step: str) -> None:
    found = policies()
    for protocol in ("UDP", "TCP"):
        for target in (DNS_POD, NODE_LOCAL_POD, NODE_LOCAL):
            assert reaches(found, pod(step), target, 53, protocol)
        assert [each for each in FALSE_DNS if reaches(found, pod(step), each, 53, protocol)] == []


def test_the_pods_of_several_nodes_reach_the_dns_pods_and_one_another() -> None:
    policy = build_peer_policy(make_job(resources={"nodes": 2}), Dns())
    labels = pod("train")
    assert reaches([policy], labels, DNS_POD, 53, "UDP")
    assert [each for each in FALSE_DNS if reaches([policy], labels, each, 53, "TCP")] == []
    assert not reaches([policy], labels, DNS_POD, 443, "TCP")
    (peers,) = [rule["to"] for rule in policy["spec"]["egress"] if "ports" not in rule]
    assert [peer for peer in peers if _admits(peer, labels)] == peers
    assert not any(_admits(peer, labels | {JOB_UID_LABEL: "another"}) for peer in peers)


@pytest.mark.parametrize(
    ("keys", "ports"),
    [
        ({}, {443}),
        ({"hubEndpoint": "http://hub:8080", "objectStore": {"endpoint": "http://s3.example.org"}}, {8080, 80}),
        ({"hubEndpoint": "https://[::1]:9"}, {9, 443}),
        ({"hubEndpoint": "https://hub:port"}, {443}),
        ({"registries": ["r.example.org", "http://r.example.org:5000", "r.example.org:6000"]}, {443, 5000, 6000}),
        ({"tracking": {"mlflow": {"url": "https://mlflow.example.org:7000/team"}}}, {443, 7000}),
        ({"googleStorage": {"endpoint": "http://gcs.example.org:4443"}}, {443, 4443}),
        ({"azureStorage": {"account": "team", "endpoint": "https://blob.example.org:10000"}}, {443, 10000}),
        ({"httpsProxy": "http://proxy.example.org:3128"}, {443, 3128}),
    ],
)
def test_prepare_and_publish_reach_the_ports_of_the_profiles_servers(keys: Any, ports: set[int]) -> None:
    found = policies(profile(**keys), ports=[3129])
    every = (9, 53, 80, 443, 3128, 3129, 4443, 5000, 6000, 7000, 8080, 10000)
    assert {port for port in every if reaches(found, pod("prepare"), SERVER, port, "TCP")} == ports | {3129}
    assert not any(reaches(found, pod("prepare"), SERVER, port, "UDP") for port in every)


def test_a_cloud_without_an_endpoint_of_its_own_is_reached_by_https() -> None:
    plain = {"hubEndpoint": "http://hub.example.org", "objectStore": {"endpoint": "http://s3.example.org"}}
    for keys, is_reached in (({}, False), ({"azureStorage": {"account": "team"}}, True), ({"googleStorage": {}}, True)):
        assert reaches(policies(profile(**plain, **keys)), pod("publish"), SERVER, 443, "TCP") == is_reached


def test_only_pods_with_an_identity_reach_the_source_of_its_credentials() -> None:
    accounts = {each: {"provider": each, "serviceAccountName": "qlora"} for each in ("google", "aws", "azure")}
    profiles = {name: profile(cloudIdentity=account) for name, account in accounts.items()}
    found = policies(PROFILE, *profiles.values())
    for name, own in (("google", "169.254.169.254"), ("aws", "169.254.170.23"), ("azure", "")):
        labels = pod("prepare", profiles[name])
        assert [each for each in ("169.254.169.254", "169.254.170.23") if reaches(found, labels, each, 80, "TCP")] == (
            [own] if own else []
        )
    assert reaches(found, pod("publish", profiles["google"]), "169.254.169.252", 988, "TCP")
    for labels in (pod("prepare"), pod("train", profiles["google"])):
        assert [each for each in METADATA if reaches(found, labels, each, 80, "TCP")] == []


def test_the_administrator_names_servers_and_the_dns_of_another_platform() -> None:
    openshift = {"kubernetes.io/metadata.name": "openshift-dns"}
    dns = {"ports": [5353], "to": [{"namespaceSelector": {"matchLabels": openshift}}]}
    found = policies(servers=[{"cidr": "192.0.2.0/24", "except": ["192.0.2.1/32"]}], dns=dns)
    labels = pod("prepare")
    assert [each for each in (SERVER, "192.0.2.1", "198.51.100.1") if reaches(found, labels, each, 443, "TCP")] == [
        SERVER
    ]
    assert reaches(found, labels, openshift, 5353, "UDP")
    assert not reaches(found, labels, openshift, 53, "UDP")
    assert not reaches(found, labels, DNS_POD, 5353, "UDP")


@pytest.mark.parametrize("peer", [{}, {"ipBlock": {"cidr": "192.0.2.0/24"}, "podSelector": {}}])
def test_a_peer_that_would_admit_anything_or_nothing_is_rejected(peer: Object) -> None:
    with pytest.raises(ValidationError, match="set one kind"):
        JobNetworkPolicies.model_validate({"dns": {"to": [peer]}})
