"""Findings of `doctor` about a cluster, and their fixes."""

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qlora_api.crd import definitions
from qlora_client.doctor.facts import Check, Facts, Operator, Unknown
from qlora_client.doctor.gathering import examine

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GPU_LABEL = {"nvidia.com/gpu.present": "true"}
PROFILE: dict[str, Any] = {
    "image": "registry.example.org/qlora-trainer@sha256:1",
    "device": "cuda",
    "gpuResource": "nvidia.com/gpu",
    "nodeSelector": GPU_LABEL,
}
DENIED = Unknown("you may not list nodes: a ClusterRole with the rule {nodes} helps")


def schemas(change: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """Return our definitions' published schemas, with changed QLoRAJob properties."""
    found = {}
    for kind, definition in definitions().items():
        schema = copy.deepcopy(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
        if kind == "QLoRAJob":
            change(schema["properties"])
        found[kind] = schema | {"x-kubernetes-group-version-kind": [{"kind": kind}]}
    return {"components": {"schemas": found}}


SCHEMAS = schemas()


def operator(**settings: Any) -> Operator:
    labels = {"app.kubernetes.io/version": "0.1.0"}
    deployment = {
        "metadata": {"name": "qlora-operator", "namespace": "qlora-system", "labels": labels},
        "spec": {"replicas": 1},
        "status": {"readyReplicas": 1},
    }
    return Operator(deployment, settings, lease(seconds=3))


def lease(seconds: float) -> dict[str, Any]:
    renewed = (NOW - timedelta(seconds=seconds)).isoformat()
    return {"spec": {"holderIdentity": "pod-1", "leaseDurationSeconds": 12, "renewTime": renewed}}


def node(name: str = "gpu-1", *, gpus: int = 8, ready: str = "True", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": GPU_LABEL},
        "spec": spec,
        "status": {
            "allocatable": {"nvidia.com/gpu": str(gpus)} if gpus else {},
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def storage_class(name: str = "fast", provisioner: str = "csi.example.org", **fields: Any) -> dict[str, Any]:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    binding = {"volumeBindingMode": "WaitForFirstConsumer"}
    return {"metadata": {"name": name, "annotations": annotations}, "provisioner": provisioner, **binding, **fields}


def stored(spec: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": "default"}, "spec": spec}


READY = Facts(
    namespace="team",
    now=NOW,
    server_version="v1.37.2",
    schemas=SCHEMAS,
    cli_version="0.1.0",
    operators=[operator()],
    profiles=[stored(PROFILE)],
    jobs=[],
    revisions=[],
    nodes=[node()],
    storage_classes=[storage_class()],
    runtime_classes=[],
    own_namespace={"metadata": {"name": "team", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
    quotas=[],
    limit_ranges=[],
    network_policies=[],
    denied={},
    trials={"default": None},
)


def check(name: str, **facts: Any) -> Check:
    """The check of this name, with these facts instead of those of a cluster that is ready.

    Without schemas unless they are given: to compare them takes a second.
    """
    (found,) = [each for each in examine(replace(READY, **{"schemas": None, **facts})) if each.name == name]
    return found


def assert_finds(name: str, verdict: str, message: str, **facts: Any) -> None:
    found = check(name, **facts)
    assert (found.verdict, message in found.message) == (verdict, True)


def test_a_cluster_that_is_ready_has_no_problem_and_no_warning() -> None:
    checks = examine(READY)
    assert {each.verdict for each in checks} == {"ok"}
    assert [each.name for each in checks] == [
        "Kubernetes",
        "Definitions",
        "Operator",
        "Operator's Lease",
        "Namespace served",
        "Jobs seen",
        "Profile default",
        "Profile default: nodes",
        "Profile default: storage",
        "Pod Security",
        "Admission, profile default",
        "Quotas",
        "Limit ranges",
        "Network policies",
        "Your rights",
    ]


@pytest.mark.parametrize(
    ("version", "verdict"), [("v1.34.0", "ok"), ("v1.33.9", "problem"), ("v2.0.0-rc.1", "ok"), ("devel", "unknown")]
)
def test_the_version_of_the_api_server(version: str, verdict: str) -> None:
    assert check("Kubernetes", server_version=version).verdict == verdict


def test_definitions_of_another_release_name_the_fields_and_the_side_to_upgrade() -> None:
    older = schemas(lambda fields: fields["spec"]["properties"].pop("lora"))
    newer = schemas(lambda fields: fields["spec"]["properties"].update(magic={"type": "string"}))
    assert_finds("Definitions", "problem", "lack spec.lora", schemas=older)
    assert_finds("Definitions", "warning", "have spec.magic", schemas=newer)
    assert_finds("Definitions", "problem", "install the operator's chart", schemas=None)


def with_status(ready: int, replicas: int = 1, version: str = "0.1.0") -> list[Operator]:
    found = operator()
    deployment = {
        **found.deployment,
        "metadata": {**found.deployment["metadata"], "labels": {"app.kubernetes.io/version": version}},
        "spec": {"replicas": replicas},
        "status": {"readyReplicas": ready},
    }
    return [replace(found, deployment=deployment)]


@pytest.mark.parametrize(
    ("operators", "verdict", "message"),
    [
        (with_status(0), "problem", "has no ready pod"),
        (with_status(0, replicas=0), "problem", "is scaled to 0"),
        (with_status(1, replicas=2), "warning", "has 1 of 2 pods ready"),
        (with_status(1, version="0.2.0"), "warning", "is of version 0.2.0 and this program of 0.1.0"),
        ([], "problem", "install its chart"),
        (Unknown("no right: deployments"), "unknown", "no right: deployments"),
    ],
)
def test_the_operators_deployment(operators: Any, verdict: str, message: str) -> None:
    assert_finds("Operator", verdict, message, operators=operators)


@pytest.mark.parametrize(
    ("found", "verdict", "message"),
    [
        (lease(23), "ok", "pod-1 holds it"),
        (lease(25), "problem", "pod-1 has not renewed the Lease of qlora-system/qlora-operator for 25 s"),
        ({"spec": {"holderIdentity": ""}}, "problem", "nobody holds the Lease"),
        (Unknown("no right: leases"), "unknown", "no right: leases"),
    ],
)
def test_the_lease_is_renewed(found: Any, verdict: str, message: str) -> None:
    assert_finds("Operator's Lease", verdict, message, operators=[replace(operator(), lease=found)])


def test_an_operator_that_serves_other_namespaces_only() -> None:
    assert_finds("Namespace served", "problem", "serves a, b and not team", operators=[operator(namespaces=["a", "b"])])


def test_unreconciled_jobs_reveal_a_dead_operator_to_every_user() -> None:
    def job(minutes: int, **status: Any) -> dict[str, Any]:
        created = (NOW - timedelta(minutes=minutes)).isoformat()
        return {"metadata": {"name": f"j{minutes}", "creationTimestamp": created}, "spec": {}, "status": status}

    assert check("Jobs seen", jobs=[job(1), job(9, phase="Training")]).verdict == "ok"
    assert_finds("Jobs seen", "problem", "looked at j5 for over 2 minutes", jobs=[job(1), job(5)])


def profiled(**fields: Any) -> dict[str, Any]:
    """Facts with that profile."""
    return {"profiles": [stored(PROFILE | fields)]}


def test_a_profile_with_a_field_that_is_wrong() -> None:
    found = check("Profile default", **profiled(device="tpu"))
    assert found.verdict == "problem"
    assert found.message.startswith("QLoRAProfile default: spec.device: ")


@pytest.mark.parametrize(
    ("allowed", "labels", "admits"),
    [
        ({"names": ["other", "team"]}, {}, True),
        ({"names": ["other"]}, {}, False),
        ({"selector": {"matchLabels": {"tier": "gold"}}}, {"tier": "gold"}, True),
        ({"selector": {"matchLabels": {"tier": "gold"}}}, {"tier": "free"}, False),
        ({"selector": {"matchLabels": {"tier": "gold"}}}, None, True),
    ],
)
def test_a_profile_for_other_namespaces(allowed: dict[str, Any], labels: dict[str, str] | None, admits: bool) -> None:
    own = DENIED if labels is None else {"metadata": {"name": "team", "labels": labels}}
    checks = examine(replace(READY, schemas=None, own_namespace=own, **profiled(allowedNamespaces=allowed)))
    said = [each.message for each in checks if each.name == "Profile default" and each.verdict == "warning"]
    assert said == ([] if admits else ["jobs of team may not use it: ask the administrator to admit it"])


@pytest.mark.parametrize(
    ("image", "verdict", "message"),
    [
        ("r.example.org:5000/trainer", "warning", "may change between steps"),
        ("r.example.org/trainer:latest", "warning", "may change between steps"),
        ("localhost/qlora-trainer:0.1.0", "warning", "nodes cannot pull"),
        ("r.example.org/trainer:0.1.0", "ok", "r.example.org/trainer:0.1.0"),
    ],
)
def test_the_image_of_a_profile(image: str, verdict: str, message: str) -> None:
    assert_finds("Profile default", verdict, message, **profiled(image=image))


TAINT = {"key": "dedicated", "effect": "NoSchedule"}
COMPUTE, DRIVER = "nvidia.com/gpu.compute", "nvidia.com/cuda.driver"
OF_T4 = {f"{COMPUTE}.major": "7", f"{COMPUTE}.minor": "5"}
OF_A10 = {f"{COMPUTE}.major": "8", f"{COMPUTE}.minor": "6", f"{DRIVER}-version.major": "580"}


def labeled(labels: dict[str, str]) -> dict[str, Any]:
    found = node()
    return found | {"metadata": {**found["metadata"], "labels": {**found["metadata"]["labels"], **labels}}}


@pytest.mark.parametrize(
    ("nodes", "verdict", "message"),
    [
        ([node(), node("gpu-2", gpus=4)], "ok", "2 nodes with 12 nvidia.com/gpu in all, and 8 on the largest"),
        ([], "warning", "no node has nvidia.com/gpu.present=true now"),
        ([node(gpus=0)], "problem", "none of its nodes (1) offers nvidia.com/gpu: install the vendor's device plugin"),
        ([node(ready="Unknown")], "problem", "gpu-1 is not ready"),
        ([node(unschedulable=True)], "problem", "gpu-1 is cordoned"),
        ([node(taints=[TAINT])], "problem", "gpu-1 has the taint dedicated, which the profile does not tolerate"),
        ([node(taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule", "value": "present"}])], "ok", "1 node"),
        ([node(taints=[TAINT | {"effect": "PreferNoSchedule"}])], "ok", "1 node"),
        ([labeled(OF_T4)], "problem", "gpu-1 with compute capability 7.5, and 8.0 is needed"),
        ([labeled(OF_A10), node("gpu-2")], "ok", "2 nodes"),
        ([labeled({f"{DRIVER}-version.major": "550"}), node("gpu-2")], "warning", "gpu-1 with driver 550, and 580 is"),
        ([labeled(OF_T4), node("cpu-1", gpus=0)], "problem", "gpu-1 with compute capability 7.5"),
        ([labeled({f"{DRIVER}.major": "550"})], "problem", "train cannot use gpu-1 with driver 550"),
        (DENIED, "unknown", "ClusterRole"),
    ],
)
def test_the_gpus_of_a_profiles_nodes(nodes: Any, verdict: str, message: str) -> None:
    assert_finds("Profile default: nodes", verdict, message, nodes=nodes)


SIZE = "nvidia.com/gpu.memory"


@pytest.mark.parametrize(
    ("memory", "labels", "verdict", "message"),
    [
        (None, {SIZE: "81559"}, "ok", "1 node"),
        ("79Gi", {SIZE: "81559"}, "ok", "1 node"),
        ("80Gi", {SIZE: "81559"}, "warning", "is 80Gi, and its smallest GPU has 79Gi: set it to that"),
        ("80Gi", {}, "ok", "1 node"),
    ],
)
def test_the_memory_of_a_profiles_gpus(memory: str | None, labels: dict[str, str], verdict: str, message: str) -> None:
    settings = profiled(**({} if memory is None else {"gpuMemory": memory}))
    assert_finds("Profile default: nodes", verdict, message, nodes=[labeled(labels)], **settings)


def test_a_taint_that_the_profile_tolerates() -> None:
    tolerations = [{"key": "dedicated", "operator": "Exists"}]
    found = check("Profile default: nodes", nodes=[node(taints=[TAINT])], **profiled(tolerations=tolerations))
    assert found.verdict == "ok"


FEATURE = "feature.node.kubernetes.io/cpu-cpuid."


@pytest.mark.parametrize(
    ("labels", "types"),
    [
        ({}, "bfloat16 or, without instructions for it, float32"),
        ({"kubernetes.io/arch": "arm64"}, "bfloat16"),
        ({f"{FEATURE}AVX512BF16": "true"}, "bfloat16"),
        ({f"{FEATURE}AVX2": "true"}, "float32"),
    ],
)
def test_a_profile_for_the_cpu_needs_no_gpu_and_names_its_type(labels: dict[str, str], types: str) -> None:
    cpu = {key: value for key, value in PROFILE.items() if key != "gpuResource"} | {"device": "cpu"}
    found = check("Profile default: nodes", profiles=[stored(cpu)], nodes=[labeled(labels)])
    assert (found.verdict, found.message) == ("ok", f"it trains on the CPU of 1 node, in {types}")


@pytest.mark.parametrize(
    ("classes", "workspace", "verdict", "message"),
    [
        ([], {}, "problem", "no default StorageClass"),
        ([storage_class()], {"storageClassName": "slow"}, "problem", "there is no StorageClass slow"),
        ([storage_class()], {"storageClassName": "fast"}, "ok", "fast makes its workspaces"),
        (
            [storage_class(provisioner="ebs.csi.aws.com")],
            {"topology": "shared", "accessMode": "ReadWriteMany"},
            "problem",
            "fast (ebs.csi.aws.com) has no volumes for several nodes",
        ),
        ([storage_class(volumeBindingMode="Immediate")], {}, "warning", "WaitForFirstConsumer"),
        ([storage_class(volumeBindingMode="Immediate")], {"topology": "shared"}, "ok", "fast"),
        (DENIED, {}, "unknown", "ClusterRole"),
    ],
)
def test_the_storage_of_a_profile(classes: Any, workspace: dict[str, str], verdict: str, message: str) -> None:
    assert_finds("Profile default: storage", verdict, message, storage_classes=classes, **profiled(workspace=workspace))


def test_a_runtime_class_that_does_not_exist() -> None:
    facts = profiled(runtimeClassName="nvidia")
    assert_finds("Profile default: runtime class", "problem", "there is no RuntimeClass nvidia", **facts)


def test_without_access_to_profiles_they_are_those_of_the_jobs() -> None:
    job = {
        "metadata": {"name": "a", "creationTimestamp": NOW.isoformat()},
        "spec": {"scheduling": {"profileName": "a100"}},
        "status": {"phase": "Training", "currentRevision": "a-1"},
    }
    copy = {"metadata": {"name": "a-1"}, "data": {"profile": PROFILE | {"newer": 1}}}
    names = [each.name for each in examine(replace(READY, profiles=DENIED, jobs=[job], revisions=[copy]))]
    assert "Profile a100: nodes" in names


@pytest.mark.parametrize(
    ("profiles", "verdict", "why"),
    [(DENIED, "unknown", "ClusterRole"), ([], "problem", "there is no QLoRAProfile: the operator's chart creates one")],
)
def test_profiles_that_do_not_exist_or_cannot_be_read(profiles: Any, verdict: str, why: str) -> None:
    assert_finds("Profiles", verdict, why, profiles=profiles)


def quota(hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "small"}, "spec": spec, "status": {"hard": hard, "used": used or {}}}


@pytest.mark.parametrize(
    ("found", "verdict", "message"),
    [
        (quota({"requests.nvidia.com/gpu": "0"}), "problem", "takes 1: raise it"),
        (quota({"requests.nvidia.com/gpu": "2"}, {"requests.nvidia.com/gpu": "2"}), "warning", "or wait until others"),
        (quota({"requests.memory": "23Gi"}), "problem", "of requests.memory it has 0 of 23Gi used"),
        (quota({"requests.storage": "10Gi"}), "problem", "takes 50Gi"),
        (quota({"count/qlorajobs.qlora.dev": "1"}, {"count/qlorajobs.qlora.dev": "1"}), "warning", "takes 1"),
        (quota({"limits.cpu": "100"}), "warning", "unless a LimitRange sets a default CPU limit"),
    ],
)
def test_a_quota_that_is_too_small_or_used_up(found: dict[str, Any], verdict: str, message: str) -> None:
    assert_finds("Quota small", verdict, message, quotas=[found])


@pytest.mark.parametrize(
    "found",
    [
        quota({"requests.memory": "100Gi", "secrets": "0", "requests.nvidia.com/gpu": "1"}),
        quota({"pods": "0"}, scopes=["BestEffort"]),
        quota({"requests.memory": "1Zi"}),
    ],
    ids=["room", "of other pods", "a unit that is not known"],
)
def test_a_quota_with_room(found: dict[str, Any]) -> None:
    assert check("Quotas", quotas=[found]).verdict == "ok"


def test_a_limit_range_that_excludes_a_job() -> None:
    limits = [
        {"type": "Container", "max": {"memory": "8Gi"}},
        {"type": "PersistentVolumeClaim", "max": {"storage": "100Gi"}},
        {"type": "openshift.io/Image", "max": {"storage": "1Gi"}},
    ]
    ranges = [{"metadata": {"name": "limits"}, "spec": {"limits": limits}}]
    message = "a Container may have 8Gi of memory, and a job of the profile default takes 24Gi"
    assert_finds("LimitRange limits", "problem", message, limit_ranges=ranges)


def test_the_api_servers_answer_to_a_pod_like_that_of_train() -> None:
    refused = {"default": 'violates PodSecurity "restricted:latest"'}
    assert_finds("Admission, profile default", "problem", "violates PodSecurity", trials=refused)
    assert check("Admission, profile default", trials={"default": DENIED}).verdict == "unknown"


def policy(egress: list[Any], *kinds: str, **selector: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "deny"},
        "spec": {"podSelector": selector, "policyTypes": list(kinds), "egress": egress},
    }


OF_CHART = policy(
    [{"ports": [{"port": 443}]}],
    "Egress",
    matchExpressions=[
        {"key": "qlora.dev/job", "operator": "Exists"},
        {"key": "qlora.dev/step", "operator": "In", "values": ["prepare", "publish"]},
    ],
)


@pytest.mark.parametrize(
    ("policies", "verdict", "message"),
    [
        ([policy([], "Ingress", "Egress")], "problem", "deny let prepare and publish connect nowhere"),
        ([policy([], "Ingress", "Egress"), OF_CHART], "ok", "the connections of train are restricted"),
        ([policy([], "Ingress")], "ok", "no NetworkPolicy restricts the pods of jobs yet"),
        ([policy([], "Egress", matchLabels={"app": "web"})], "ok", "no NetworkPolicy restricts the pods of jobs yet"),
        ([policy([], "Egress", matchExpressions=[{"key": "app", "operator": "DoesNotExist"}])], "problem", "nowhere"),
    ],
)
def test_network_policies(policies: list[Any], verdict: str, message: str) -> None:
    assert_finds("Network policies", verdict, message, network_policies=policies)


def test_missing_rights_are_named_by_their_purpose() -> None:
    found = check("Your rights: logs", denied={"logs": ["{resources: [pods/log]}"]})
    assert found.message == "ask for a Role with the rules {resources: [pods/log]}"


def test_a_forbidden_check_is_unknown_and_no_problem() -> None:
    names = "operators profiles jobs nodes storage_classes own_namespace quotas limit_ranges network_policies"
    hidden: dict[str, Any] = dict.fromkeys(names.split(), DENIED)
    checks = examine(replace(READY, trials={}, **hidden))
    assert {each.verdict for each in checks} == {"ok", "unknown"}
    assert [each.name for each in checks if each.verdict == "ok"] == ["Kubernetes", "Definitions", "Your rights"]
