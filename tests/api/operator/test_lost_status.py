"""A job whose status was lost goes on with what its revision has fixed, and a finished run is not trained again."""

import json

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
