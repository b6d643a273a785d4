"""A job that was restored from a backup, with another UID: it resumes its run, or reports what that needs."""

import json
from typing import Any

import pytest

from qlora_api.naming import JOB_UID_LABEL, RESTORED_ANNOTATION, workspace_claim_name, workspace_folder
from qlora_api.schema import replace
from qlora_operator.decisions.manifests.objects import document
from tests.support.builders import (
    NAME,
    PROFILE,
    REVISION,
    UID,
    child,
    job_body,
    make_job,
    message_of,
    reason_of,
    resolved,
    revision_body,
    status_in,
)
from tests.support.cluster.memory_cluster import MemoryCluster, reconcile, shown

FIRST = "9f8e7d6c-0000-4000-8000-000000000000"
CLAIM = workspace_claim_name(NAME, FIRST)
OF_FIRST = {"labels": {JOB_UID_LABEL: FIRST}}


def restored(status: dict[str, Any] | None = None, /, **spec: Any) -> MemoryCluster:
    """The job as a backup tool has made it, with its revision and its claim."""
    body = job_body(status, **spec)
    body["metadata"]["annotations"] = {RESTORED_ANNOTATION: "true"}
    content = json.loads(document(make_job(**spec)))
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


def test_a_job_whose_status_was_restored_too_keeps_its_run() -> None:
    cluster = restored(status_in("train").dump())
    reconcile(cluster)
    assert (cluster.status.run_uid, cluster.status.current_revision) == (FIRST, REVISION)
    assert "PersistentVolumeClaim" not in cluster.writes


def test_a_job_that_is_not_marked_leaves_a_restored_revision_alone() -> None:
    cluster = restored()
    del cluster.job["metadata"]["annotations"]
    reconcile(cluster)
    assert (cluster.status.run_uid, image(cluster)) == (None, PROFILE.image)
    assert "owner of a ControllerRevision" not in cluster.writes


def without_claim(cluster: MemoryCluster) -> None:
    cluster.claims = {}


def with_a_train_job(cluster: MemoryCluster) -> None:
    old = child("train", owner=FIRST)
    old["metadata"]["labels"][JOB_UID_LABEL] = FIRST
    cluster.jobs = [old]


def with_another_spec(cluster: MemoryCluster) -> None:
    cluster.job["spec"]["training"] = {"epochs": 7}


def without_revision(cluster: MemoryCluster) -> None:
    cluster.revisions = {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_claim, f"PersistentVolumeClaim {CLAIM}, which has its run, is missing"),
        (with_a_train_job, f"Job {NAME}-train-1 may still write"),
        (with_another_spec, f"ControllerRevision {REVISION} is of another spec"),
        (without_revision, "has no ControllerRevision of it without an owner"),
    ],
)
def test_a_restored_job_starts_nothing_while_its_run_cannot_be_resumed(change: Any, says: str) -> None:
    cluster = restored()
    change(cluster)
    again = reconcile(cluster)
    assert (again, reason_of(cluster.status)) == (15, "RestoreBlocked")
    assert says in message_of(cluster.status)
    assert {"Job", "ControllerRevision", "owner of a ControllerRevision"}.isdisjoint(cluster.writes)
