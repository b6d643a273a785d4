"""Jobs and claims that a sweep creates for its cells, and what it reads of them."""

from typing import Any

from qlora_api.naming import workspace_folder
from qlora_api.profile import Profile
from qlora_api.status import StepName
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.decisions.sweeps.sweep import (
    QLoRASweep,
    build_cell,
    build_sweep_claim,
    parse_cell,
    parse_sweep,
    sweep_of,
)
from tests.support.builders import ADAPTER, PROFILE, UID, condition, job_body, present, resolved, step_status
from tests.support.sweeps import SWEEP, TEMPLATE

NAME = "rates"
OWNER = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": NAME, "uid": UID, "controller": True}


def make(status: QLoRASweepStatus | None = None, template: dict[str, Any] | None = None, **spec: Any) -> QLoRASweep:
    content = SWEEP["spec"] | {"template": {"spec": TEMPLATE | (template or {})}} | spec
    metadata = {"namespace": "team", "name": NAME, "uid": UID, "generation": 2, "resourceVersion": "7"}
    return parse_sweep({"metadata": metadata, "spec": content, "status": status.dump() if status else {}})


def test_a_cell_is_a_job_that_the_sweep_controls_without_its_other_labels() -> None:
    body = {
        "metadata": {
            "namespace": "team",
            "name": NAME,
            "uid": UID,
            "labels": {"kueue.x-k8s.io/queue-name": "gpus", "argocd.argoproj.io/instance": "app"},
            "annotations": {"a": "b"},
        },
        "spec": SWEEP["spec"],
    }
    sweep = parse_sweep(body)
    manifest = build_cell(sweep, sweep.cells()[0])
    metadata = manifest["metadata"]
    assert metadata["labels"] == {
        "app.kubernetes.io/part-of": "qlora",
        "app.kubernetes.io/managed-by": "qlora-operator",
        "qlora.dev/sweep": NAME,
        "qlora.dev/sweep-uid": UID,
        "kueue.x-k8s.io/queue-name": "gpus",
    }
    assert "annotations" not in metadata
    assert metadata["ownerReferences"] == [OWNER | {"blockOwnerDeletion": False}]
    assert sweep_of(manifest) == NAME
    (owner,) = manifest["metadata"]["ownerReferences"]
    assert sweep_of({"metadata": {"ownerReferences": [owner | {"apiVersion": "qlora.dev/v9"}]}}) == NAME
    job = parse_job({"metadata": metadata | {"uid": "x"}, "spec": manifest["spec"]})
    assert (job.problem, job.queue_name, job.spec.workspace.claim_name) == ("", "gpus", f"{NAME}-0a1b2c3d")


def test_the_claim_of_the_cells_outlives_the_sweep_unless_that_is_not_wanted() -> None:
    kept = build_sweep_claim(make(template={"workspace": {"size": "7Gi"}}), PROFILE)
    assert kept["metadata"]["name"] == f"{NAME}-0a1b2c3d"
    assert kept["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "7Gi"}}}
    assert "ownerReferences" not in kept["metadata"]
    policy = {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}
    template = {"workspace": policy, "output": {"destination": "s3://bucket/adapters"}}
    (owner,) = build_sweep_claim(make(template=template), PROFILE)["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("QLoRASweep", UID)


def test_what_is_read_of_a_cell() -> None:
    status = {
        "phase": "Succeeded",
        "conditions": [condition("Succeeded", "True"), condition("Failed", "False")],
        "progress": {"summary": "100% 10/10", "loss": 1.0, "evalLoss": 1.5},
        "adapter": ADAPTER.dump(),
    }
    body = job_body(status, suspend=True)
    assert parse_cell(body, UID) is None, "no owner"
    body["metadata"] |= {"ownerReferences": [OWNER]}
    found = present(parse_cell(body, UID))
    assert (found.phase, found.eval_loss, found.adapter, found.suspend) == ("Succeeded", 1.5, ADAPTER.uri, True)
    assert parse_cell(body, "another") is None
    assert not found.trained
    body["status"]["step"] = step_status("publish").dump()
    assert present(parse_cell(body, UID)).trained
    assert present(parse_cell(body | {"status": {"phase": 3}}, UID)).phase == "Pending"


def test_cells_share_a_folder_and_an_owner_that_is_no_sweep_leads_nowhere() -> None:
    def shares(**owner: Any) -> str | None:
        body = job_body()
        body["metadata"] |= {"ownerReferences": [OWNER | owner]}
        return parse_job(body).shares

    assert shares() == f"{NAME}-0a1b2c3d.sweep"
    assert shares(name="rates", uid=UID) != workspace_folder("rates", UID), "a job's own folder is never shared"
    assert shares(apiVersion="qlora.dev/v9") == shares(), "an owner of another version is the same sweep"
    assert shares(apiVersion="qlora.example/v1") is None
    assert shares(kind="CronJob") is None
    assert shares(controller=False) is None
    assert shares(name="../../etc") is None
    assert shares(name="a\n") is None
    assert shares(name="a" * 43) is None
    assert shares(uid="../../..") is None
    assert parse_job(job_body()).shares is None


def test_cells_share_rows_and_without_a_model_cache_the_base() -> None:
    body = job_body()
    body["metadata"] |= {"ownerReferences": [OWNER]}
    cached = Profile.model_validate(PROFILE.dump() | {"modelCache": {"claimName": "model-cache"}})

    def environment(step: StepName, profile: Profile, body: dict[str, Any] = body) -> dict[str, str]:
        job = parse_job(body)
        shared = resolved(profile).model_copy(update={"shared_path": job.shares})
        (container,) = build_job(job, shared, step, 1)["spec"]["template"]["spec"]["containers"]
        return {entry["name"]: entry.get("value", "") for entry in container["env"]}

    folder = f"/workspace/{NAME}-0a1b2c3d.sweep"
    steps: tuple[StepName, ...] = ("prepare", "train", "publish")
    assert [environment(step, PROFILE).get("QLORA_MODEL_CACHE") for step in steps] == [folder] * 3
    assert [environment(step, cached).get("QLORA_MODEL_CACHE") for step in steps] == ["/model-cache"] * 3
    volume = body | {"spec": body["spec"] | {"model": {"source": "pvc://models/base"}}}
    assert [environment(step, cached, volume).get("QLORA_MODEL_CACHE") for step in steps] == [folder] * 3
    assert [environment(step, cached).get("QLORA_SWEEP_FOLDER") for step in steps] == [folder] * 3
    best = body | {"spec": body["spec"] | {"continues": "rates-00"}}
    assert environment("publish", PROFILE, best).get("QLORA_MODEL_CACHE") == folder
    for step in ("train", "publish"):
        assert "QLORA_SWEEP_FOLDER" not in environment(step, PROFILE, best), "that cell is on the page already"
    assert environment("prepare", PROFILE, best).get("QLORA_SWEEP_FOLDER") == folder, "it has the cells' rows"
    assert not environment("publish", PROFILE, job_body()).keys() & {"QLORA_MODEL_CACHE", "QLORA_SWEEP_FOLDER"}


def test_a_cell_is_read_with_its_gpu_time() -> None:
    lost = {"startup": "0.0014", "failure": "0.0019"}
    usage = {"gpuHours": "0.025", "lostGpuHours": lost, "cost": "0.06 EUR", "pods": []}
    body = job_body({"usage": usage})
    found = present(parse_cell(body | {"metadata": body["metadata"] | {"ownerReferences": [OWNER]}}, UID))
    assert (found.gpu_seconds, found.lost_gpu_seconds, found.cost) == (90, 12, "0.06 EUR")
