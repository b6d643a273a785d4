"""The chart with real Helm: rendering, rejections, and its effects on a real API server."""

import asyncio
import copy
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import toolchain
from devcluster.controlplane import ControlPlane, running
from devcluster.errors import ClusterError
from devcluster.layout import from_environment
from devcluster.processes import run
from devcluster.product import ANY_MACHINE, SMALL_MACHINE
from qlora_api.naming import CLOUD_IDENTITY_LABEL, JOB_LABEL, STEP_LABEL
from qlora_operator.kube.connection import connect
from qlora_operator.kube.errors import RejectedError
from qlora_operator.settings import Settings, load_settings
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "qlora-operator"
RELEASE = "qlora-operator"
NAMESPACE = "qlora-system"
SETTINGS = "qlora.dev/settings"
"""Annotation of the operator's pod."""
SERVICE_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"

Object = dict[str, Any]

EVERYTHING_OPTIONAL = {
    "metrics": {
        "serviceMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True},
    },
    "networkPolicy": {
        "enabled": True,
        "apiServerCIDRs": ["10.0.0.1/32"],
        "metricsFrom": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}],
    },
    "jobNetworkPolicies": {"enabled": True, "namespaces": [NAMESPACE], "ports": [3128]},
    "imagePullSecrets": ["registry"],
    "priorityClassName": "system-cluster-critical",
    "announce": {"enabled": True},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control-plane", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "replicas": 3,
    "podLabels": {"team": "platform"},
    "podAnnotations": {"example.com/note": "kept"},
    "serviceAccount": {"annotations": {"example.com/note": "kept"}},
}

# All rights of the operator: resource -> verbs.
RIGHTS = {
    "qlorajobs.qlora.dev": {"get", "list", "watch", "create", "patch"},
    "qlorajobs.qlora.dev/status": {"patch"},
    "qlorasweeps.qlora.dev": {"get", "list", "watch"},
    "qlorasweeps.qlora.dev/status": {"patch"},
    "jobs.batch": {"get", "list", "watch", "create", "delete"},
    "pods": {"list", "watch"},
    "pods/log": {"get"},
    "persistentvolumeclaims": {"get", "create"},
    "services": {"create"},
    "networkpolicies.networking.k8s.io": {"create"},
    "events": {"create"},
}
# Further rights in the operator's namespace.
OWN_RIGHTS = {"leases.coordination.k8s.io": {"get", "create", "update"}}


@dataclass(frozen=True)
class Helm:
    """Helm with this chart."""

    program: Path
    kubeconfig: Path | None = None

    def __call__(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        connection = ["--kubeconfig", str(self.kubeconfig)] if self.kubeconfig else []
        given = [] if values is None else ["--values", "-"]
        return run([self.program, *connection, *arguments, *given], input_text=json.dumps(values or {}), seconds=120)

    def template(self, values: Mapping[str, Any] | None = None, chart: Path = CHART) -> list[Object]:
        """Every object that an installation with these values would make."""
        text = self("template", RELEASE, str(chart), "--namespace", NAMESPACE, values=values or {})
        return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module")
def helm() -> Helm:
    return Helm(toolchain.built(from_environment(), ["helm"])["helm"])


def only(objects: list[Object], kind: str) -> Object:
    found = [document for document in objects if document["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def settings_in(template: Object) -> str:
    """The operator's settings file in a pod of this template, as the kubelet makes it."""
    spec = template["spec"]
    (container,) = spec["containers"]
    path = Path(next(one["value"] for one in container["env"] if one["name"] == "QLORA_OPERATOR_SETTINGS"))
    name = next(one["name"] for one in container["volumeMounts"] if one["mountPath"] == str(path.parent))
    volume = next(one for one in spec["volumes"] if one["name"] == name)
    item = next(one for one in volume["downwardAPI"]["items"] if one["path"] == path.name)
    annotation = item["fieldRef"]["fieldPath"].removeprefix("metadata.annotations['").removesuffix("']")
    return str(template["metadata"]["annotations"][annotation])


def settings_of(objects: list[Object]) -> Object:
    return dict(yaml.safe_load(settings_in(only(objects, "Deployment")["spec"]["template"])))


def rights_of(rules: list[Object]) -> dict[str, set[str]]:
    """Verbs by `resource.group/subresource`, as kubectl writes it."""
    rights: dict[str, set[str]] = {}
    for rule in rules:
        for group in rule.get("apiGroups", []):
            for resource in rule.get("resources", []):
                name, slash, subresource = resource.partition("/")
                rights.setdefault(f"{name}.{group}".strip(".") + slash + subresource, set()).update(rule["verbs"])
    return rights


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
NVIDIA_LABEL = {"nvidia.com/gpu.present": "true"}


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


def with_values(helm: Helm, folder: Path, values: Object) -> list[Object]:
    """Render as `helm upgrade --reuse-values`: these are the defaults, and no others."""
    chart = shutil.copytree(CHART, folder / "reused", dirs_exist_ok=True)
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    return helm.template(chart=chart)


def everything_on(values: Object) -> Object:
    """The values with every object of the chart in use."""
    on = copy.deepcopy(values)
    on["networkPolicy"]["enabled"] = on["metrics"]["serviceMonitor"]["enabled"] = True
    on["jobNetworkPolicies"] |= {"enabled": True, "namespaces": ["team-a"]}
    return on


def keys(values: Object, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in values.items():
        yield (*above, name)
        if isinstance(value, dict):
            yield from keys(value, (*above, name))


def without(values: Object, path: tuple[str, ...]) -> Object:
    left = copy.deepcopy(values)
    part = left
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return left


def meaning(objects: list[Object]) -> list[Object]:
    """The objects with the settings as the operator reads them, absent ones included."""
    for document in objects:
        if document["kind"] == "Deployment":
            template = document["spec"]["template"]
            settings = Settings.model_validate(yaml.safe_load(settings_in(template)))
            template["metadata"]["annotations"][SETTINGS] = settings.model_dump(mode="json")
    return objects


VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text())
PREVIOUS_VALUES: Object = yaml.safe_load((ROOT / "tests/support/previous_release/values.yaml").read_text())
NEW_KEYS = [path for path in keys(VALUES) if path not in set(keys(PREVIOUS_VALUES))]
# Absence has a meaning: the platform chooses, no GPU, no request or limit.
ABSENT_BY_CHOICE = {("runAs",), ("profiles", "default", "runAs"), ("profiles", "default", "gpuResource")} | {
    path for path in keys(VALUES) if path[0] == "resources"
}
# A required value that is absent is rejected by name.
CLEAR_FAILURE = re.compile(r"missing property '\w+'|needs jobNetworkPolicies\.namespaces")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=".".join(path), marks=[] if path in NEW_KEYS else [pytest.mark.slow])
        for path in keys(VALUES)
        if path not in ABSENT_BY_CHOICE
    ],
)
def test_a_value_that_the_older_chart_lacks_has_its_default_or_is_required(
    helm: Helm, tmp_path: Path, whole: list[Object], path: tuple[str, ...]
) -> None:
    try:
        objects = with_values(helm, tmp_path, without(everything_on(VALUES), path))
    except ClusterError as rejected:
        if not CLEAR_FAILURE.search(str(rejected)):
            raise
    else:
        assert meaning(objects) == whole


@pytest.fixture(scope="module")
def whole(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """Render the chart with all values."""
    return meaning(with_values(helm, tmp_path_factory.mktemp("whole"), everything_on(VALUES)))


def test_an_upgrade_that_reuses_previous_values_names_the_missing_ones(helm: Helm, tmp_path: Path) -> None:
    assert ("settings", "leaderElection") in NEW_KEYS
    with pytest.raises(ClusterError, match="missing property 'leaderElection'"):
        with_values(helm, tmp_path, PREVIOUS_VALUES)


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


LIMIT = 192 * 1024


def settings_of_size(helm: Helm, size: int) -> Object:
    """Values whose settings are so many bytes, without the line break at their end."""
    profiles = {f"profile-{number:03}": {"image": "a"} for number in range(400)}
    template = only(helm.template({"profiles": profiles}), "Deployment")["spec"]["template"]
    missing = size - len(settings_in(template).rstrip())
    for profile in profiles.values():
        added = min(missing, 511)
        profile["image"] += "a" * added
        missing -= added
    assert missing == 0
    return {"profiles": profiles}


def test_settings_too_large_for_an_annotation_are_rejected_before_installation(helm: Helm) -> None:
    sentence = rf"the settings are {LIMIT + 1} bytes of YAML, and may be {LIMIT}: .* Define fewer or shorter profiles"
    with pytest.raises(ClusterError, match=sentence):
        helm.template(settings_of_size(helm, LIMIT + 1))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"imgae": {}}, "'imgae' not allowed"),
        ({"settings": {"progres": {}}}, "'progres' not allowed"),
        ({"profiles": {"default": {"gpuResorce": "nvidia.com/gpu"}}}, "'gpuResorce' not allowed"),
        ({"profiles": {"default": {"device": "tpu"}}}, "/profiles/default/device"),
        ({"profiles": {"default": {"modelCache": {}}}}, "missing property 'claimName'"),
        ({"profiles": {"default": {"modelCache": {"claimName": "Models"}}}}, "/profiles/default/modelCache/claimName"),
        ({"profiles": {"default": {"httpsProxy": "http://team:password@proxy:3128"}}}, "/profiles/default/httpsProxy"),
        ({"profiles": {"default": {"cloudIdentity": {"provider": "oracle"}}}}, "/profiles/default/cloudIdentity"),
        ({"profiles": {"default": None}}, "missing property 'default'"),
        ({"profiles": {"A_100": {}}}, "A_100"),
        ({"namespaces": "team-a"}, "/namespaces"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"jobNetworkPolicies": {"enabled": True}}, "needs jobNetworkPolicies.namespaces"),
        ({"jobNetworkPolicies": {"dnsPorts": [53, 53]}}, "/jobNetworkPolicies/dnsPorts"),
        ({"jobNetworkPolicies": {"dnsPorts": [*range(1, 10)]}}, "/jobNetworkPolicies/dnsPorts"),
        ({"networkPolicy": {"apiServerPorts": None}}, "missing property 'apiServerPorts'"),
        ({"jobNetworkPolicies": {"servers": None}}, "missing property 'servers'"),
        ({"crds": {"keep": None}}, "missing property 'keep'"),
        ({"jobNetworkPolicies": {"servers": [{"cidr": "example.org"}]}}, "/jobNetworkPolicies/servers/0/cidr"),
        ({"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}}, "needs metrics.service"),
    ],
)
def test_wrong_values_are_rejected_by_name(helm: Helm, values: Object, complaint: str) -> None:
    with pytest.raises(ClusterError) as rejected:
        helm.template(values)
    assert complaint in str(rejected.value)


@pytest.mark.parametrize("version", ["1.31.0", "1.31.4-eks-a1b2c3d", "1.40.0"])
def test_a_kubernetes_of_the_documented_version_or_newer_is_taken(helm: Helm, version: str) -> None:
    assert "kind: Deployment" in helm("template", RELEASE, str(CHART), "--kube-version", version)


def test_an_older_kubernetes_is_rejected_with_both_versions(helm: Helm) -> None:
    with pytest.raises(ClusterError, match=r"requires kubeVersion: >=1\.31\.0-0 .*1\.30\.9"):
        helm("template", RELEASE, str(CHART), "--kube-version", "1.30.9")


@pytest.fixture(scope="module")
def plane() -> Iterator[ControlPlane]:
    """A control plane of this module's own: the one of the other tests has the definition without Helm."""
    with running(controller_manager=True) as plane:
        yield plane


@pytest.fixture(scope="module")
def installed(helm: Helm, plane: ControlPlane) -> Helm:
    """Helm on a cluster with the chart's default release, in a restricted namespace."""
    plane.kubectl("create", "namespace", NAMESPACE)
    plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    connected = Helm(helm.program, plane.kubeconfig)
    connected("install", RELEASE, str(CHART), "--namespace", NAMESPACE)
    return connected


def test_the_notes_name_the_next_commands(installed: Helm) -> None:
    notes = installed("get", "notes", RELEASE, "--namespace", NAMESPACE)
    assert "in all namespaces" in notes
    assert f"kubectl --namespace {NAMESPACE} rollout status deployment/{RELEASE}" in notes


def test_the_api_server_takes_every_object_as_it_is_written(helm: Helm, installed: Helm, plane: ControlPlane) -> None:
    for values in (EVERYTHING_OPTIONAL, EVERYTHING_OPTIONAL | {"namespaces": [NAMESPACE]}):
        # ServiceMonitor is the Prometheus operator's kind, which this API server does not have.
        objects = [document for document in helm.template(values) if document["kind"] != "ServiceMonitor"]
        assert "NetworkPolicy" in {document["kind"] for document in objects}
        plane.kubectl(
            *("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--filename=-"),
            input_text=yaml.safe_dump_all(objects),
        )


def test_an_operator_that_announces_writes_no_config_map_without_the_label(
    helm: Helm, installed: Helm, plane: ControlPlane, tmp_path: Path
) -> None:
    rendered = helm.template({"announce": {"enabled": True}, "fullnameOverride": "announcing"})
    kinds = ("ServiceAccount", "ClusterRole", "ValidatingAdmission")
    objects = [document for document in rendered if document["kind"].startswith(kinds)]
    plane.kubectl("apply", "--filename=-", input_text=yaml.safe_dump_all(objects))
    kubeconfig = yaml.safe_load(plane.kubeconfig.read_text())
    token = plane.kubectl("create", "token", "announcing", "--namespace", NAMESPACE).strip()
    kubeconfig["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    ours, denial = {"qlora.dev/announcements": "true"}, "writes only ConfigMaps with the label"
    add = [{"op": "add", "path": "/data", "value": {"Corefile": "."}}]

    def config_map(name: str, labels: Object | None = None) -> Object:
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": labels or {}}}

    async def scenario() -> None:
        async with connect(tmp_path / "kubeconfig") as cluster:

            async def is_denied() -> bool:
                try:
                    await cluster.create_config_map("kube-system", config_map(uuid.uuid4().hex))
                except RejectedError as error:
                    return denial in str(error)
                return False

            for _ in range(600):  # a minute for the API server to load the policy
                if await is_denied():
                    break
                await asyncio.sleep(0.1)
            await cluster.create_config_map("default", config_map("adapters", ours))
            await cluster.patch_config_map("default", "adapters", add)
            labelled = [{"op": "add", "path": "/metadata/labels", "value": ours}, *add]
            unlabelled = [{"op": "remove", "path": "/metadata/labels"}]
            for namespace, name, patch in (
                ("kube-system", "coredns", add),
                ("kube-system", "coredns", labelled),
                ("default", "adapters", unlabelled),
            ):
                with pytest.raises(RejectedError, match=denial):
                    await cluster.patch_config_map(namespace, name, patch)

    plane.kubectl("create", "--filename=-", "--namespace=kube-system", input_text=json.dumps(config_map("coredns")))
    asyncio.run(scenario())
    assert "data" not in plane.kubectl.get("configmap", "coredns", "--namespace=kube-system")


def test_the_largest_settings_fit_next_to_kubectls_annotation(helm: Helm, installed: Helm, plane: ControlPlane) -> None:
    """`kubectl apply` writes the whole object into another annotation, with a limit of 256 KiB."""
    objects = helm.template(settings_of_size(helm, LIMIT))
    arguments = ("apply", "--dry-run=server", "--filename=-")
    assert "configured" in plane.kubectl(*arguments, input_text=yaml.safe_dump(only(objects, "Deployment")))


def test_pod_security_admits_the_operators_pod(installed: Helm, plane: ControlPlane) -> None:
    template = plane.kubectl.get("deployment", RELEASE, "--namespace", NAMESPACE)["spec"]["template"]

    def create(spec: Object) -> str:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "admitted"}, "spec": spec}
        arguments = ("create", "--namespace", NAMESPACE, "--dry-run=server", "--filename=-")
        return plane.kubectl(*arguments, input_text=json.dumps(pod))

    assert "pod/admitted" in create(template["spec"])
    # Beyond the level's requirements.
    assert template["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    with pytest.raises(ClusterError, match="PodSecurity"):
        create({**template["spec"], "securityContext": {}})


def test_the_operators_account_has_the_required_rights_and_no_other(installed: Helm, plane: ControlPlane) -> None:
    def rules(account: str, namespace: str = "default") -> list[Object]:
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": namespace},
        }
        arguments = ("create", f"--as={account}", "--validate=false", "--output=json", "--filename=-")
        return list(json.loads(plane.kubectl(*arguments, input_text=json.dumps(review)))["status"]["resourceRules"])

    what_everybody_may = rules(f"system:serviceaccount:{NAMESPACE}:nobody")
    granted = [rule for rule in rules(SERVICE_ACCOUNT) if rule not in what_everybody_may]
    assert rights_of(granted) == RIGHTS
    in_its_own = [rule for rule in rules(SERVICE_ACCOUNT, NAMESPACE) if rule not in what_everybody_may]
    assert rights_of(in_its_own) == RIGHTS | OWN_RIGHTS


def test_editors_of_a_namespace_may_edit_its_jobs(installed: Helm, plane: ControlPlane) -> None:
    for role in ("view", "edit"):
        plane.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}er", "--namespace=default")

    def can(user: str, verb: str) -> bool:
        try:
            plane.kubectl("auth", "can-i", verb, "qlorajobs.qlora.dev", f"--as={user}", "--namespace=default")
        except ClusterError:
            return False
        return True

    eventually(lambda: can("editer", "create") and can("viewer", "list"), seconds=60, what="the aggregated roles")
    assert can("editer", "delete")
    assert not can("viewer", "create")


def test_uninstalling_keeps_the_jobs_and_installing_again_finds_them(installed: Helm, plane: ControlPlane) -> None:
    job = yaml.safe_load((CHART / "Chart.yaml").read_text())["annotations"]["artifacthub.io/crdsExamples"]
    plane.kubectl.apply(yaml.safe_dump_all(yaml.safe_load(job)))
    installed("uninstall", RELEASE, "--namespace", NAMESPACE)
    assert plane.kubectl.get("qlorajobs")["items"][0]["metadata"]["name"] == "support-assistant"
    with pytest.raises(ClusterError, match="NotFound"):
        plane.kubectl.get("deployment", RELEASE, "--namespace", NAMESPACE)
    installed("upgrade", "--install", RELEASE, str(CHART), "--namespace", NAMESPACE)
    assert plane.kubectl.get("qlorajobs")["items"][0]["metadata"]["name"] == "support-assistant"


def test_upgrade_and_rollback_change_the_definition_and_no_job(
    installed: Helm, plane: ControlPlane, tmp_path: Path
) -> None:
    """The older release has the chart of today without one field."""
    older = shutil.copytree(CHART, tmp_path / "older")
    file = older / "files" / "qlorajobs.qlora.dev.yaml"
    definition = yaml.safe_load(file.read_text())
    fields = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    del fields["training"]["properties"]["samples"]
    file.write_text(yaml.safe_dump(definition))
    manifest = yaml.safe_load((ROOT / "examples" / "instructions.yaml").read_text())

    def apply(name: str, training: Object) -> str:
        metadata = {"name": name, "namespace": "default"}
        job = {**manifest, "metadata": metadata, "spec": {**manifest["spec"], "training": training}}
        return plane.kubectl("apply", "--validate=strict", "--filename=-", input_text=json.dumps(job))

    def upgrade(chart: Path) -> None:
        installed("upgrade", "--install", RELEASE, str(chart), "--namespace", NAMESPACE)

    def training(name: str) -> Object:
        return dict(plane.kubectl.get("qlorajob", name, "--namespace=default")["spec"]["training"])

    apply("before", {"maxSteps": 7})
    upgrade(older)
    eventually(lambda: "samples" not in training("before"), seconds=60, what="the older definition")
    before = plane.kubectl.get("qlorajob", "before", "--namespace=default")

    upgrade(CHART)
    assert eventually(lambda: apply("after", {"samples": 5}), seconds=60, what="the newer definition")
    assert training("after")["samples"] == 5
    upgraded = plane.kubectl.get("qlorajob", "before", "--namespace=default")
    assert upgraded["metadata"] == before["metadata"]
    assert upgraded["spec"]["training"].pop("samples") == 3
    assert upgraded["spec"] == before["spec"]

    installed("rollback", RELEASE, "--namespace", NAMESPACE)
    eventually(lambda: "samples" not in training("after"), seconds=60, what="the older definition")
    assert plane.kubectl.get("qlorajob", "before", "--namespace=default") == before

    upgrade(CHART)
    eventually(lambda: training("after").get("samples") == 5, seconds=60, what="what was set before")


def test_each_release_keeps_its_own_settings_and_a_rollback_brings_them_back(
    installed: Helm, plane: ControlPlane
) -> None:
    """An old release's container that restarts during an upgrade would reject new settings."""

    def workers(template: Object) -> int:
        return int(yaml.safe_load(settings_in(template))["workers"])

    def revisions() -> dict[str, int]:
        """The settings of each ReplicaSet, by its name."""
        listed = plane.kubectl.get("replicasets", "--namespace", NAMESPACE)["items"]
        return {one["metadata"]["name"]: workers(one["spec"]["template"]) for one in listed}

    def upgrade(number: int) -> None:
        installed("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE, "--set", f"settings.workers={number}")
        eventually(lambda: number in revisions().values(), seconds=60, what="the new ReplicaSet")

    upgrade(3)
    before = revisions()
    upgrade(5)
    assert before.items() < revisions().items()
    installed("rollback", RELEASE, "--namespace", NAMESPACE)
    assert workers(plane.kubectl.get("deployment", RELEASE, "--namespace", NAMESPACE)["spec"]["template"]) == 3
    mounted = plane.kubectl.get("configmaps", "--namespace", NAMESPACE)["items"]
    assert [one["metadata"]["name"] for one in mounted] == ["kube-root-ca.crt"]


def test_reused_values_without_dns_ports_open_no_port(installed: Helm, plane: ControlPlane, tmp_path: Path) -> None:
    """The API server reads a rule whose list of ports is empty as one that allows every port."""
    older = shutil.copytree(CHART, tmp_path / "older")
    (older / "values.yaml").write_text(yaml.safe_dump(without(VALUES, ("jobNetworkPolicies", "dnsPorts"))))
    cut_off = f"jobNetworkPolicies.enabled=true,jobNetworkPolicies.namespaces={{{NAMESPACE}}}"
    installed("upgrade", RELEASE, str(older), "--namespace", NAMESPACE, "--set", cut_off)
    installed("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE, "--reuse-values")
    policy = plane.kubectl.get("networkpolicy", f"{RELEASE}-servers", "--namespace", NAMESPACE)
    assert [port["port"] for port in policy["spec"]["egress"][0]["ports"]] == [53, 53]
    template = plane.kubectl.get("deployment", RELEASE, "--namespace", NAMESPACE)["spec"]["template"]
    assert yaml.safe_load(settings_in(template))["dnsPorts"] == [53]
