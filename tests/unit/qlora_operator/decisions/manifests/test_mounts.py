"""Volumes, credentials and servers of the steps' pods."""

from typing import Any

import pytest

from qlora_api.status import StepName
from tests.support.builders import to_json
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


EVALUATION = {"image": "trainer:evaluation", "claimName": "tasks", "path": "v1", "sha256": "0" * 64}


@pytest.mark.parametrize("step", STEPS)
def test_tasks_of_benchmarks_are_read_by_the_steps_that_need_them(step: StepName) -> None:
    job = build(step, {"evaluation": EVALUATION}, gate={"benchmarks": [{"task": "arc"}]})
    needed = step in ("prepare", "train")
    assert mounts_of(job).get("/benchmarks") == (("tasks", False) if needed else None)
    assert environment_of(job).get("QLORA_BENCHMARKS") == ("/benchmarks/v1" if needed else None)
    assert environment_of(job).get("QLORA_BENCHMARKS_SHA256") == ("0" * 64 if needed else None)
    assert "/benchmarks" not in mounts_of(build(step, {"evaluation": EVALUATION}))


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


def test_the_rows_of_guards_are_mounted_for_prepare_alone() -> None:
    """Also the credentials of a bucket that only a guard is in."""
    guards = [
        {"name": "chat", "source": "pvc://general/chat.jsonl", "maxLossIncrease": 0.1},
        {"name": "code", "source": "s3://bucket/code.jsonl", "maxLossIncrease": 0.1},
    ]
    spec: dict[str, Any] = {
        "dataset": {"source": "pvc://rows/a.jsonl", "secretRef": {"name": "store"}},
        "gate": {"guards": guards},
    }
    read = ("/volumes/rows", "/volumes/general", "/credentials")
    assert {path: mount for path, mount in mounts_of(build("prepare", **spec)).items() if path.startswith(read)} == {
        "/volumes/rows": ("rows", False),
        "/volumes/general": ("general", False),
        "/credentials/dataset": ("projected", False),
    }
    assert not [path for path in mounts_of(build("train", **spec)) if path.startswith(read)]


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
