"""Objects of the chart, rendered by real Helm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.errors import ClusterError
from devcluster.product import ANY_MACHINE, SMALL_MACHINE
from qlora_api.naming import CLOUD_IDENTITY_LABEL, JOB_LABEL, STEP_LABEL
from qlora_operator.settings import Settings, load_settings
from tests.support.cluster.chart import (
    CHART,
    NAMESPACE,
    NVIDIA_LABEL,
    OWN_RIGHTS,
    RELEASE,
    RIGHTS,
    ROOT,
    SERVICE_ACCOUNT,
    Helm,
    Object,
    only,
    rights_of,
    settings_in,
    settings_of,
)


def test_helm_lint_passes(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


def definitions_in(objects: list[Object]) -> list[Object]:
    found = [each for each in objects if each["kind"] == "CustomResourceDefinition"]
    return sorted(found, key=lambda definition: str(definition["metadata"]["name"]))


def test_the_definition_is_that_of_the_models_and_outlives_the_release(helm: Helm) -> None:
    rendered = definitions_in(helm.template())
    annotations = [definition["metadata"].pop("annotations") for definition in rendered]
    assert rendered == [yaml.safe_load(file.read_text()) for file in sorted((ROOT / "crds").glob("*.yaml"))]
    assert annotations == [{"helm.sh/resource-policy": "keep"}] * 2

    unkept = definitions_in(helm.template({"crds": {"keep": False}}))
    assert ["annotations" in definition["metadata"] for definition in unkept] == [False, False]
    kinds = {document["kind"] for document in helm.template({"crds": {"install": False}})}
    assert "CustomResourceDefinition" not in kinds


def test_cluster_wide_rights_are_exactly_those_that_the_operator_uses(helm: Helm) -> None:
    objects = helm.template({"tenantRoles": {"create": False}})
    assert rights_of(only(objects, "ClusterRole")["rules"]) == RIGHTS
    with_kueue = only(helm.template({"tenantRoles": {"create": False}, "kueue": {"enabled": True}}), "ClusterRole")
    assert rights_of(with_kueue["rules"]) == RIGHTS | {"workloads.kueue.x-k8s.io": {"list"}}
    binding = only(objects, "ClusterRoleBinding")
    assert binding["roleRef"]["name"] == only(objects, "ClusterRole")["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": RELEASE, "namespace": NAMESPACE}]


def test_a_policy_restricts_the_cluster_wide_right_to_announce(helm: Helm) -> None:
    announcing = {"tenantRoles": {"create": False}, "announce": {"enabled": True}}
    objects = helm.template(announcing)
    assert rights_of(only(objects, "ClusterRole")["rules"]) == RIGHTS | {"configmaps": {"create", "patch"}}
    policy = only(objects, "ValidatingAdmissionPolicy")
    assert only(objects, "ValidatingAdmissionPolicyBinding")["spec"]["policyName"] == policy["metadata"]["name"]
    assert SERVICE_ACCOUNT in policy["spec"]["matchConditions"][0]["expression"]
    namespaced = helm.template(announcing | {"namespaces": ["team-a"], "crds": {"install": False}})
    assert "ValidatingAdmissionPolicy" not in {document["kind"] for document in namespaced}


def test_without_progress_the_operator_may_not_read_logs(helm: Helm) -> None:
    objects = helm.template({"tenantRoles": {"create": False}, "settings": {"progress": {"enabled": False}}})
    assert rights_of(only(objects, "ClusterRole")["rules"]) == {
        name: RIGHTS[name] for name in RIGHTS if name != "pods/log"
    }


def test_namespaced_installation_has_a_role_per_namespace_and_none_in_the_cluster(helm: Helm) -> None:
    objects = helm.template({"namespaces": ["team-a", "team-b"], "crds": {"install": False}})
    kinds = {document["kind"] for document in objects}
    assert not [kind for kind in kinds if kind.startswith("Cluster") or kind == "CustomResourceDefinition"]
    assert all(document["metadata"]["namespace"] for document in objects)
    for kind in ("Role", "RoleBinding"):
        found = [document["metadata"]["namespace"] for document in objects if document["kind"] == kind]
        assert sorted(found) == [NAMESPACE, "team-a", "team-b"]
    for role in objects:
        if role["kind"] == "Role":
            expected = OWN_RIGHTS if role["metadata"]["namespace"] == NAMESPACE else RIGHTS
            assert rights_of(role["rules"]) == expected
    assert settings_of(objects)["namespaces"] == ["team-a", "team-b"]


def test_the_operator_gets_the_dns_ports_for_its_policies(helm: Helm) -> None:
    assert settings_of(helm.template({}))["dnsPorts"] == [53]
    assert settings_of(helm.template({"jobNetworkPolicies": {"dnsPorts": [5353]}}))["dnsPorts"] == [5353]


def test_a_profile_inherits_omitted_fields_from_the_default_profile(helm: Helm) -> None:
    values: Object = {
        "trainer": {"image": {"repository": "registry.example/trainer", "digest": f"sha256:{'0' * 64}"}},
        "profiles": {
            "default": {"workspace": {"size": "80Gi"}},
            "laptop": {"device": "cpu", "gpuResource": None, "image": "registry.example/other:1"},
            "shared": {"modelCache": {"claimName": "model-cache"}},
        },
    }
    profiles = settings_of(helm.template(values))["profiles"]
    assert profiles["default"] == {
        "image": f"registry.example/trainer@sha256:{'0' * 64}",
        "device": "cuda",
        "gpuResource": "nvidia.com/gpu",
        "nodeSelector": NVIDIA_LABEL,
        "runAs": {"user": 10001, "group": 10001, "fsGroup": 10001},
        "workspace": {"size": "80Gi"},
    }
    inherited = {key: value for key, value in profiles["default"].items() if key != "nodeSelector"}
    assert profiles["laptop"] == inherited | values["profiles"]["laptop"], "without GPUs it needs no label of GPU nodes"
    assert profiles["shared"] == profiles["default"] | values["profiles"]["shared"]


def test_the_operator_reads_its_settings_and_listens_on_the_deployments_ports(helm: Helm, tmp_path: Path) -> None:
    def settings(values: Object) -> tuple[Settings, Object]:
        objects = helm.template(values)
        file = tmp_path / "settings.yaml"
        template = only(objects, "Deployment")["spec"]["template"]
        file.write_text(settings_in(template))
        return load_settings(file), template["spec"]["containers"][0]

    default, container = settings({})
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"probes": default.probe_port, "metrics": default.metrics_port}
    chosen = Settings.model_validate({"profiles": default.profiles, "leaderElection": {"enabled": True}})
    assert default == chosen, "the chart's defaults are the operator's"

    # An OpenShift identity, which a template could turn into 1.00071e+09.
    changed, _ = settings(
        {
            "settings": {"progress": {"enabled": False}, "resyncSeconds": 60, "workers": 2, "logLevel": "debug"},
            "profiles": {"default": {"runAs": {"user": 1000710000}}},
        }
    )
    assert (changed.progress.enabled, changed.resync_seconds, changed.workers, changed.log_level) == (
        False,
        60,
        2,
        "debug",
    )
    identity = changed.profiles["default"].run_as
    assert identity is not None
    assert (identity.user, identity.fs_group) == (1000710000, 10001)


def test_one_operator_is_replaced_without_a_gap_and_several_are_kept_apart(helm: Helm) -> None:
    objects = helm.template()
    deployment = only(objects, "Deployment")["spec"]
    assert deployment["replicas"] == 1
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "affinity" not in deployment["template"]["spec"]
    # It would block every drain of the only operator's node.
    assert "PodDisruptionBudget" not in {document["kind"] for document in objects}

    objects = helm.template({"replicas": 2})
    deployment = only(objects, "Deployment")["spec"]
    assert deployment["replicas"] == 2
    terms = deployment["template"]["spec"]["affinity"]["podAntiAffinity"]
    selected = deployment["selector"]["matchLabels"]
    for term in terms["preferredDuringSchedulingIgnoredDuringExecution"]:
        assert term["podAffinityTerm"]["labelSelector"]["matchLabels"] == selected
    budget = only(objects, "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, selected)


def test_without_an_election_at_most_one_operator_runs(helm: Helm) -> None:
    alone = {"settings": {"leaderElection": {"enabled": False}}}
    objects = helm.template(alone)
    assert only(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    assert "Role" not in {document["kind"] for document in objects}
    with pytest.raises(ClusterError, match=r"needs settings\.leaderElection\.enabled"):
        helm.template({**alone, "replicas": 2})


def test_the_operator_competes_for_the_lease_that_it_may_write(helm: Helm) -> None:
    for name in ({}, {"fullnameOverride": "other"}):
        objects = helm.template(name)
        lease = settings_of(objects)["leaderElection"]
        role = only(objects, "Role")
        assert role["metadata"]["namespace"] == NAMESPACE
        assert role["rules"][0]["resourceNames"] == [lease["leaseName"]]
        assert "namespace" not in lease, "the operator takes its pod's"


def test_on_openshift_the_platform_chooses_the_identity(helm: Helm) -> None:
    objects = helm.template({"runAs": None, "profiles": {"default": {"runAs": None}}})
    assert "runAsUser" not in only(objects, "Deployment")["spec"]["template"]["spec"]["securityContext"]
    assert "runAs" not in settings_of(objects)["profiles"]["default"]


OTHER_GPU = {"gpuResource": "example.com/gpu"}


@pytest.mark.parametrize(
    ("profile", "selector"),
    [
        ({}, NVIDIA_LABEL),
        ({"workspace": {"topology": "node-local"}}, NVIDIA_LABEL),
        ({"nodeSelector": {"pool": "gpu"}}, {"pool": "gpu"}),
        ({"workspace": {"topology": "shared"}}, None),
        ({"gpuResource": None}, None),
        ({**OTHER_GPU, "nodeSelector": {"pool": "gpu"}}, {"pool": "gpu"}),
        ({**OTHER_GPU, "workspace": {"topology": "shared"}}, None),
    ],
)
@pytest.mark.parametrize("name", ["default", "big"])
def test_a_profile_with_gpus_keeps_to_the_nodes_that_have_them(
    helm: Helm, name: str, profile: Object, selector: Object | None
) -> None:
    assert settings_of(helm.template({"profiles": {name: profile}}))["profiles"][name].get("nodeSelector") == selector


@pytest.mark.parametrize(
    "profile", [{"nodeSelector": {}}, OTHER_GPU, {**OTHER_GPU, "workspace": {"topology": "zonal"}}]
)
@pytest.mark.parametrize("name", ["default", "big"])
def test_a_profile_with_gpus_on_unknown_nodes_is_rejected_with_a_remedy(helm: Helm, name: str, profile: Object) -> None:
    with pytest.raises(ClusterError, match=rf"profiles\.{name}: gpuResource is set.* Set nodeSelector to labels"):
        helm.template({"profiles": {name: profile}})


@pytest.mark.parametrize("values", [SMALL_MACHINE, ANY_MACHINE])
def test_the_embedded_clusters_values_ask_for_no_label_of_a_gpu_node(helm: Helm, values: Object) -> None:
    selector = settings_of(helm.template(values))["profiles"]["default"]["nodeSelector"]
    assert selector == {"kubernetes.io/os": "linux"}


SERVERS: Object = {
    "hubEndpoint": "http://hub.example.org:8080",
    "objectStore": {"endpoint": "http://s3.example.org"},
    "registries": ["registry.example.org", "http://registry.example.org:5000", "other.example.org:6000"],
    "tracking": {"mlflow": {"url": "https://mlflow.example.org:7000/team"}},
}


def test_only_steps_that_need_servers_have_a_network_and_no_pod_reaches_a_job(helm: Helm) -> None:
    settings = {"jobNetworkPolicies": {"enabled": True, "namespaces": ["team-a", "team-b"], "dnsPorts": [5353]}}
    objects = helm.template(settings | {"profiles": {"default": SERVERS, "other": {"hubEndpoint": "https://[::1]:9"}}})
    policies = [document for document in objects if document["kind"] == "NetworkPolicy"]
    assert [policy["metadata"]["namespace"] for policy in policies] == ["team-a", "team-a", "team-b", "team-b"]

    def rules(step: str, direction: str) -> list[Object] | None:
        """Allowed traffic of a job's pod in team-a; None if no policy restricts it."""
        selecting = [
            policy["spec"]
            for policy in policies[:2]
            if direction.title() in policy["spec"]["policyTypes"]
            and all(
                (condition["key"], condition["operator"]) == (JOB_LABEL, "Exists")
                or (condition["key"] == STEP_LABEL and step in condition["values"])
                for condition in policy["spec"]["podSelector"]["matchExpressions"]
            )
        ]
        return [rule for spec in selecting for rule in spec.get(direction, [])] if selecting else None

    for step in ("prepare", "train", "publish", "clean"):
        assert rules(step, "ingress") == []
    assert rules("train", "egress") == rules("clean", "egress") == []
    for step in ("prepare", "publish"):
        dns, servers = rules(step, "egress") or ({}, {})
        assert {(port["port"], port["protocol"]) for port in dns["ports"]} == {(5353, "UDP"), (5353, "TCP")}
        assert {port["port"] for port in servers["ports"]} == {8080, 80, 443, 5000, 6000, 7000, 9}
        assert {block["ipBlock"]["cidr"] for block in servers["to"]} == {"0.0.0.0/0", "::/0"}
        assert "169.254.0.0/16" in servers["to"][0]["ipBlock"]["except"]


def test_the_jobs_of_a_namespaced_installation_get_their_policies_where_they_run(helm: Helm) -> None:
    objects = helm.template({"namespaces": ["team-a"], "jobNetworkPolicies": {"enabled": True}})
    policies = [document for document in objects if document["kind"] == "NetworkPolicy"]
    assert {policy["metadata"]["namespace"] for policy in policies} == {"team-a"}
    dns, servers = policies[1]["spec"]["egress"]
    assert [port["port"] for port in dns["ports"]] == [53, 53]
    assert [port["port"] for port in servers["ports"]] == [443]
    assert "NetworkPolicy" not in {document["kind"] for document in helm.template()}


def test_the_ports_of_the_proxy_and_of_each_store_are_open(helm: Helm) -> None:
    profile = {
        "googleStorage": {"endpoint": "http://gcs.example.org:4443"},
        "azureStorage": {"account": "team", "endpoint": "https://blob.example.org:10000"},
        "httpsProxy": "http://proxy.example.org:3128",
    }
    values: Object = {"namespaces": ["team-a"], "jobNetworkPolicies": {"enabled": True}}
    objects = helm.template(values | {"profiles": {"default": profile}})
    (policy,) = [one for one in objects if one["metadata"]["name"] == "qlora-operator-servers"]
    servers = policy["spec"]["egress"][1]
    assert {port["port"] for port in servers["ports"]} == {443, 4443, 10000, 3128}


@pytest.mark.parametrize(
    ("provider", "addresses"),
    [
        ("google", {"169.254.169.254/32", "169.254.169.252/32"}),
        ("aws", {"169.254.170.23/32", "fd00:ec2::23/128"}),
        ("azure", None),
    ],
)
def test_only_pods_with_an_identity_reach_the_credential_service(
    helm: Helm, provider: str, addresses: set[str] | None
) -> None:
    profile = {"cloudIdentity": {"provider": provider, "serviceAccountName": "qlora"}}
    values: Object = {"namespaces": ["team-a"], "jobNetworkPolicies": {"enabled": True}}
    objects = helm.template(values | {"profiles": {"default": {}, "cloud": profile}})
    found = [one["spec"] for one in objects if one["metadata"]["name"] == f"qlora-operator-identity-{provider}"]
    if addresses is None:
        assert found == []
        return
    ((rule,),) = [spec["egress"] for spec in found]
    assert {block["ipBlock"]["cidr"] for block in rule["to"]} == addresses
    conditions = found[0]["podSelector"]["matchExpressions"]
    assert {"key": CLOUD_IDENTITY_LABEL, "operator": "In", "values": [provider]} in conditions


def test_a_changed_setting_restarts_the_operator(helm: Helm) -> None:
    def template(values: Mapping[str, Any]) -> Object:
        return dict(only(helm.template(values), "Deployment")["spec"]["template"])

    assert template({}) == template({})
    assert template({}) != template({"profiles": {"default": {"workspace": {"size": "80Gi"}}}})
