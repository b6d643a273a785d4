"""The objects that the operator makes: the mounts, rights and cost of each step."""

import json
from typing import Any

import pytest

from qlora_api.contract import PERMANENT_EXIT_CODES
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.status import StepName
from qlora_operator.decisions.manifests.objects import build_claim, build_job
from tests.support.builders import NAME, PROFILE, UID, make_job, resolved, to_json
from tests.support.job_manifests import (
    EVERYTHING,
    STEPS,
    WORKSPACE,
    build,
    container_of,
    environment_of,
    mounts_of,
    pod_of,
)


def test_the_job_belongs_to_the_qlorajob_and_is_named_after_it() -> None:
    job = build("train")
    assert job["metadata"]["name"] == f"{NAME}-train-2"
    assert job["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "qlora.dev/v1beta1",
            "kind": "QLoRAJob",
            "name": NAME,
            "uid": UID,
            "controller": True,
            "blockOwnerDeletion": False,
        }
    ]
    for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
        assert labels["qlora.dev/job"] == NAME
        assert labels["qlora.dev/job-uid"] == UID
        assert labels["qlora.dev/step"] == "train"
        assert labels["app.kubernetes.io/managed-by"] == "qlora-operator"


def test_permanent_failures_are_checked_before_disruptions() -> None:
    job = build("train", retry={"maxFailures": 5})
    assert (job["spec"]["backoffLimit"], job["spec"]["podReplacementPolicy"]) == (5, "Failed")
    first, second, third = job["spec"]["podFailurePolicy"]["rules"]
    assert first["action"] == "FailJob"
    assert first["onExitCodes"] == {
        "containerName": "trainer",
        "operator": "In",
        "values": sorted(PERMANENT_EXIT_CODES),
    }
    assert (second["action"], second["onPodConditions"]) == ("Ignore", [{"type": "DisruptionTarget", "status": "True"}])
    assert (third["action"], third["onExitCodes"]["values"]) == ("Ignore", [143])


@pytest.mark.parametrize("step", STEPS)
def test_every_pod_passes_the_restricted_level_and_has_no_way_to_the_api(step: StepName) -> None:
    job = build(step, {"runAs": {"user": 7, "group": 8, "fsGroup": 9}}, **EVERYTHING)
    assert pod_of(job)["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsUser": 7,
        "runAsGroup": 8,
        "fsGroup": 9,
        "fsGroupChangePolicy": "OnRootMismatch",
    }
    assert container_of(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod_of(job)["automountServiceAccountToken"] is False
    assert pod_of(job)["enableServiceLinks"] is False
    assert pod_of(job)["restartPolicy"] == "Never"
    assert container_of(job)["terminationMessagePolicy"] == "File"
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod_of(job))


def test_without_an_identity_in_the_profile_the_platform_chooses() -> None:
    assert pod_of(build("train"))["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@pytest.mark.parametrize("step", STEPS)
def test_only_training_on_a_cpu_is_given_another_allocator(step: StepName) -> None:
    on_cpu, on_gpu = build(step, {"device": "cpu", "gpuResource": None}), build(step)
    assert environment_of(on_cpu).get("LD_PRELOAD") == ("libtcmalloc_minimal.so.4" if step == "train" else None)
    assert "LD_PRELOAD" not in environment_of(on_gpu)


def test_the_trainer_is_given_the_document_and_its_own_folder() -> None:
    spec: dict[str, Any] = {"training": {"learningRate": 3e-4, "maxSteps": 5}, "resources": {"memory": "8Gi"}}
    job = build("train", **spec)
    assert container_of(job)["args"] == [
        "train",
        "--job",
        "/etc/qlora/job.json",
        "--workspace",
        f"/workspace/{NAME}-0a1b2c3d",
    ]
    assert "command" not in container_of(job)
    text = job["spec"]["template"]["metadata"]["annotations"]["qlora.dev/spec"]
    document = QLoRAJobDocument.model_validate_json(text)
    assert (document.metadata.name, document.metadata.namespace, document.metadata.uid) == (NAME, "team", UID)
    assert document.spec == make_job(**spec).spec
    assert document.spec.training.learning_rate == 3e-4
    items = next(volume for volume in pod_of(job)["volumes"] if volume["name"] == "job")["downwardAPI"]["items"]
    assert items == [{"path": "job.json", "fieldRef": {"fieldPath": "metadata.annotations['qlora.dev/spec']"}}]
    assert environment_of(job)["QLORA_ATTEMPT"] == "2"
    assert environment_of(job)["QLORA_WORKSPACE_CLAIM"] == WORKSPACE


def document_of(job: dict[str, Any]) -> dict[str, Any]:
    return json.loads(job["spec"]["template"]["metadata"]["annotations"]["qlora.dev/spec"])


def test_the_document_is_fixed_when_the_job_starts() -> None:
    fixed = resolved().model_copy(update={"document": '{"spec":{"fixed":true}}'})
    assert document_of(build_job(make_job(), fixed, "publish", 1)) == {"spec": {"fixed": True}}


@pytest.mark.parametrize(
    ("profile", "resources", "expected"),
    [
        ({"gpuMemory": "79Gi"}, {}, ("79Gi", "24Gi")),
        ({"gpuMemory": "79Gi"}, {"gpuMemory": "22Gi", "memory": "64Gi"}, ("22Gi", "64Gi")),
        ({}, {"gpuMemory": "22Gi"}, ("22Gi", "24Gi")),
        ({"gpuMemory": "79Gi", "device": "cpu", "gpuResource": None}, {}, (None, "24Gi")),
        ({}, {}, (None, "24Gi")),
    ],
    ids=["the profile's", "the job's", "the GPU's of the job", "on a CPU", "none"],
)
def test_the_memory_of_gpu_and_pod_is_the_profiles_if_the_job_sets_none(
    profile: dict[str, Any], resources: dict[str, Any], expected: tuple[str | None, str | None]
) -> None:
    text = build("prepare", profile, resources=resources)["spec"]["template"]["metadata"]["annotations"][
        "qlora.dev/spec"
    ]
    found = json.loads(text)["spec"].get("resources", {})
    assert (found.get("gpuMemory"), found.get("memory")) == expected


def test_the_document_has_no_operator_only_field() -> None:
    spec: dict[str, Any] = {
        "scheduling": {"queueName": "gpus"},
        "retry": {"request": "a", "onNoProgress": "restart"},
        "progressDeadlineSeconds": 600,
        "suspend": False,
    }
    assert document_of(build("train", **spec)) == document_of(build("train"))
    assert not {"scheduling", "retry", "suspend", "workspace"} & document_of(build("train"))["spec"].keys()


def test_only_train_waits_in_the_queue_and_only_the_job_has_its_labels() -> None:
    queued = resolved().model_copy(update={"queue_name": "gpus", "queue_priority_class_name": "high"})
    labels = {"kueue.x-k8s.io/queue-name": "gpus", "kueue.x-k8s.io/priority-class": "high"}
    for step in STEPS:
        job = build_job(make_job(), queued, step, 1)
        wanted = labels if step == "train" else {}
        assert {key: value for key, value in job["metadata"]["labels"].items() if "kueue" in key} == wanted
        assert job["spec"].get("suspend") == (True if step == "train" else None)
        assert not any("kueue" in key for key in job["spec"]["template"]["metadata"]["labels"])
    assert "suspend" not in build("train")["spec"]


def test_failures_in_earlier_jobs_of_a_step_reduce_the_backoff_limit() -> None:
    job = make_job(retry={"maxFailures": 3})
    assert build_job(job, resolved(), "train", 2, failures=2)["spec"]["backoffLimit"] == 1
    assert build_job(job, resolved(), "train", 2, failures=9)["spec"]["backoffLimit"] == 0


def test_without_an_operator_a_job_ends_a_week_after_its_deadline() -> None:
    week = 7 * 24 * 3600
    for step in ("prepare", "train", "publish"):
        assert build(step)["spec"]["activeDeadlineSeconds"] == week
    job = make_job(activeDeadlineSeconds=100)
    assert build_job(job, resolved(), "train", 1)["spec"]["activeDeadlineSeconds"] == week + 100
    assert "activeDeadlineSeconds" not in build("clean")["spec"]


def test_a_finished_job_and_its_pods_go_after_a_day() -> None:
    assert build("prepare")["spec"]["ttlSecondsAfterFinished"] == 86_400
    assert build("prepare", {"finishedJobSeconds": 7200})["spec"]["ttlSecondsAfterFinished"] == 7200


@pytest.mark.parametrize("step", STEPS)
def test_only_train_costs_a_gpu(step: StepName) -> None:
    resources = container_of(build(step, resources={"cpu": "8", "memory": "9Gi"}))["resources"]
    expected = (
        {
            "requests": {"cpu": "8", "memory": "9Gi"},
            "limits": {"memory": "9Gi", "nvidia.com/gpu": "1"},
        }
        if step == "train"
        else {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
    )
    assert resources == expected


def test_several_gpus_are_requested_with_their_shared_memory() -> None:
    job = build("train", resources={"gpus": 4})
    assert container_of(job)["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert mounts_of(job)["/dev/shm"] == ("emptyDir", True)
    (volume,) = (volume for volume in pod_of(job)["volumes"] if volume["name"] == "shared-memory")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert "/dev/shm" not in mounts_of(build("train"))
    assert "/dev/shm" not in mounts_of(build("publish", resources={"gpus": 4}))
    on_cpu = container_of(build("train", {"gpuResource": None}, resources={"gpus": 2}))
    assert on_cpu["resources"]["limits"].keys() == {"memory"}


def test_train_gets_the_time_to_save_and_is_left_alone() -> None:
    job = build("train", {"terminationGracePeriodSeconds": 300})
    assert pod_of(job)["terminationGracePeriodSeconds"] == 300
    assert pod_of(build("prepare", {"terminationGracePeriodSeconds": 300}))["terminationGracePeriodSeconds"] == 30
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"


@pytest.mark.parametrize("step", STEPS)
def test_no_service_mesh_adds_a_proxy_that_would_outlive_the_step(step: StepName) -> None:
    """Istio reads the label of the pod, older releases and Linkerd the annotation."""
    metadata = build(step)["spec"]["template"]["metadata"]
    assert metadata["labels"]["sidecar.istio.io/inject"] == "false"
    assert metadata["annotations"]["sidecar.istio.io/inject"] == "false"
    assert metadata["annotations"]["linkerd.io/inject"] == "disabled"


def test_libraries_start_as_many_threads_as_the_pod_requests_cpus() -> None:
    """A pod without a CPU limit would start a thread for each core of the node."""
    (threads,) = [entry for entry in container_of(build("train"))["env"] if entry["name"] == "OMP_NUM_THREADS"]
    assert threads["valueFrom"] == {"resourceFieldRef": {"resource": "requests.cpu"}}
    assert "cpu" not in container_of(build("train"))["resources"]["limits"]


@pytest.mark.parametrize(("topology", "everywhere"), [("zonal", True), ("node-local", True), ("shared", False)])
def test_all_steps_run_where_the_volume_is(topology: str, everywhere: bool) -> None:
    profile = {
        "workspace": {"topology": topology},
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "team", "value": "a"}],
    }
    scheduling = {
        "nodeSelector": {"pool": "mine", "disk": "fast"},
        "tolerations": [{"key": "mine", "operator": "Exists"}],
    }
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for step in STEPS:
        pod = pod_of(build(step, profile, scheduling=scheduling))
        if step == "train" or everywhere:
            assert pod["nodeSelector"] == {"pool": "gpu", "disk": "fast"}
            assert pod["tolerations"] == [
                {"key": "team", "value": "a"},
                {"key": "mine", "operator": "Exists"},
                gpu,
            ]
        else:
            assert not {"nodeSelector", "tolerations"} & set(pod)


def test_settings_absent_from_the_profile_are_left_out() -> None:
    assert not {
        "nodeSelector",
        "runtimeClassName",
        "priorityClassName",
        "serviceAccountName",
        "imagePullSecrets",
    } & set(pod_of(build("train", {"gpuResource": None})))


def test_settings_of_the_profile_are_in_the_manifest() -> None:
    profile = {"runtimeClassName": "nvidia", "serviceAccountName": "jobs", "imagePullSecrets": ["registry"]}
    pod = pod_of(build("train", profile, scheduling={"priorityClassName": "low"}))
    assert (pod["runtimeClassName"], pod["serviceAccountName"], pod["priorityClassName"]) == ("nvidia", "jobs", "low")
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert "runtimeClassName" not in pod_of(build("prepare", profile))


@pytest.mark.parametrize("step", STEPS)
def test_a_profile_can_harden_pods_where_the_cluster_supports_it(step: StepName) -> None:
    """No default: NFS has no idmapped mounts, older nodes reject the policy, and queues lack the quota."""
    resources = {name: {"ephemeralStorage": "6Gi"} for name in ("prepare", "train", "publish")}
    hard = build(step, {"hostUsers": False, "runAs": {"supplementalGroupsPolicy": "Strict"}, "resources": resources})
    assert pod_of(hard)["hostUsers"] is False
    assert pod_of(hard)["securityContext"]["supplementalGroupsPolicy"] == "Strict"
    for kind in ("requests", "limits"):
        assert container_of(hard)["resources"][kind]["ephemeral-storage"] == "6Gi"
    plain = build(step, {"runAs": {}})
    assert "hostUsers" not in pod_of(plain)
    assert "supplementalGroupsPolicy" not in pod_of(plain)["securityContext"]
    assert "ephemeral-storage" not in to_json(container_of(plain)["resources"])


def test_a_claim_outlives_its_job_unless_that_is_chosen() -> None:
    claim = build_claim(make_job(), resolved())
    assert claim["metadata"]["name"] == WORKSPACE
    assert "ownerReferences" not in claim["metadata"]
    assert claim["metadata"]["labels"]["qlora.dev/job-uid"] == UID
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}}
    deleted = {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}
    spec: dict[str, Any] = {
        "workspace": {"size": "9Gi", "storageClassName": "fast", "accessModes": ["ReadWriteMany"]} | deleted,
        "output": {"destination": "pvc://adapters/tuned"},
    }
    claim = build_claim(make_job(**spec), resolved())
    owner = claim["metadata"]["ownerReferences"][0]
    assert (owner["uid"], owner.get("controller", False)) == (UID, False)
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "9Gi"}},
        "storageClassName": "fast",
    }


def test_the_same_job_gives_the_same_manifest() -> None:
    once, again = (json.dumps(build_job(make_job(**EVERYTHING), resolved(PROFILE), "train", 1)) for _ in range(2))
    assert once == again


def test_only_publish_gets_the_price_of_a_gpu_hour_for_its_report() -> None:
    priced = {"gpuHourPrice": "2.50", "currency": "EUR"}
    assert environment_of(build("publish", priced))["QLORA_GPU_HOUR_PRICE"] == "2.50 EUR"
    assert "QLORA_GPU_HOUR_PRICE" not in environment_of(build("train", priced))
    assert "QLORA_GPU_HOUR_PRICE" not in environment_of(build("publish"))
