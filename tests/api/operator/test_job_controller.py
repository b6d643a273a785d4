"""The real Job controller's actions on a step's Job and pods, with the operator."""

import json
from typing import Any

import pytest

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL
from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.waiting import eventually

OF_THE_JOB = "batch.kubernetes.io/controller-uid"


def train(operated: Nodeless, name: str) -> dict[str, Any]:
    """The running train pod of a new job."""
    job = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": {"name": name, "namespace": NAMESPACE}}
    spec = {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}}
    operated.kubectl.apply(json.dumps({**job, "spec": spec}))
    operated.succeed(name, "prepare")
    pod = operated.pod(name, "train")
    operated.start_pod(pod)
    operated.wait_for_phase(name, "Training")
    return pod


def second_attempt(operated: Nodeless, name: str) -> dict[str, Any]:
    """Wait for the second train Job, and for the later status that names it."""

    def found() -> dict[str, Any] | None:
        status: dict[str, Any] = operated.job(name)["status"]
        step = status["step"]
        return status if (step["name"], step["attempt"]) == ("train", 2) and step["jobUid"] else None

    return eventually(found, seconds=60, every=0.2, what=f"the second train Job of {name}") or {}


@pytest.mark.parametrize(
    ("what", "labels"),
    [("watch", [JOB_UID_LABEL]), ("job", [OF_THE_JOB]), ("both", [JOB_UID_LABEL, OF_THE_JOB])],
    ids=["watch", "job", "both"],
)
def test_a_pod_that_loses_its_labels_stays_counted_and_gets_no_second_pod(
    operated: Nodeless, what: str, labels: list[str]
) -> None:
    name = f"detached-{what}"
    pod = train(operated, name)
    pod_name, here = pod["metadata"]["name"], f"--namespace={NAMESPACE}"
    operated.kubectl("label", "pod", pod_name, here, *(f"{label}-" for label in labels))

    def status() -> dict[str, Any]:
        found: dict[str, Any] = operated.job(name)["status"]
        return found

    def reported() -> bool:
        return any(entry["reason"] == "PodDetached" for entry in status()["conditions"])

    eventually(reported, seconds=60, every=0.2, what="the report that the pod is detached")
    eventually(lambda: f"{name}-train-1" not in operated.children(name), seconds=60, every=0.2, what="its Job to go")
    # Another job's life is longer than the operator would need to create the next Job.
    train(operated, f"after-{name}")
    assert [child for child in operated.children(name) if "-train-" in child] == []
    assert status()["step"]["attempt"] == 1

    operated.kubectl("delete", "pod", pod_name, here, "--grace-period=0", "--force", "--wait=false")
    assert second_attempt(operated, name)["activeSeconds"] > 0
    operated.kubectl("delete", "qlorajob", name, f"after-{name}", here)


def test_a_job_stopped_by_its_deadline_is_followed_by_another_and_costs_no_retry(operated: Nodeless) -> None:
    pod, here = train(operated, "unattended"), f"--namespace={NAMESPACE}"
    bound = operated.kubectl.get("job", "unattended-train-1", here)["spec"]["activeDeadlineSeconds"]
    assert bound == 7 * 24 * 3600, "without an operator, nothing would stop a pod that is interrupted again and again"
    operated.kubectl(
        "patch", "job", "unattended-train-1", here, "--type=merge", '--patch={"spec": {"activeDeadlineSeconds": 1}}'
    )
    operated.stop_pod(pod, 143)
    status = second_attempt(operated, "unattended")
    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
    operated.kubectl("delete", "qlorajob", "unattended", here)


def test_a_job_whose_deletion_a_finalizer_delays_stops_and_is_deleted_later(operated: Nodeless) -> None:
    pod = train(operated, "audited")
    name, here = pod["metadata"]["name"], f"--namespace={NAMESPACE}"
    finalizers = '--patch={"metadata": {"finalizers": %s}}'
    operated.kubectl("patch", "qlorajob", "audited", here, "--type=merge", finalizers % '["example.org/audit"]')
    operated.kubectl("delete", "qlorajob", "audited", here, "--wait=false")
    operated.stop_pod(pod, 143)
    eventually(lambda: name not in operated.children("audited", "pods"), seconds=60, every=0.2, what="its end")
    # Another job's life is longer than the operator would need to replace the Job.
    train(operated, "after-audited")
    eventually(lambda: all("-prepare-" in child for child in operated.children("audited")), what="no other Job")
    assert operated.job("audited")["status"]["step"]["attempt"] == 1

    operated.kubectl("patch", "qlorajob", "audited", here, "--type=merge", finalizers % "[]")
    eventually(lambda: operated.children("audited") == [], seconds=60, every=0.2, what="the rest of the job to go")
    operated.kubectl("delete", "qlorajob", "after-audited", here)


def test_a_job_that_is_deleted_without_its_children_leaves_its_pod_running(operated: Nodeless) -> None:
    pod = train(operated, "orphaned")
    name, here = pod["metadata"]["name"], f"--namespace={NAMESPACE}"
    operated.kubectl("delete", "qlorajob", "orphaned", here, "--cascade=orphan")
    train(operated, "after-orphaned")
    assert "orphaned-train-1" in operated.children("orphaned")
    assert "deletionTimestamp" not in operated.kubectl.get("pod", name, here)["metadata"]
    operated.kubectl("delete", "qlorajob", "after-orphaned", here)
    operated.kubectl("delete", "jobs", f"--selector={JOB_LABEL}=orphaned", here, "--wait=false")
