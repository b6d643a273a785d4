"""Jobs of several nodes on a real API server with the real controllers: what is created, and what a lost pod costs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from qlora_api.naming import STEP_LABEL
from tests.support.manifests import MINIMAL
from tests.support.nodeless import NAMESPACE, Nodeless, nodeless
from tests.support.waiting import eventually

IN_NAMESPACE = f"--namespace={NAMESPACE}"
INDEX, JOB_NAME = "batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/job-name"
PEER_LOST, INTERRUPTED, KILLED = 201, 143, 137
SHARED = {"topology": "shared", "accessMode": "ReadWriteMany"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodeless]:
    with nodeless(tmp_path_factory.mktemp("nodes"), workspace=SHARED) as cluster:
        yield cluster


def start(cluster: Nodeless, name: str, **spec: Any) -> str:
    """A job of two nodes whose data are prepared."""
    manifest = {**MINIMAL, "metadata": {"name": name, "namespace": NAMESPACE}}
    spec = {**MINIMAL["spec"], "resources": {"nodes": 2}, **spec}
    cluster.kubectl.apply(json.dumps(manifest | {"spec": spec}))
    cluster.succeed(name, "prepare")
    return name


def train_pods(cluster: Nodeless, name: str, attempt: int) -> list[dict[str, Any]]:
    """The two train pods of that attempt, that of node 0 first, once they are there and have not ended."""

    def found() -> list[dict[str, Any]] | None:
        pods = cluster.kubectl.get("pods", IN_NAMESPACE, f"--selector={JOB_NAME}={name}-train-{attempt}")["items"]
        live = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
        return sorted(live, key=lambda pod: str(pod["metadata"]["labels"][INDEX])) if len(live) == 2 else None

    return eventually(found, seconds=60, every=0.2, what=f"two train pods of attempt {attempt} of {name}") or []


def running_pods(cluster: Nodeless, name: str, attempt: int) -> list[dict[str, Any]]:
    pods = train_pods(cluster, name, attempt)
    for pod in pods:
        cluster.start_pod(pod)
    cluster.wait_for_phase(name, "Training")
    return pods


def delete(cluster: Nodeless, pod: dict[str, Any]) -> None:
    """Somebody deletes the pod, which has not ended yet."""
    cluster.kubectl("delete", "pod", pod["metadata"]["name"], IN_NAMESPACE, "--wait=false")


def train_to_the_end(cluster: Nodeless, name: str, attempt: int) -> dict[str, Any]:
    for pod in running_pods(cluster, name, attempt):
        cluster.succeed_pod(pod)
    cluster.succeed(name, "publish")
    return dict(cluster.wait_for_phase(name, "Succeeded")["status"])


def test_all_pods_of_a_job_are_created_with_what_connects_them(cluster: Nodeless) -> None:
    name = start(cluster, "connected")
    pods = train_pods(cluster, name, 1)

    uid = cluster.job(name)["metadata"]["uid"]
    service = cluster.kubectl.get("service", f"qlora-{uid}", IN_NAMESPACE)
    assert service["spec"]["clusterIP"] == "None"
    policy = cluster.kubectl.get("networkpolicy", f"qlora-{uid}", IN_NAMESPACE)
    for pod in pods:
        assert pod["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
        assert pod["metadata"]["labels"].items() >= service["spec"]["selector"].items()
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    # Names of the pods are those by which they look for node 0.
    environment = {entry["name"]: entry.get("value") for entry in pods[1]["spec"]["containers"][0]["env"]}
    assert environment["QLORA_RENDEZVOUS"] == f"{pods[0]['spec']['hostname']}.{service['metadata']['name']}:29500"

    status = train_to_the_end(cluster, name, 1)
    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
    cluster.kubectl("delete", "qlorajob", name, IN_NAMESPACE)
    for kind in ("service", "networkpolicy"):
        eventually(lambda kind=kind: not _names(cluster, kind, uid), seconds=60, every=0.5, what=f"no {kind}")  # type: ignore[misc]


def _names(cluster: Nodeless, kind: str, uid: str) -> list[str]:
    listed = cluster.kubectl.get(kind, IN_NAMESPACE)["items"]
    return [one["metadata"]["name"] for one in listed if uid in one["metadata"]["name"]]


def test_a_pod_that_is_lost_costs_one_disruption_and_all_pods_start_again(cluster: Nodeless) -> None:
    name = start(cluster, "lost")
    first, second = running_pods(cluster, name, 1)
    delete(cluster, second)
    cluster.stop_pod(second, KILLED)
    # Its Job fails, by which the other one is deleted too; it has noticed by itself.
    cluster.stop_pod(first, PEER_LOST)

    status = train_to_the_end(cluster, name, 2)

    assert (status["disruptions"], status.get("failures", 0)) == (1, 0)


def test_pods_that_save_and_stop_together_cost_one_disruption(cluster: Nodeless) -> None:
    name = start(cluster, "drained")
    first, second = running_pods(cluster, name, 1)
    delete(cluster, second)
    # All save and stop when one is asked to.
    cluster.end_pod(first, INTERRUPTED, "Interrupted")
    cluster.stop_pod(second, INTERRUPTED)

    eventually(lambda: f"{name}-train-1" not in cluster.children(name), seconds=60, every=0.2, what="no first Job")
    for pod in cluster.pods():
        labels = pod["metadata"]["labels"]
        if labels[JOB_NAME] == f"{name}-train-1" and labels[STEP_LABEL] == "train" and _live(pod):
            # The Job has replaced them before it was deleted.
            cluster.stop_pod(pod, INTERRUPTED)
    status = train_to_the_end(cluster, name, 2)
    assert (status["disruptions"], status.get("failures", 0)) == (1, 0)


def _live(pod: dict[str, Any]) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def test_the_failure_of_node_1_is_the_jobs_reason(cluster: Nodeless) -> None:
    name = start(cluster, "full")
    first, second = running_pods(cluster, name, 1)
    cluster.end_pod(first, PEER_LOST, "PeerLost", message="lost another process of this run")
    cluster.end_pod(second, 13, "GPUOutOfMemory", message="the GPU is out of memory")

    status = cluster.wait_for_phase(name, "Failed")["status"]

    assert (status["lastFailure"]["reason"], status["lastFailure"]["message"]) == (
        "GPUOutOfMemory",
        "the GPU is out of memory",
    )
    assert (status["failures"], status.get("disruptions", 0)) == (1, 0)


def test_a_queue_holds_all_pods_of_a_job_and_stops_them_without_cost(cluster: Nodeless) -> None:
    name = start(cluster, "queued", scheduling={"queueName": "gpus"})
    cluster.wait_for_phase(name, "Queued")
    assert _set_suspend(cluster, f"{name}-train-1", False)
    pods = running_pods(cluster, name, 1)
    assert _set_suspend(cluster, f"{name}-train-1", True)
    for pod in pods:
        cluster.stop_pod(pod, INTERRUPTED)
    cluster.wait_for_phase(name, "Queued")
    assert _set_suspend(cluster, f"{name}-train-1", False)

    status = train_to_the_end(cluster, name, 1)

    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)


def _set_suspend(cluster: Nodeless, child: str, value: bool) -> str:
    change = json.dumps({"spec": {"suspend": value}})
    return cluster.kubectl("patch", "job", child, IN_NAMESPACE, "--type=merge", f"--patch={change}")


def test_suspend_stops_all_pods_and_resumes_them_together(cluster: Nodeless) -> None:
    name = start(cluster, "suspended")
    pods = running_pods(cluster, name, 1)
    _change(cluster, name, suspend=True)
    eventually(lambda: f"{name}-train-1" not in cluster.children(name), seconds=60, every=0.2, what="no first Job")
    for pod in pods:
        cluster.stop_pod(pod, INTERRUPTED)
    cluster.wait_for_phase(name, "Suspended")
    _change(cluster, name, suspend=False)

    status = train_to_the_end(cluster, name, 2)

    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)


def _change(cluster: Nodeless, name: str, **spec: Any) -> None:
    change = json.dumps({"spec": spec})
    cluster.kubectl("patch", "qlorajob", name, IN_NAMESPACE, "--type=merge", f"--patch={change}")
