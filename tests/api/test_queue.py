"""Jobs that somebody else suspends, on a real API server with the real controllers: a queue, a user, or nobody at all.

The same with Kueue itself is in test_kueue.py.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from devcluster.errors import ClusterError
from qlora_api.naming import JOB_LABEL
from tests.support.manifests import MINIMAL
from tests.support.nodeless import NAMESPACE, STEPS, Nodeless
from tests.support.waiting import eventually

IN_NAMESPACE = f"--namespace={NAMESPACE}"


def start(cluster: Nodeless, name: str, **scheduling: str) -> str:
    manifest = {**MINIMAL, "metadata": {"name": name, "namespace": NAMESPACE}}
    cluster.kubectl.apply(json.dumps(manifest | {"spec": {**MINIMAL["spec"], "scheduling": scheduling}}))
    return name


def suspend(cluster: Nodeless, child: str, value: bool) -> None:
    change = json.dumps({"spec": {"suspend": value}})
    cluster.kubectl("patch", "job", child, IN_NAMESPACE, "--type=merge", f"--patch={change}")


def succeeded(cluster: Nodeless, name: str) -> None:
    """It ends well, with one Job for each step, and nothing has been counted."""
    status = cluster.wait_for_phase(name, "Succeeded")["status"]
    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
    assert sorted(cluster.children(name)) == [f"{name}-{step}-1" for step in ("prepare", "publish", "train")]


def message(cluster: Nodeless, name: str) -> str:
    conditions = cluster.job(name)["status"].get("conditions", ())
    return next((str(each["message"]) for each in conditions if each["type"] == "Succeeded"), "")


def wait_for_message(cluster: Nodeless, name: str, part: str) -> None:
    """Wait until the job says that; the phase may have changed before."""
    eventually(lambda: part in message(cluster, name), seconds=60, every=0.2, what=f"{name}: {part}")


def test_a_job_in_a_queue_is_created_suspended_and_only_the_queue_resumes_it(operated: Nodeless) -> None:
    name = start(operated, "queued", queueName="gpus", queuePriority="high")
    operated.succeed(name, "prepare")
    operated.wait_for_phase(name, "Queued")
    train = operated.kubectl.get("job", f"{name}-train-1", IN_NAMESPACE)
    labels = train["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    operated.wait_for_no_pod(name, "train")
    suspend(operated, f"{name}-train-1", False)
    operated.succeed(name, "train", "publish")
    succeeded(operated, name)


def test_every_step_may_be_suspended_by_somebody_else(operated: Nodeless) -> None:
    name = start(operated, "stopped")
    for step in STEPS:
        child = f"{name}-{step}-1"
        operated.run(name, step)
        suspend(operated, child, True)
        operated.wait_for_phase(name, "Queued")
        operated.wait_for_no_pod(name, step)
        wait_for_message(operated, name, f"Job {child} is suspended")
        suspend(operated, child, False)
        operated.succeed(name, step)
    succeeded(operated, name)


@pytest.fixture
def unreachable(operated: Nodeless) -> Iterator[str]:
    """The name of a job whose Jobs go through a webhook that does not answer."""
    hook: dict[str, Any] = {
        "name": "jobs.example.org",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "clientConfig": {"url": "https://127.0.0.1:1/validate"},
        "objectSelector": {"matchLabels": {JOB_LABEL: "unreachable"}},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
    }
    body = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "away"},
        "webhooks": [hook],
    }
    operated.kubectl.apply(json.dumps(body))
    yield "unreachable"
    operated.kubectl("delete", "validatingwebhookconfiguration", "away", "--ignore-not-found")


def test_a_webhook_that_does_not_answer_is_in_the_status_and_tried_again(operated: Nodeless, unreachable: str) -> None:
    # A webhook is in force some moments after it is there.
    probe = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "labels": {JOB_LABEL: unreachable}}}
    pod = {"restartPolicy": "Never", "containers": [{"name": "none", "image": "none"}]}
    content = json.dumps(probe | {"spec": {"template": {"spec": pod}}})

    def in_force() -> bool:
        try:
            operated.kubectl("create", IN_NAMESPACE, "--dry-run=server", "--filename=-", input_text=content)
        except ClusterError as error:
            return "failed calling webhook" in str(error)
        return False

    eventually(in_force, seconds=60, every=0.2, what="the webhook")
    start(operated, unreachable)
    sentence = f'the API server rejects Job {unreachable}-prepare-1: Internal error occurred: failed calling webhook "'
    wait_for_message(operated, unreachable, sentence)
    assert operated.job(unreachable)["status"]["phase"] == "Pending"
    operated.kubectl("delete", "validatingwebhookconfiguration", "away")
    operated.succeed(unreachable, *STEPS)
    succeeded(operated, unreachable)


WORKLOADS: dict[str, Any] = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "workloads.kueue.x-k8s.io",
        "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/kueue"},
    },
    "spec": {
        "group": "kueue.x-k8s.io",
        "scope": "Namespaced",
        "names": {"kind": "Workload", "plural": "workloads", "singular": "workload", "listKind": "WorkloadList"},
        "versions": [
            {
                "name": "v1beta2",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def test_a_held_job_says_what_kueues_workload_states(operated: Nodeless) -> None:
    name, step = start(operated, "explained", queueName="gpus"), "train"
    operated.succeed(name, "prepare")
    operated.wait_for_phase(name, "Queued")
    # Without Kueue.
    wait_for_message(operated, name, "suspended until a queue admits it")
    operated.kubectl.apply(json.dumps(WORKLOADS))
    eventually(lambda: operated.kubectl("get", "workloads", IN_NAMESPACE) or True, seconds=60, what="the new kind")
    uid = operated.kubectl.get("job", f"{name}-{step}-1", IN_NAMESPACE)["metadata"]["uid"]
    condition = {"type": "QuotaReserved", "status": "False", "message": "LocalQueue gpus doesn't exist"}
    workload = {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "Workload",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"kueue.x-k8s.io/job-uid": uid}},
        "spec": {"queueName": "gpus"},
        "status": {"conditions": [condition]},
    }
    operated.kubectl.apply(json.dumps(workload))
    says = "Kueue: LocalQueue gpus doesn't exist"
    eventually(lambda: message(operated, name) == says, seconds=90, every=0.2, what="the Workload's sentence")
    operated.kubectl("delete", "customresourcedefinition", WORKLOADS["metadata"]["name"])
