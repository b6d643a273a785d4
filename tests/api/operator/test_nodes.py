"""Jobs of several nodes on a real API server: their objects, and the cost of a lost pod."""

import json
from typing import Any

import pytest

from tests.support.cluster.nodeless import NAMESPACE, SHARED, Nodeless
from tests.support.manifests import MINIMAL
from tests.support.waiting import eventually

IN_NAMESPACE = f"--namespace={NAMESPACE}"
INDEX, JOB_NAME = "batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/job-name"
PEER_LOST, INTERRUPTED, KILLED = 201, 143, 137


def start(operated: Nodeless, name: str, **scheduling: str) -> str:
    """A job of two nodes whose data are prepared."""
    manifest = {**MINIMAL, "metadata": {"name": name, "namespace": NAMESPACE}}
    spec = {**MINIMAL["spec"], "resources": {"nodes": 2}, "scheduling": {"profileName": SHARED, **scheduling}}
    operated.kubectl.apply(json.dumps(manifest | {"spec": spec}))
    operated.succeed(name, "prepare")
    return name


def live_pods(operated: Nodeless, name: str, attempt: int) -> list[dict[str, Any]]:
    """The train pods of that attempt that have not ended, that of node 0 first."""
    pods = operated.kubectl.get("pods", IN_NAMESPACE, f"--selector={JOB_NAME}={name}-train-{attempt}")["items"]
    live = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
    return sorted(live, key=lambda pod: str(pod["metadata"]["labels"][INDEX]))


def train_pods(operated: Nodeless, name: str, attempt: int) -> list[dict[str, Any]]:
    """Wait for the two train pods of that attempt, that of node 0 first."""

    def found() -> list[dict[str, Any]] | None:
        live = live_pods(operated, name, attempt)
        return live if len(live) == 2 else None

    return eventually(found, seconds=60, every=0.2, what=f"two train pods of attempt {attempt} of {name}") or []


def running_pods(operated: Nodeless, name: str, attempt: int) -> list[dict[str, Any]]:
    pods = train_pods(operated, name, attempt)
    for pod in pods:
        operated.start_pod(pod)
    operated.wait_for_phase(name, "Training")
    return pods


def delete(operated: Nodeless, pod: dict[str, Any]) -> None:
    """A user deletes the pod, which has not ended yet."""
    operated.kubectl("delete", "pod", pod["metadata"]["name"], IN_NAMESPACE, "--wait=false")


def train_to_the_end(operated: Nodeless, name: str, attempt: int) -> dict[str, Any]:
    for pod in running_pods(operated, name, attempt):
        operated.succeed_pod(pod)
    operated.succeed(name, "publish")
    return dict(operated.wait_for_phase(name, "Succeeded")["status"])


def test_all_pods_of_a_job_are_created_with_their_service_and_policy(operated: Nodeless) -> None:
    name = start(operated, "nodes-connected")
    pods = train_pods(operated, name, 1)

    uid = operated.job(name)["metadata"]["uid"]
    service = operated.kubectl.get("service", f"qlora-{uid}", IN_NAMESPACE)
    assert service["spec"]["clusterIP"] == "None"
    policy = operated.kubectl.get("networkpolicy", f"qlora-{uid}", IN_NAMESPACE)
    for pod in pods:
        assert pod["metadata"]["labels"].items() >= policy["spec"]["podSelector"]["matchLabels"].items()
        assert pod["metadata"]["labels"].items() >= service["spec"]["selector"].items()
        assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    # The names of the pods lead them to node 0.
    environment = {entry["name"]: entry.get("value") for entry in pods[1]["spec"]["containers"][0]["env"]}
    assert environment["QLORA_RENDEZVOUS"] == f"{pods[0]['spec']['hostname']}.{service['metadata']['name']}:29500"

    # A deleted object exists again before the pods run.
    operated.kubectl("delete", "service", f"qlora-{uid}", IN_NAMESPACE)
    operated.kubectl("delete", "networkpolicy", f"qlora-{uid}", IN_NAMESPACE)
    operated._report(pods[0], "Pending", {"waiting": {"reason": "ContainerCreating"}})
    eventually(lambda: _names(operated, "service", uid), seconds=60, every=0.2, what="the Service")
    assert _names(operated, "networkpolicy", uid) == [policy["metadata"]["name"]]

    status = train_to_the_end(operated, name, 1)
    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
    operated.kubectl("delete", "qlorajob", name, IN_NAMESPACE)
    for kind in ("service", "networkpolicy"):
        eventually(lambda kind=kind: not _names(operated, kind, uid), seconds=60, every=0.5, what=f"no {kind}")  # type: ignore[misc]


def _names(operated: Nodeless, kind: str, uid: str) -> list[str]:
    listed = operated.kubectl.get(kind, IN_NAMESPACE)["items"]
    return [one["metadata"]["name"] for one in listed if uid in one["metadata"]["name"]]


def test_a_pod_that_is_lost_costs_one_disruption_and_all_pods_start_again(operated: Nodeless) -> None:
    name = start(operated, "nodes-lost")
    first, second = running_pods(operated, name, 1)
    delete(operated, second)
    operated.stop_pod(second, KILLED)
    # Its Job fails, so the other one is deleted too; it has noticed by itself.
    operated.stop_pod(first, PEER_LOST)

    status = train_to_the_end(operated, name, 2)

    assert (status["disruptions"], status.get("failures", 0)) == (1, 0)


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_pod_that_is_deleted_before_any_runs_costs_nothing_and_all_start_again(
    operated: Nodeless, number: int
) -> None:
    """Its Job fails, and its controller deletes the others: no pod reports the cause."""
    name = start(operated, f"nodes-early-{number}")
    pods = train_pods(operated, name, 1)
    delete(operated, pods[number])

    status = train_to_the_end(operated, name, 2)

    assert (status.get("disruptions", 0), status.get("failures", 0)) == (0, 0)
    failed = operated.kubectl.get("job", f"{name}-train-1", IN_NAMESPACE)["status"]["conditions"]
    assert any(entry["type"] == "Failed" and entry["status"] == "True" for entry in failed)
