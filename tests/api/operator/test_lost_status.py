"""A job whose status was lost, or that was restored, goes on with its revision: a finished run is not trained again."""

import json
from typing import Any

from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually

LOST = json.dumps([{"op": "replace", "path": "/status", "value": {"observedGeneration": -1}}])


def create(operated: Nodeless, name: str) -> None:
    operated.kubectl.apply(json.dumps(MINIMAL | {"metadata": {"name": name, "namespace": NAMESPACE}}))


def lose_status(operated: Nodeless, name: str) -> None:
    where = (name, f"--namespace={NAMESPACE}", "--subresource=status", "--type=json")
    operated.kubectl("patch", "qlorajob", *where, f"--patch={LOST}")


def test_a_finished_job_finishes_again_without_another_train_pod(operated: Nodeless) -> None:
    create(operated, "finished")
    operated.succeed("finished")
    before = operated.wait_for_phase("finished", "Succeeded")["status"]
    operated.kubectl("delete", "jobs", f"--namespace={NAMESPACE}", "--selector=qlora.dev/job=finished")
    eventually(lambda: operated.children("finished", "pods") == [], seconds=60, every=0.2, what="no pod")

    lose_status(operated, "finished")

    operated.find_trained("finished")
    operated.succeed("finished", "publish")
    after = operated.wait_for_phase("finished", "Succeeded")["status"]
    assert operated.children("finished") == ["finished-prepare-1", "finished-publish-1"]
    kept = ("currentRevision", "image", "workspace", "adapter")
    assert {field: after[field] for field in kept} == {field: before[field] for field in kept}
    assert (after["progress"]["percent"], after["modelRevision"]) == (100, before["modelRevision"])


def test_a_job_that_has_just_started_keeps_its_job_and_its_revision(operated: Nodeless) -> None:
    create(operated, "started")
    before = operated.wait_for_phase("started", "Preparing")["status"]
    lose_status(operated, "started")
    after = operated.wait_for_phase("started", "Preparing")["status"]
    assert (after["step"]["jobUid"], after["currentRevision"]) == (before["step"]["jobUid"], before["currentRevision"])
    revisions = operated.kubectl.get(
        "controllerrevisions", f"--namespace={NAMESPACE}", "--selector=qlora.dev/job=started"
    )
    assert len(revisions["items"]) == 1


def back_up(operated: Nodeless, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the job and its revision as Velero restores them: new objects, without status and owners."""
    revision = operated.job(name)["status"]["currentRevision"]
    stored = operated.kubectl.get("controllerrevision", revision, f"--namespace={NAMESPACE}"), operated.job(name)
    kept = ("name", "namespace", "labels")
    first, second = (
        {field: value for field, value in each.items() if field != "status"}
        | {"metadata": {key: each["metadata"][key] for key in kept if key in each["metadata"]}}
        for each in stored
    )
    second["metadata"]["labels"] = {"velero.io/restore-name": "after-the-fire"}
    return first, second


def delete(operated: Nodeless, name: str) -> None:
    """Delete the job with all that it owns. Its claim stays, as if it had been restored."""
    operated.kubectl("delete", "qlorajob", name, f"--namespace={NAMESPACE}", "--cascade=foreground")
    eventually(lambda: operated.children(name, "controllerrevisions") == [], seconds=60, every=0.2, what="no revision")


def test_a_restored_job_finishes_its_run_without_another_train_pod(operated: Nodeless) -> None:
    create(operated, "restored")
    operated.succeed("restored")
    stored = operated.wait_for_phase("restored", "Succeeded")
    revision, job = back_up(operated, "restored")
    delete(operated, "restored")

    operated.kubectl("create", "--filename=-", input_text=json.dumps(revision))
    operated.kubectl("create", "--filename=-", input_text=json.dumps(job))

    operated.find_trained("restored")
    operated.succeed("restored", "publish")
    after, before = operated.wait_for_phase("restored", "Succeeded"), stored["status"]
    assert operated.children("restored") == ["restored-prepare-1", "restored-publish-1"]
    assert after["metadata"]["uid"] != stored["metadata"]["uid"] == after["status"]["runUid"]
    kept = ("currentRevision", "image", "workspace", "adapter")
    assert {field: after["status"][field] for field in kept} == {field: before[field] for field in kept}


def test_a_restored_job_waits_for_what_its_run_needs_and_reports_that(operated: Nodeless) -> None:
    create(operated, "incomplete")
    operated.wait_for_phase("incomplete", "Preparing")
    revision, job = back_up(operated, "incomplete")
    delete(operated, "incomplete")

    def waits_for(words: str) -> None:
        def reported() -> bool:
            conditions = operated.job("incomplete").get("status", {}).get("conditions", ())
            return any(each["reason"] == "RestoreBlocked" and words in each["message"] for each in conditions)

        eventually(reported, seconds=60, every=0.2, what=words)

    operated.kubectl("create", "--filename=-", input_text=json.dumps(job))
    waits_for("has no ControllerRevision of it without an owner")
    document = json.loads(revision["data"]["document"])
    document["spec"]["training"]["epochs"] = 7
    other = revision | {"data": revision["data"] | {"document": json.dumps(document)}}
    operated.kubectl("create", "--filename=-", input_text=json.dumps(other))
    waits_for("is of another spec")
    assert operated.children("incomplete") == []
    mark = (f"--namespace={NAMESPACE}", "velero.io/restore-name-")
    operated.kubectl("label", "qlorajob", "incomplete", *mark)
    operated.pod("incomplete", "prepare")
    assert "runUid" not in operated.job("incomplete")["status"]
