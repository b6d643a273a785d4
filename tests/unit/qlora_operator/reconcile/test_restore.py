"""A job that was restored from a backup, with another UID: it resumes its run, or reports what that needs."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qlora_api.naming import JOB_UID_LABEL, RESTORED_ANNOTATION, workspace_claim_name, workspace_folder
from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.manifests.objects import document
from tests.support.builders import (
    NAME,
    PROFILE,
    REVISION,
    UID,
    child,
    condition,
    job_body,
    make_job,
    message_of,
    pod,
    reason_of,
    resolved,
    revision_body,
    running,
    status_in,
    time,
)
from tests.support.cluster.memory_cluster import MemoryCluster, reconcile, shown

Change = Callable[[MemoryCluster], None]
SECOND = "5e4d3c2b-0000-4000-8000-000000000000"
FIRST = "9f8e7d6c-0000-4000-8000-000000000000"
CLAIM = workspace_claim_name(NAME, FIRST)
HELD_OUT = {"source": "hf://org/rows", "eval": {"fraction": 0.1}}
OF_FIRST = {"labels": {JOB_UID_LABEL: FIRST}}


def restored(status: dict[str, Any] | None = None, /, **spec: Any) -> MemoryCluster:
    """The job as a backup tool has made it, with its revision and its claim."""
    body = job_body(status, **spec)
    body["metadata"]["annotations"] = {RESTORED_ANNOTATION: "true"}
    # The GPU's memory may be the profile's, which may have changed since.
    content = json.loads(document(make_job(**spec), replace(PROFILE, gpu_memory="79Gi")))
    content["metadata"]["uid"] = FIRST
    fixed = replace(
        resolved(PROFILE.model_copy(update={"image": "example.org/old"})),
        document=json.dumps(content),
        claim_name=CLAIM,
        workspace_path=workspace_folder(NAME, FIRST),
    )
    cluster = MemoryCluster(body)
    cluster.revisions = {REVISION: revision_body(fixed) | {"metadata": {"name": REVISION, **OF_FIRST}}}
    cluster.claims = {CLAIM: {"metadata": {"name": CLAIM, **OF_FIRST}}}
    return cluster


def image(cluster: MemoryCluster) -> str:
    return str(cluster.jobs[-1]["spec"]["template"]["spec"]["containers"][0]["image"])


@pytest.mark.parametrize("created", [True, False], ids=["shown by the watch", "listed"])
def test_a_restored_job_goes_on_in_the_folder_and_with_the_trainer_of_its_run(created: bool) -> None:
    cluster = restored()
    reconcile(cluster, shown(cluster, created=created))
    status = cluster.status
    assert (status.run_uid, status.current_revision, image(cluster)) == (FIRST, REVISION, "example.org/old")
    assert cluster.revisions[REVISION]["metadata"]["ownerReferences"][0]["uid"] == UID
    assert status.workspace is not None
    assert (status.workspace.claim_name, status.workspace.path) == (CLAIM, workspace_folder(NAME, FIRST))
    assert "owners of a claim" not in cluster.writes


def test_the_claim_of_a_restored_job_goes_with_it_if_it_is_to() -> None:
    policy = {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}
    cluster = restored(workspace=policy, output={"destination": "s3://adapters/tune"})
    reconcile(cluster)
    assert cluster.claims[CLAIM]["metadata"]["ownerReferences"][0]["uid"] == UID


def of_first(status: QLoRAJobStatus) -> dict[str, Any]:
    """The status as a backup has it."""
    return status.dump() | {"workspace": {"claimName": CLAIM, "path": workspace_folder(NAME, FIRST)}}


def test_a_job_whose_status_was_restored_too_keeps_its_run() -> None:
    cluster = restored(of_first(status_in("train")))
    reconcile(cluster)
    assert (cluster.status.run_uid, cluster.status.current_revision) == (FIRST, REVISION)
    assert "PersistentVolumeClaim" not in cluster.writes


def test_a_job_that_is_not_marked_leaves_a_restored_revision_alone() -> None:
    cluster = restored()
    del cluster.job["metadata"]["annotations"]
    reconcile(cluster)
    assert (cluster.status.run_uid, image(cluster)) == (None, PROFILE.image)
    assert "owner of a ControllerRevision" not in cluster.writes


def test_a_job_whose_status_was_restored_too_waits_for_its_revision() -> None:
    cluster = restored(of_first(status_in("train")))
    cluster.revisions = {}
    reconcile(cluster)
    assert {"Job", "ControllerRevision"}.isdisjoint(cluster.writes)


def test_a_finished_job_whose_status_was_restored_keeps_its_revision() -> None:
    conditions = [condition("Succeeded", "True")]
    ends: dict[str, Any] = {"phase": "Succeeded", "completionTime": time(), "conditions": conditions}
    cluster = restored(of_first(status_in("publish")) | ends)
    reconcile(cluster)
    assert cluster.revisions[REVISION]["metadata"]["ownerReferences"][0]["uid"] == UID
    assert (cluster.status.phase, cluster.status.run_uid) == ("Succeeded", FIRST)


def test_a_job_that_is_marked_and_has_a_run_of_its_own_goes_on() -> None:
    status = status_in("train").dump() | {"workspace": {"claimName": "own", "path": workspace_folder(NAME, UID)}}
    cluster = restored(status)
    cluster.jobs, cluster.pods, cluster.revisions = [child("train")], [running(pod("train"))], {}
    reconcile(cluster)
    assert (cluster.status.phase, cluster.status.run_uid, len(cluster.revisions)) == ("Training", None, 1)


def test_a_suspended_job_decides_at_its_start_whether_it_resumes_its_run() -> None:
    cluster = restored(suspend=True)
    again = reconcile(cluster)
    assert (again, cluster.status.phase) == (None, "Suspended")
    assert "owner of a ControllerRevision" not in cluster.writes
    cluster.job["spec"]["suspend"] = False
    reconcile(cluster)
    assert cluster.status.run_uid == FIRST


def with_more_memory(cluster: MemoryCluster) -> None:
    cluster.job["spec"]["resources"] = {"memory": "64Gi"}


def with_a_gate(cluster: MemoryCluster) -> None:
    cluster.job["spec"]["gate"] = {"maxEvalLoss": 2.0}


def of_an_earlier_release(cluster: MemoryCluster) -> None:
    """It lacked a field that has a default."""
    fixed = cluster.revisions[REVISION]["data"]
    content = json.loads(fixed["document"])
    del content["spec"]["training"]["weightDecay"], content["spec"]["quantization"]
    fixed["document"] = json.dumps(content)


def beside_junk(cluster: MemoryCluster) -> None:
    """Of a tenant, who cannot give it the label that admission policies check; and of a release to come."""
    good = dict(cluster.revisions[REVISION])
    unlabeled = good | {"metadata": {"name": "tune-9-a"}, "revision": 99}
    unreadable = good | {"metadata": good["metadata"] | {"name": "tune-9-b"}, "revision": 99, "data": {"claimName": 7}}
    cluster.revisions |= {"tune-9-a": unlabeled, "tune-9-b": unreadable}


@pytest.mark.parametrize("change", [with_more_memory, with_a_gate, of_an_earlier_release, beside_junk])
def test_a_restored_job_resumes_its_run_with(change: Change) -> None:
    cluster = restored(dataset=HELD_OUT)
    change(cluster)
    reconcile(cluster)
    assert (cluster.status.run_uid, len(cluster.jobs)) == (FIRST, 1)


def without_claim(cluster: MemoryCluster) -> None:
    cluster.claims = {}


def with_a_claim_that_goes(cluster: MemoryCluster) -> None:
    cluster.claims[CLAIM] = {"metadata": {"name": CLAIM, "deletionTimestamp": "now", **OF_FIRST}}


def with_an_unlabeled_claim(cluster: MemoryCluster) -> None:
    cluster.claims[CLAIM] = {"metadata": {"name": CLAIM}}


def with_another_score(cluster: MemoryCluster) -> None:
    cluster.job["spec"]["gate"] = {"minScore": 0.5, "score": {"check": "exactMatch"}}


def with_a_guard(cluster: MemoryCluster) -> None:
    guard = {"name": "chat", "source": "pvc://data/chat.jsonl", "maxLossIncrease": 0.1}
    cluster.job["spec"]["gate"] = {"guards": [guard]}


def with_an_old_job(cluster: MemoryCluster) -> None:
    old = child("clean", owner=SECOND)
    old["metadata"]["labels"][JOB_UID_LABEL] = SECOND
    cluster.jobs = [old]


def with_an_old_pod(cluster: MemoryCluster) -> None:
    old = running(pod("train"))
    old["metadata"]["labels"][JOB_UID_LABEL] = SECOND
    cluster.pods = [old]


def with_another_spec(cluster: MemoryCluster) -> None:
    cluster.job["spec"]["training"] = {"epochs": 7}


def with_another_claim(cluster: MemoryCluster) -> None:
    cluster.job["spec"]["workspace"] = {"claimName": "mine"}


def without_revision(cluster: MemoryCluster) -> None:
    cluster.revisions = {}


def with_two_runs(cluster: MemoryCluster) -> None:
    other = json.loads(json.dumps(cluster.revisions[REVISION]).replace(FIRST, SECOND).replace(REVISION, "tune-3-b"))
    cluster.revisions["tune-3-b"] = other | {"revision": 3}


def of_a_cell(cluster: MemoryCluster) -> None:
    cluster.revisions[REVISION]["data"]["sharedPath"] = "rates.sweep"


def with_an_old_role(cluster: MemoryCluster) -> None:
    cluster.rejected = ("owner of a ControllerRevision",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_claim, f"PersistentVolumeClaim {CLAIM}, which has its run, is missing"),
        (with_a_claim_that_goes, f"PersistentVolumeClaim {CLAIM}, which has its run, is missing"),
        (with_an_unlabeled_claim, f"lacks the label {JOB_UID_LABEL}: set it to {FIRST}"),
        (with_another_score, f"ControllerRevision {REVISION} is of another spec"),
        (with_a_guard, f"ControllerRevision {REVISION} is of another spec"),
        (with_an_old_job, f"Job {NAME}-clean-1 may still write"),
        (with_an_old_pod, f"pod {NAME}-train-1-pod1 may still write"),
        (with_another_spec, f"ControllerRevision {REVISION} is of another spec"),
        (with_another_claim, f"ControllerRevision {REVISION} is of another spec"),
        (without_revision, "has no ControllerRevision of it without an owner"),
        (with_two_runs, f"{REVISION}, tune-3-b are of several runs"),
        (of_a_cell, "a cell of a sweep"),
        (with_an_old_role, "exceeded quota"),
    ],
)
def test_a_restored_job_starts_nothing_while_its_run_cannot_be_resumed(change: Change, says: str) -> None:
    cluster = restored(dataset=HELD_OUT)
    change(cluster)
    again = reconcile(cluster)
    assert (again, reason_of(cluster.status)) == (60, "RestoreBlocked")
    assert says in message_of(cluster.status)
    assert {"Job", "ControllerRevision"}.isdisjoint(cluster.writes)
    assert "ownerReferences" not in cluster.revisions.get(REVISION, {"metadata": {}})["metadata"]
