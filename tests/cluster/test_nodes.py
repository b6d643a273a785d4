"""Two pods train one adapter: they find each other by name, and the loss of one costs nothing but time.

NetworkPolicies are enforced: the pods reach each other by the one that the operator creates for the job.
"""

import pytest

from devcluster import cluster, layout, node, toolchain
from devcluster.product import SHARED_PROFILE
from tests.cluster.environment import ENDLESS, LONG, Object, Tenant, tiny_job
from tests.support.manifests import Manifest
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
WORKSPACE = "shared"
_REACH = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 29500), timeout=3).close()
except OSError:
    print("denied")
else:
    print("reached")
"""


@pytest.fixture(scope="module")
def shared(tenant: Tenant) -> str:
    """Create a claim for several pods of the only node, and enforce NetworkPolicies."""
    where = layout.from_environment()
    toolchain.built(where, [node.POLICY_PROGRAM])
    with cluster.locked(where):
        cluster.enforce_network_policies(where)
    tenant.claim(WORKSPACE)
    return WORKSPACE


def job_of_two(name: str, workspace: str, steps: int = LONG) -> Manifest:
    return tiny_job(
        name,
        steps=steps,
        resources={"cpu": "500m", "nodes": 2},
        workspace={"claimName": workspace},
        scheduling={"profileName": SHARED_PROFILE},
    )


def train_pods(tenant: Tenant, name: str, attempt: int) -> list[Object]:
    """The train pods of that attempt, that of node 0 first."""
    pods = tenant.get("pods", f"--selector=batch.kubernetes.io/job-name={name}-train-{attempt}")["items"]
    return sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))


def is_running(pod: Object) -> bool:
    return bool(pod["status"]["phase"] == "Running")


@pytest.mark.parametrize("options", [[], ["--grace-period=0", "--force"]], ids=["deleted", "killed"])
def test_losing_one_of_two_pods_is_one_disruption_and_keeps_the_adapters_bytes(
    tenant: Tenant, shared: str, undisturbed: Object, options: list[str]
) -> None:
    name = tenant.apply(job_of_two(f"lost-{len(options)}", shared))
    eventually(lambda: [is_running(pod) for pod in train_pods(tenant, name, 1)] == [True] * 2, what="two running pods")
    first, second = train_pods(tenant, name, 1)
    with tenant.held(name):
        tenant.delete_pod(second, *options)
    # The other one ends too, and both start again.
    eventually(lambda: len(train_pods(tenant, name, 2)) == 2, seconds=120, what="two new pods")
    uids = {pod["metadata"]["uid"] for pod in train_pods(tenant, name, 2)}
    assert not uids & {first["metadata"]["uid"], second["metadata"]["uid"]}

    status = tenant.succeed(name)

    assert (status["disruptions"], status.get("failures", 0)) == (1, 0)
    assert tenant.adapter_sum(status) == tenant.adapter_sum(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tenant: Tenant, shared: str) -> Object:
    """The status of an undisturbed job of two pods."""
    return tenant.succeed(tenant.apply(job_of_two("two-undisturbed", shared)))


def test_no_other_pod_of_the_namespace_reaches_the_train_pods(tenant: Tenant, shared: str) -> None:
    name = tenant.apply(job_of_two("closed", shared, ENDLESS))
    tenant.wait(name, lambda status: status.get("progress", {}).get("loss"), what="two pods that train")
    first = tenant.get("pod", train_pods(tenant, name, 1)[0]["metadata"]["name"])
    with tenant.volume(shared) as pod:

        def answer() -> str:
            return pod.run("python3", "-c", _REACH, first["status"]["podIP"]).strip()

        # A policy is enforced a moment after its pods start.
        eventually(lambda: answer() == "denied", seconds=60, what="the policy")
        # The same attempt, of the same pod.
        tenant.kubectl("delete", "networkpolicies", "--all")
        eventually(lambda: answer() == "reached", seconds=60, what="no policy")
    tenant.kubectl("delete", "qlorajob", name)
