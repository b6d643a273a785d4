"""The operator with Kueue's own controller, Kubernetes' controllers and no node: tests write what a kubelet would.

Kueue's sentences were recorded here; `decisions/test_kueue.py` of the unit tests has them without Kueue.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.cluster.nodeless import NAMESPACE, SHARED, Nodeless, nodeless
from tests.support.manifests import MINIMAL
from tests.support.services.kueue import GPU, SHIPPED, Kueue, kueue
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
IN_NAMESPACE = f"--namespace={NAMESPACE}"
NO_QUOTA = f"insufficient unused quota for {GPU} in flavor any, 1 more needed"


@dataclass(frozen=True)
class Queued:
    """The cluster, with Kueue."""

    cluster: Nodeless
    kueue: Kueue

    def apply(self, name: str, nodes: int = 1, **scheduling: str) -> str:
        manifest = {**MINIMAL, "metadata": {"name": name, "namespace": NAMESPACE}}
        scheduling |= {"profileName": SHARED} if nodes > 1 else {}
        spec = {**MINIMAL["spec"], "scheduling": scheduling, "resources": {"nodes": nodes}}
        self.cluster.kubectl.apply(json.dumps(manifest | {"spec": spec}))
        return name

    def start(self, name: str, nodes: int = 1, **scheduling: str) -> str:
        """A job whose train step has been reached."""
        self.apply(name, nodes, **scheduling)
        self.cluster.succeed(name, "prepare")
        return name

    def sentence(self, name: str) -> str:
        """Reason of the job's wait, or its activity."""
        conditions = self.cluster.job(name)["status"].get("conditions", ())
        return next((str(each["message"]) for each in conditions if each["type"] == "Succeeded"), "")

    def wait_for(self, name: str, phase: str, part: str) -> None:
        """Until the job is in the phase, with a reason."""
        self.cluster.wait_for_phase(name, phase)
        eventually(lambda: part in self.sentence(name), seconds=90, every=0.2, what=f"{name}: {part}")

    def wait_for_pod(self, name: str) -> dict[str, Any]:
        return self.cluster.pod(name, "train")

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The train pods that have not ended."""
        return self.cluster.live_pods(name, "train")

    def finish(self, name: str) -> None:
        """The job ends well, and none of its interruptions counts."""
        self.cluster.succeed(name, "train", "publish")
        status = self.cluster.wait_for_phase(name, "Succeeded")["status"]
        assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
        assert f"{name}-train-2" not in self.cluster.children(name)


@pytest.fixture(scope="module")
def queued(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queued]:
    folder = tmp_path_factory.mktemp("kueue")
    with (
        nodeless(folder, gpuResource=GPU) as cluster,
        kueue(cluster.kubectl, folder, NAMESPACE) as controller,
    ):
        for name, value in (("low", 10), ("high", 1000)):
            controller.priority(name, value)
        yield Queued(cluster, controller)


def test_the_shipped_queue_admits_a_job(queued: Queued) -> None:
    queued.cluster.kubectl.apply((SHIPPED / "queue.yaml").read_text())
    queued.finish(queued.start("shipped", queueName="gpus"))


def test_a_quota_of_one_runs_three_jobs_one_after_the_other(queued: Queued) -> None:
    queued.kueue.queue("single", 1)
    first, *others = [queued.start(f"single-{number}", queueName="single") for number in range(3)]
    queued.wait_for_pod(first)
    # Of equal jobs, Kueue gives its reason to the first alone.
    reasons = [
        "Kueue has not admitted the job yet: equal jobs may wait before it",
        f"Kueue: couldn't assign flavors to pod set main: {NO_QUOTA}",
    ]
    eventually(lambda: sorted(map(queued.sentence, others)) == reasons, seconds=90, every=0.2, what="both reasons")
    for name in others:
        queued.cluster.wait_for_no_pod(name, "train")
    queued.finish(first)
    eventually(lambda: any(queued.pods(name) for name in others), seconds=60, every=0.2)
    second, third = sorted(others, key=lambda name: not queued.pods(name))
    queued.cluster.wait_for_no_pod(third, "train")
    queued.finish(second)
    queued.finish(third)


def test_a_preempted_job_waits_with_kueues_message_and_continues_in_the_same_job(queued: Queued) -> None:
    queued.kueue.queue("preempting", 1)
    low = queued.start("preempted", queueName="preempting", queuePriorityClassName="low")
    queued.cluster.run(low, "train")
    queued.cluster.wait_for_phase(low, "Training")
    high = queued.start("preemptor", queueName="preempting", queuePriorityClassName="high")
    queued.wait_for(low, "Queued", "due to prioritization in the ClusterQueue")
    assert queued.sentence(low).startswith("Kueue: Preempted to accommodate a workload")
    queued.wait_for_pod(high)
    queued.cluster.wait_for_no_pod(low, "train")
    queued.finish(high)
    queued.wait_for_pod(low)
    queued.finish(low)


def test_a_job_of_two_nodes_gets_both_pods_or_none_and_is_preempted_as_a_whole(queued: Queued) -> None:
    queued.kueue.queue("gang", 2)
    alone = queued.start("alone", queueName="gang", queuePriorityClassName="low")
    queued.wait_for_pod(alone)
    pair = queued.start("pair", nodes=2, queueName="gang", queuePriorityClassName="low")
    queued.wait_for(pair, "Queued", NO_QUOTA)
    queued.cluster.wait_for_no_pod(pair, "train")
    queued.finish(alone)
    both = started_pair(queued, pair)

    high = queued.start("preemptor-of-two", queueName="gang", queuePriorityClassName="high")
    queued.wait_for(pair, "Queued", "due to prioritization in the ClusterQueue")
    for pod in both:
        queued.cluster.stop_pod(pod, 143)
    queued.wait_for_pod(high)
    queued.cluster.wait_for_no_pod(pair, "train")
    queued.finish(high)

    for pod in started_pair(queued, pair):
        queued.cluster.succeed_pod(pod)
    queued.cluster.succeed(pair, "publish")
    status = queued.cluster.wait_for_phase(pair, "Succeeded")["status"]
    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
    assert f"{pair}-train-2" not in queued.cluster.children(pair)


def started_pair(queued: Queued, name: str) -> list[dict[str, Any]]:
    """Both pods of the job, which run."""
    eventually(lambda: len(queued.pods(name)) == 2, seconds=60, every=0.2, what=f"two pods of {name}")
    pods = queued.pods(name)
    for pod in pods:
        queued.cluster.start_pod(pod)
    queued.cluster.wait_for_phase(name, "Training")
    return pods


def test_a_preempted_pod_that_is_killed_before_it_has_saved_is_no_failure(queued: Queued) -> None:
    queued.kueue.queue("killing", 1)
    low = queued.start("killed", queueName="killing", queuePriorityClassName="low")
    pod = queued.wait_for_pod(low)
    queued.cluster.start_pod(pod)
    queued.cluster.wait_for_phase(low, "Training")
    high = queued.start("killer", queueName="killing", queuePriorityClassName="high")
    queued.cluster.stop_pod(pod, 137)
    queued.finish(high)
    queued.wait_for_pod(low)
    queued.finish(low)


def test_a_queue_that_comes_late_admits_the_job(queued: Queued) -> None:
    name = queued.start("missing", queueName="late")
    queued.wait_for(name, "Queued", "Kueue: LocalQueue late doesn't exist")
    queued.kueue.local_queue("late", "later")
    queued.wait_for(name, "Queued", "Kueue: ClusterQueue later doesn't exist")
    queued.kueue.queue("later", 0)
    # Kueue does not check the Workload again before another change.
    queued.wait_for(name, "Queued", "current podset request (1) > maximum capacity (0)")
    queued.kueue.queue("later", 1)
    queued.finish(name)


def test_an_inactive_queue_and_a_deactivated_job_are_reported(queued: Queued) -> None:
    queued.kueue.queue("stopped", 1, stopPolicy="HoldAndDrain")
    name = queued.start("held", queueName="stopped")
    queued.wait_for(name, "Queued", "Kueue: ClusterQueue stopped is inactive")
    (workload,) = [body for body in queued.kueue.workloads() if body["metadata"]["name"].startswith(f"job-{name}")]

    def activate(active: bool) -> None:
        change = json.dumps({"spec": {"active": active}})
        workload_name = workload["metadata"]["name"]
        queued.cluster.kubectl("patch", "workload", workload_name, IN_NAMESPACE, "--type=merge", f"--patch={change}")

    activate(False)
    queued.wait_for(name, "Queued", "Kueue: The workload is deactivated")
    queued.kueue.queue("stopped", 1, stopPolicy="None")
    activate(True)
    queued.finish(name)


def test_an_unknown_priority_makes_no_workload_and_the_status_names_it(queued: Queued) -> None:
    queued.kueue.queue("ordered", 1)
    name = queued.start("unordered", queueName="ordered", queuePriorityClassName="nosuch")
    queued.wait_for(name, "Queued", "has no Workload: Kueue must run, manage this namespace, and have the Workload")
    queued.kueue.priority("nosuch", 5)
    queued.finish(name)


def test_a_queue_for_other_clusters_is_refused_and_no_step_is_repeated(queued: Queued) -> None:
    queued.kueue.dispatch("elsewhere")
    name = queued.apply("refused", queueName="elsewhere")
    gives = "LocalQueue 'elsewhere' gives Job refused-train-1 to kueue.x-k8s.io/multikueue"
    queued.wait_for(name, "Pending", gives)
    assert queued.cluster.children(name) == []
    # The administrator removes the admission check, and brings it back.
    queued.kueue.queue("elsewhere", 1)
    pod = queued.cluster.pod(name, "prepare")
    queued.kueue.dispatch("elsewhere")
    queued.cluster.succeed_pod(pod)
    queued.wait_for(name, "Failed", gives)
    eventually(lambda: queued.cluster.children(name) == [f"{name}-prepare-1"], seconds=60, every=0.2)

    queued.kueue.queue("elsewhere", 1)
    change = json.dumps({"spec": {"retry": {"request": "a"}}})
    queued.cluster.kubectl("patch", "qlorajob", name, IN_NAMESPACE, "--type=merge", f"--patch={change}")
    queued.cluster.succeed(name, "train", "publish")
    queued.cluster.wait_for_phase(name, "Succeeded")


def test_without_kueue_no_job_is_created_and_the_status_names_it(queued: Queued) -> None:
    queued.kueue.queue("away", 1)
    queued.kueue.stop()
    name = queued.apply("unreachable", queueName="away")
    queued.wait_for(name, "Pending", "the API server rejects Job unreachable-prepare-1: Internal error occurred: ")
    assert 'failed calling webhook "mjob.kb.io"' in queued.sentence(name)
    assert queued.cluster.children(name) == []
    queued.kueue.start()
    queued.cluster.succeed(name, "prepare")
    queued.finish(name)


def test_a_local_queue_named_default_takes_every_step(queued: Queued) -> None:
    queued.kueue.queue("default", 1, stopPolicy="Hold")
    name = queued.apply("by-default")
    try:
        queued.wait_for(name, "Queued", "Kueue: ClusterQueue default is inactive")
        queued.cluster.wait_for_no_pod(name, "prepare")
        queued.kueue.queue("default", 1, stopPolicy="None")
        queued.cluster.succeed(name, "prepare")
        queued.finish(name)
        owners = {body["metadata"]["ownerReferences"][0]["name"] for body in queued.kueue.workloads()}
        assert {f"{name}-{step}-1" for step in ("prepare", "train", "publish")} <= owners
    finally:
        queued.cluster.kubectl("delete", "localqueue", "default", IN_NAMESPACE)


def test_jobs_without_a_queue_that_kueue_holds_report_it(queued: Queued) -> None:
    queued.kueue.stop()
    queued.kueue.start(unlabeled=True)
    try:
        name = queued.apply("unnamed")
        queued.wait_for(name, "Queued", "add a LocalQueue named default to the namespace")
        queued.cluster.wait_for_no_pod(name, "prepare")
        queued.kueue.queue("default", 1)
        queued.cluster.kubectl("delete", "job", f"{name}-prepare-1", IN_NAMESPACE)
        queued.cluster.succeed(name, "prepare")
        queued.finish(name)
    finally:
        queued.cluster.kubectl("delete", "localqueue", "default", IN_NAMESPACE, "--ignore-not-found")
        queued.kueue.stop()
        queued.kueue.start()
