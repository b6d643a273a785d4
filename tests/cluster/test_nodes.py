"""Two pods train one adapter: they find each other by name, and the loss of one costs nothing but time."""

import json

import pytest

from devcluster.files import claim
from devcluster.product import SHARED_PROFILE
from tests.cluster.environment import LONG, Object, Tenant, tiny_job
from tests.support.manifests import Manifest
from tests.support.waiting import eventually

WORKSPACE = "shared"


@pytest.fixture(scope="module")
def shared(tenant: Tenant) -> str:
    """A claim that several pods mount: on the only node, any claim is."""
    tenant.kubectl("apply", "--filename=-", input_text=json.dumps(claim(WORKSPACE, tenant.namespace)))
    return WORKSPACE


def job_of_two(name: str, workspace: str) -> Manifest:
    return tiny_job(
        name,
        steps=LONG,
        resources={"cpu": "500m", "nodes": 2},
        workspace={"claimName": workspace},
        scheduling={"profile": SHARED_PROFILE},
    )


def train_pods(tenant: Tenant, name: str, attempt: int) -> list[Object]:
    """The train pods of that attempt, that of node 0 first."""
    pods = tenant.get("pods", f"--selector=batch.kubernetes.io/job-name={name}-train-{attempt}")["items"]
    return sorted(pods, key=lambda pod: str(pod["metadata"]["name"]))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--grace-period=0", "--force"]], ids=["deleted", "killed"])
def test_a_pod_of_two_that_is_lost_is_one_disruption_and_the_adapter_has_the_same_bytes(
    tenant: Tenant, shared: str, undisturbed: Object, options: list[str]
) -> None:
    name = tenant.apply(job_of_two(f"lost-{len(options)}", shared))
    tenant.wait(name, lambda s: s.get("checkpoint", {}).get("step", 0) > 0 and s["phase"] == "Training")
    first, second = train_pods(tenant, name, 1)
    tenant.kubectl("delete", "pod", second["metadata"]["name"], "--wait=false", *options)
    # The other one ends too, and both start again.
    eventually(lambda: len(train_pods(tenant, name, 2)) == 2, seconds=120, what="two new pods")
    uids = {pod["metadata"]["uid"] for pod in train_pods(tenant, name, 2)}
    assert not uids & {first["metadata"]["uid"], second["metadata"]["uid"]}

    status = tenant.succeed(name)

    assert (status["disruptions"], status.get("failures", 0)) == (1, 0)
    assert tenant.adapter_sum(status) == tenant.adapter_sum(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tenant: Tenant, shared: str) -> Object:
    """The status of a job of two pods that nobody has touched."""
    return tenant.succeed(tenant.apply(job_of_two("two-undisturbed", shared)))
