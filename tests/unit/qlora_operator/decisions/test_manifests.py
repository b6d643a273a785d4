"""The objects that the operator makes: the mounts, rights and cost of each step."""

import json
from typing import Any

import pytest

from qlora_api.contract import PERMANENT_EXIT_CODES
from qlora_api.profile import Profile
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.status import StepName
from qlora_operator.decisions.manifests.objects import build_claim, build_job
from tests.support.builders import NAME, PROFILE, UID, make_job, resolved, to_json

STEPS: tuple[StepName, ...] = ("prepare", "train", "publish", "clean")
WORKSPACE = f"{NAME}-0a1b2c3d"
EVERYTHING: dict[str, Any] = {
    "model": {"source": "hf://org/model", "tokenSecretRef": {"name": "hub", "key": "read"}},
    "dataset": {"source": "configMap://rows/a.jsonl", "eval": {"source": "pvc://held-out/b.jsonl"}},
    "lora": {"from": {"source": "pvc://earlier/first"}},
    "output": {"destination": "pvc://adapters/tuned"},
}


def build(step: StepName, /, profile: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    full = Profile.model_validate({"image": "example.org/trainer", "gpuResource": "nvidia.com/gpu"} | (profile or {}))
    return build_job(make_job(**spec), resolved(full), step, 2)


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    return pod_of(job)["containers"][0]


def environment_of(job: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container_of(job)["env"]}


def mounts_of(job: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Mount path -> (volume, whether it can be written)."""
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    assert len(volumes) == len(pod_of(job)["volumes"])

    def kind(volume: dict[str, Any]) -> str:
        claim = volume.get("persistentVolumeClaim")
        return claim["claimName"] if claim else next(key for key in volume if key != "name")

    return {
        mount["mountPath"]: (kind(volumes[mount["name"]]), not mount.get("readOnly", False))
        for mount in container_of(job)["volumeMounts"]
    }


def test_the_job_belongs_to_the_qlorajob_and_is_named_after_it() -> None:
    job = build("train")
    assert job["metadata"]["name"] == f"{NAME}-train-2"
    assert job["metadata"]["ownerReferences"] == [
        {
            "apiVersion": "qlora.dev/v1alpha1",
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


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            "prepare",
            {
                "/volumes/held-out": ("held-out", False),
                "/volumes/earlier": ("earlier", False),
                "/config-maps/rows": ("configMap", False),
                "/volumes/adapters": ("adapters", False),
                "/secrets/model": ("secret", False),
            },
        ),
        ("train", {}),
        ("publish", {"/volumes/adapters": ("adapters", True)}),
        ("clean", {}),
    ],
)
def test_a_step_mounts_only_its_required_volumes(step: StepName, expected: dict[str, Any]) -> None:
    assert mounts_of(build(step, **EVERYTHING)) == expected | {
        "/etc/qlora": ("downwardAPI", False),
        "/workspace": (WORKSPACE, True),
        "/tmp": ("emptyDir", True),
    }


@pytest.mark.parametrize("step", STEPS)
def test_only_training_on_a_cpu_is_given_another_allocator(step: StepName) -> None:
    on_cpu, on_gpu = build(step, {"device": "cpu", "gpuResource": None}), build(step)
    assert environment_of(on_cpu).get("LD_PRELOAD") == ("libtcmalloc_minimal.so.4" if step == "train" else None)
    assert "LD_PRELOAD" not in environment_of(on_gpu)


def test_train_has_no_secret_and_nothing_that_leads_to_the_network() -> None:
    job = build("train", {"hubEndpoint": "https://hub.example.org"}, **EVERYTHING)
    assert set(environment_of(job)) == {
        "QLORA_POD_UID",
        "QLORA_ATTEMPT",
        "QLORA_CONTRACT_VERSION",
        "QLORA_DEVICE",
        "QLORA_WORKSPACE_CLAIM",
        "HOME",
        "OMP_NUM_THREADS",
    }
    assert "hub.example.org" not in to_json(job)
    assert not {"secret", "configMap", "projected"} & {kind for volume in pod_of(job)["volumes"] for kind in volume}


def test_only_steps_with_a_network_get_the_servers_of_the_profile() -> None:
    profile = {
        "hubEndpoint": "https://hub.example.org",
        "objectStore": {"endpoint": "http://s3.example.org:9000", "region": "eu-central-1"},
        "registries": ["registry.example.org", "http://registry.local:5000"],
    }
    servers = {
        "HF_ENDPOINT": "https://hub.example.org",
        "AWS_ENDPOINT_URL": "http://s3.example.org:9000",
        "AWS_REGION": "eu-central-1",
        "QLORA_REGISTRIES": "registry.example.org http://registry.local:5000",
    }
    for step in STEPS:
        found = {name: value for name, value in environment_of(build(step, profile)).items() if name in servers}
        assert found == (servers if step in ("prepare", "publish") else {})


OBJECTS: dict[str, Any] = {
    "model": {"source": "oci://ghcr.io/acme/tiny:v1", "secretRef": {"name": "pull"}},
    "dataset": {"source": "s3://rows/a.jsonl", "secretRef": {"name": "read"}},
    "lora": {"from": {"source": "hf://acme/first", "secretRef": {"name": "earlier"}}},
    "output": {"destination": "s3://adapters/tuned", "secretRef": {"name": "write"}},
}
S3_KEYS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (
            "prepare",
            {
                "/credentials/model": ("pull", {".dockerconfigjson"}),
                "/credentials/dataset": ("read", S3_KEYS),
                "/credentials/lora": ("earlier", {"token"}),
                # The destination is tried before the training, not after.
                "/credentials/output": ("write", S3_KEYS),
            },
        ),
        ("train", {}),
        ("publish", {"/credentials/output": ("write", S3_KEYS)}),
        ("clean", {}),
    ],
)
def test_credentials_are_files_of_the_step_that_needs_them(step: StepName, expected: dict[str, Any]) -> None:
    job = build(step, **OBJECTS)
    secrets = {volume["name"]: volume["projected"] for volume in pod_of(job)["volumes"] if "projected" in volume}
    found = {}
    for mount in container_of(job)["volumeMounts"]:
        if secret := secrets.get(mount["name"]):
            assert mount["readOnly"]
            assert secret["defaultMode"] == 0o440
            sources = [source["secret"] for source in secret["sources"]]
            items = [item for source in sources for item in source["items"]]
            assert all(item["key"] == item["path"] for item in items)
            # Only a key that need not exist is optional: for the others the pod waits.
            optional = {item["key"] for source in sources if source.get("optional") for item in source["items"]}
            assert optional <= {"AWS_SESSION_TOKEN"}
            found[mount["mountPath"]] = (sources[0]["name"], {item["key"] for item in items})
    assert found == expected
    assert not any("valueFrom" in entry and "secretKeyRef" in entry["valueFrom"] for entry in container_of(job)["env"])


TRACKED: dict[str, Any] = {
    "training": {"reportTo": ["tensorboard", "mlflow", "wandb"]},
    "output": {"tracking": {"secretRef": {"name": "trackers"}}},
}
WITH_TRACKERS = {
    "tracking": {"mlflow": {"url": "https://mlflow.example.org/team"}, "wandb": {"url": "https://api.wandb.ai"}},
    "signingKey": {"name": "signing", "key": "cosign.pem"},
    "image": "registry.example.org/trainer@sha256:0",
}


@pytest.mark.parametrize("step", STEPS)
def test_only_publish_gets_trackers_and_the_signing_key(step: StepName) -> None:
    job = build(step, WITH_TRACKERS, **TRACKED)
    given = {
        "QLORA_MLFLOW_SERVER": "https://mlflow.example.org/team",
        "QLORA_WANDB_SERVER": "https://api.wandb.ai",
        "QLORA_IMAGE": "registry.example.org/trainer@sha256:0",
    }
    found = {name: value for name, value in environment_of(job).items() if name in given}
    assert found == (given if step == "publish" else {})
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    mounts = {mount["name"]: mount for mount in container_of(job)["volumeMounts"]}
    if step != "publish":
        assert not {"tracking-credentials", "signing-key"} & volumes.keys()
        return
    sources = [source["secret"] for source in volumes["tracking-credentials"]["projected"]["sources"]]
    assert {source["name"] for source in sources} == {"trackers"}
    assert {item["key"] for source in sources for item in source["items"]} == {
        *("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY")
    }
    # The adapter does not wait for them, but for the key.
    assert all(source["optional"] and len(source["items"]) == 1 for source in sources)
    signing = volumes["signing-key"]["secret"]
    assert (signing["secretName"], signing["items"]) == ("signing", [{"key": "cosign.pem", "path": "private.pem"}])
    assert "optional" not in signing
    assert mounts["signing-key"]["mountPath"] == "/secrets/signing"
    assert mounts["tracking-credentials"]["mountPath"] == "/credentials/tracking"


def test_a_merged_model_gets_the_keys_of_its_scheme() -> None:
    output = {"destination": "hf://acme/adapter", "merged": {"destination": "oci://ghcr.io/acme/merged:v1"}}
    job = build("publish", output=output | {"secretRef": {"name": "write"}})
    (secret,) = [volume["projected"] for volume in pod_of(job)["volumes"] if "projected" in volume]
    assert [item["key"] for item in secret["sources"][0]["secret"]["items"]] == [".dockerconfigjson", "token"]


def test_only_prepare_mounts_the_chat_template_and_data_of_one_config_map() -> None:
    dataset = {"source": "configMap://rows/a.jsonl", "chatTemplate": "configMap://rows/ours.jinja"}
    (volume,) = [volume for volume in pod_of(build("prepare", dataset=dataset))["volumes"] if "configMap" in volume]
    assert [item["key"] for item in volume["configMap"]["items"]] == ["a.jsonl", "ours.jinja"]
    named = {"source": "hf://org/rows", "chatTemplate": "chatml"}
    for job in (build("train", dataset=dataset), build("prepare", dataset=named)):
        assert not any("configMap" in volume for volume in pod_of(job)["volumes"])


def test_a_pod_waits_for_later_objects_and_the_token_is_a_separate_file() -> None:
    volumes = {volume["name"]: volume for volume in pod_of(build("prepare", **EVERYTHING))["volumes"]}
    items = [{"key": "a.jsonl", "path": "a.jsonl"}]
    assert volumes["config-map-0"]["configMap"] == {"name": "rows", "items": items}
    assert volumes["token"]["secret"] == {
        "secretName": "hub",
        "items": [{"key": "read", "path": "token"}],
        "defaultMode": 0o440,
    }


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("prepare", {"/volumes/base": ("base", False), "/volumes/rows": ("rows", False)}),
        ("train", {"/volumes/base": ("base", False)}),
        ("publish", {"/volumes/base": ("base", False)}),
        ("clean", {}),
    ],
)
def test_a_model_on_a_volume_is_mounted_read_only(step: StepName, expected: dict[str, Any]) -> None:
    job = build(step, model={"source": "pvc://base/m"}, dataset={"source": "pvc://rows/a.jsonl"})
    mounts = mounts_of(job)
    assert {path: mount for path, mount in mounts.items() if path.startswith("/volumes")} == expected


def test_the_sources_of_a_mix_are_mounted_for_prepare_alone() -> None:
    mix = [
        *({"source": f"pvc://rows/{name}.jsonl"} for name in "ab"),
        *({"source": f"configMap://small/{name}.jsonl"} for name in "cd"),
        {"source": "s3://bucket/rows"},
    ]
    dataset = {"source": None, "mix": mix, "secretRef": {"name": "store"}, "eval": {"source": "pvc://held-out/e.jsonl"}}
    job = build("prepare", dataset=dataset)
    read = ("/volumes", "/config-maps", "/credentials")
    assert {path: mount for path, mount in mounts_of(job).items() if path.startswith(read)} == {
        "/volumes/rows": ("rows", False),
        "/volumes/held-out": ("held-out", False),
        "/config-maps/small": ("configMap", False),
        "/credentials/dataset": ("projected", False),
    }
    volumes = {volume["name"]: volume for volume in pod_of(job)["volumes"]}
    assert [item["key"] for item in volumes["config-map-0"]["configMap"]["items"]] == ["c.jsonl", "d.jsonl"]
    keys = volumes["dataset-credentials"]["projected"]["sources"][0]["secret"]["items"]
    assert [item["key"] for item in keys] == ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    trained = mounts_of(build("train", dataset=dataset))
    assert not [path for path in trained if path.startswith(read)]


CACHED = {"modelCache": {"claimName": "models"}}


@pytest.mark.parametrize(
    ("step", "writable"), [("prepare", True), ("train", False), ("publish", False), ("clean", None)]
)
@pytest.mark.parametrize("source", ["hf://org/model", "s3://bucket/model", "oci://ghcr.io/acme/tiny:v1"])
def test_only_prepare_may_write_to_the_cache_of_models(source: str, step: StepName, writable: bool | None) -> None:
    job = build(step, CACHED, model={"source": source})
    expected = {} if writable is None else {"/model-cache": ("models", writable)}
    assert {path: mount for path, mount in mounts_of(job).items() if mount[0] == "models"} == expected
    assert environment_of(job).get("QLORA_MODEL_CACHE") == (None if writable is None else "/model-cache")


@pytest.mark.parametrize("step", STEPS)
def test_a_model_that_is_read_in_place_needs_no_cache(step: StepName) -> None:
    job = build(step, CACHED, model={"source": "pvc://base/m"})
    assert "/model-cache" not in mounts_of(job)
    assert "QLORA_MODEL_CACHE" not in environment_of(job)


def test_one_claim_for_everything_is_one_volume_with_several_mounts() -> None:
    spec: dict[str, Any] = {
        "model": {"source": f"pvc://{WORKSPACE}/m"},
        "dataset": {"source": f"pvc://{WORKSPACE}/a.jsonl"},
        "output": {"destination": f"pvc://{WORKSPACE}/out"},
    }
    for step, writable in (("prepare", False), ("train", False), ("publish", True)):
        job = build(step, **spec)  # type: ignore[arg-type]
        mounts = mounts_of(job)
        assert mounts["/workspace"] == (WORKSPACE, True)
        assert mounts[f"/volumes/{WORKSPACE}"] == (WORKSPACE, writable)
        claims = [volume for volume in pod_of(job)["volumes"] if "persistentVolumeClaim" in volume]
        assert claims == [{"name": "workspace", "persistentVolumeClaim": {"claimName": WORKSPACE}}]


def test_the_trainer_is_given_the_document_and_its_own_folder() -> None:
    job = build("train", training={"learningRate": 3e-4, "maxSteps": 5})
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
    assert document.spec == make_job(training={"learningRate": 3e-4, "maxSteps": 5}).spec
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


def test_the_document_has_no_operator_only_field() -> None:
    spec: dict[str, Any] = {
        "scheduling": {"queueName": "gpus"},
        "retry": {"request": 1, "onNoProgress": "restart"},
        "progressDeadlineSeconds": 600,
        "suspend": False,
    }
    assert document_of(build("train", **spec)) == document_of(build("train"))
    assert not {"scheduling", "retry", "suspend", "workspace"} & document_of(build("train"))["spec"].keys()


def test_a_trainer_that_counts_suspensions_gets_a_high_disruption_limit() -> None:
    begun = resolved().model_copy(update={"contract_version": 1})
    job = build_job(make_job(retry={"maxDisruptions": 3}), begun, "train", 1)
    assert document_of(job)["spec"]["retry"] == {"maxDisruptions": 1000}
    assert environment_of(job)["QLORA_CONTRACT_VERSION"] == "1"


def test_only_train_waits_in_the_queue_and_only_the_job_has_its_labels() -> None:
    queued = resolved().model_copy(update={"queue_name": "gpus", "queue_priority": "high"})
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
    assert volume["emptyDir"]["medium"] == "Memory"
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
    """A request, because the pod has no limit of CPU: the limit would be read as all cores of the node."""
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


def test_a_claim_outlives_its_job_unless_that_is_chosen() -> None:
    claim = build_claim(make_job(), resolved())
    assert claim["metadata"]["name"] == WORKSPACE
    assert "ownerReferences" not in claim["metadata"]
    assert claim["metadata"]["labels"]["qlora.dev/job-uid"] == UID
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "50Gi"}}}
    spec: dict[str, Any] = {
        "workspace": {"retain": False, "size": "9Gi", "storageClassName": "fast", "accessModes": ["ReadWriteMany"]},
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
