"""Real jobs and Kueue's controller: quota, preemption, and the effect of a preemption on the adapter.

See tests/api/integrations/test_kueue.py for Kueue's statements about held jobs.
"""

from collections.abc import Iterator

import pytest

from devcluster import layout, product
from tests.cluster.environment import LONG, Cluster, Tenant, tiny_job
from tests.support.services.kueue import Kueue, kueue
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
QUEUE, LATE = "gpus", "late"
MISSING = f"Kueue: LocalQueue {LATE} doesn't exist"


@pytest.fixture(scope="module")
def queues(installed: Cluster, tenant: Tenant, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kueue]:
    """Run Kueue for the tenant's Jobs, with one of the node's two GPUs in its queue."""
    where = layout.from_environment()
    values = {**product.SMALL_MACHINE, "kueue": {"enabled": True}}
    product.install(where, where.kubeconfig, installed.images, values)
    with kueue(installed.kubectl, tmp_path_factory.mktemp("kueue"), tenant.namespace) as controller:
        try:
            controller.queue(QUEUE, 1)
            for name, value in (("low", 10), ("high", 1000)):
                controller.priority(name, value)
            yield controller
        finally:
            tenant.kubectl("delete", "qlorajobs", "--all", "--cascade=foreground")
            controller.remove()
            product.install(where, where.kubeconfig, installed.images)


def queued_job(name: str, priority: str, queue: str) -> dict[str, object]:
    return tiny_job(name, steps=LONG, scheduling={"queueName": queue, "queuePriorityClassName": priority})


def said(tenant: Tenant, name: str) -> str:
    """Reason of the job's wait, or its activity."""
    return str(tenant.condition(name, "Succeeded").get("message", ""))


def test_jobs_share_a_quota_of_one_and_the_preempted_one_ends_in_the_same_bytes(tenant: Tenant, queues: Kueue) -> None:
    # A queue that does not exist yet holds these two until the third trains.
    also_low, high = (tenant.apply(queued_job(f"also-{priority}", priority, LATE)) for priority in ("low", "high"))
    for waiting in (also_low, high):
        eventually(lambda name=waiting: MISSING in said(tenant, name), seconds=300, what=waiting)  # type: ignore[misc]
    # The queue has one of the node's two GPUs, and this job does not use the queue.
    undisturbed = tenant.apply(tiny_job("alone", steps=LONG))
    low = tenant.apply(queued_job("low", "low", QUEUE))

    preempted = tenant.held_until_asked(low, lambda _: queues.local_queue(LATE, QUEUE))

    status = tenant.wait_for_phase(low, "Queued")
    tenant.wait(low, lambda _: "Kueue: Preempted to accommodate a workload" in said(tenant, low))
    assert tenant.condition(low, "Succeeded")["reason"] == "WaitingForQueue"
    tenant.wait_for_phase(high, "Training")
    for waiting in (low, also_low):
        assert tenant.running_pod(waiting, "train") is None
    tenant.wait(also_low, lambda _: "insufficient unused quota" in said(tenant, also_low))
    assert status["checkpoint"]["step"] > 0

    statuses = {name: tenant.succeed(name) for name in (high, low, also_low, undisturbed)}

    assert {name: status.get("disruptions", 0) for name, status in statuses.items()} == dict.fromkeys(statuses, 0)
    train_pods = tenant.get("pods", f"--selector=qlora.dev/job={low},qlora.dev/step=train")["items"]
    assert preempted["metadata"]["uid"] not in {pod["metadata"]["uid"] for pod in train_pods}
    assert f"{low}-train-2" not in [job["metadata"]["name"] for job in tenant.children(low)]
    assert len(tenant.attempts(low)) >= 2
    assert tenant.adapter_sum(statuses[low]) == tenant.adapter_sum(statuses[undisturbed])
