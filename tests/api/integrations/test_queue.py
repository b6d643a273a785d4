"""Suspended jobs on a real API server with the real controllers: by a queue, by a user, or by neither.

The same with Kueue itself is in test_kueue.py.
"""

import json

from tests.support.cluster.nodeless import NAMESPACE, Nodeless
from tests.support.cluster.played import STEPS
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually

IN_NAMESPACE = f"--namespace={NAMESPACE}"
_JOBS = {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
_MUTATION = {"expression": "Object{spec: Object.spec{managedBy: 'kueue.x-k8s.io/multikueue'}}"}
DISPATCH = (
    {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicy",
        "metadata": {"name": "dispatch"},
        "spec": {
            "matchConstraints": {"resourceRules": [_JOBS]},
            "matchConditions": [
                {
                    "name": "queue",
                    "expression": "object.?metadata.labels['kueue.x-k8s.io/queue-name'].orValue('') == 'away'",
                }
            ],
            "reinvocationPolicy": "Never",
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": _MUTATION}],
        },
    },
    {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingAdmissionPolicyBinding",
        "metadata": {"name": "dispatch"},
        "spec": {"policyName": "dispatch"},
    },
)
"""What Kueue does to a Job of a queue with a MultiKueue check."""
_LABELS = {"kueue.x-k8s.io/queue-name": "away"}
_POD = {"spec": {"restartPolicy": "Never", "containers": [{"name": "none", "image": "example.org/none"}]}}
PROBE = json.dumps(
    {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "probe", "namespace": NAMESPACE, "labels": _LABELS},
        "spec": {"suspend": True, "template": _POD},
    }
)
"""A Job of that queue."""


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
    """Wait until the job reports that; the phase may have changed before."""
    eventually(lambda: part in message(cluster, name), seconds=60, every=0.2, what=f"{name}: {part}")


def test_a_job_in_a_queue_is_created_suspended_and_only_the_queue_resumes_it(operated: Nodeless) -> None:
    name = start(operated, "queued", queueName="gpus", queuePriorityClassName="high")
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


def test_a_queue_that_gives_jobs_to_another_controller_gets_none(operated: Nodeless) -> None:
    for body in DISPATCH:
        operated.kubectl.apply(json.dumps(body))

    def applies() -> bool:
        answer = operated.kubectl("create", "--dry-run=server", "--output=json", "--filename=-", input_text=PROBE)
        return "managedBy" in json.loads(answer)["spec"]

    eventually(applies, seconds=60, every=0.2, what="the policy")
    try:
        name = start(operated, "refused", queueName="away")
        wait_for_message(operated, name, "LocalQueue 'away' gives Job refused-train-1 to kueue.x-k8s.io/multikueue")
        assert (operated.children(name), operated.job(name)["status"]["phase"]) == ([], "Pending")
    finally:
        operated.kubectl("delete", "mutatingadmissionpolicy,mutatingadmissionpolicybinding", "dispatch")
    operated.succeed(name, "prepare")
    operated.wait_for_phase(name, "Queued")


def test_every_step_may_be_suspended_by_another_controller(operated: Nodeless) -> None:
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
