"""The job waits for late objects, and a failed job continues where it failed."""

import json

import pytest

from tests.cluster.environment import LONG, Tenant, tiny_job
from tests.support.waiting import eventually


def test_a_retried_job_continues_from_its_checkpoint_with_the_fixed_spec(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("taken-up", steps=LONG))
    tenant.held_until_asked(name, lambda _: tenant.patch(name, activeDeadlineSeconds=1))
    failed = tenant.wait_for_end(name)
    assert (failed["phase"], failed["lastFailure"]["reason"]) == ("Failed", "DeadlineExceeded")
    eventually(lambda: tenant.running_pod(name, "train") is None, seconds=60)

    tenant.patch(name, activeDeadlineSeconds=None, retry={"request": "a"})
    taken_up = tenant.wait(name, lambda status: status.get("retryRequest") == "a")

    assert taken_up["activeSeconds"] >= failed["activeSeconds"] > 0
    tenant.succeed(name)
    assert f"{name}-train-2" in [job["metadata"]["name"] for job in tenant.children(name)]
    assert tenant.attempts(name)[-1]["fromStep"] > 0
    assert (tenant.condition(name, "Failed")["status"], tenant.condition(name, "Stalled")["status"]) == (
        "False",
        "False",
    )


def test_late_data_is_waited_for_and_costs_no_retry(tenant: Tenant) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": f"a {number}"}]}
        for number in range(8)
    ]
    name = tenant.apply(
        tiny_job("late-data", dataset={"source": "configMap://late/rows.jsonl"}, retry={"maxFailures": 0})
    )

    def waits() -> bool:
        pods = {pod["metadata"]["name"] for pod in tenant.children(name, "pods")}
        events = tenant.get("events")["items"]
        return any("late" in event["message"] for event in events if event["involvedObject"]["name"] in pods)

    eventually(waits, seconds=60, what="the kubelet's Event of the missing ConfigMap")
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    late = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late"}, "data": {"rows.jsonl": content}}
    tenant.kubectl("apply", "--filename=-", input_text=json.dumps(late))
    assert tenant.succeed(name).get("failures", 0) == 0


@pytest.mark.slow
def test_a_step_that_hangs_is_reported_and_restarted_from_its_checkpoint(tenant: Tenant) -> None:
    retry = {"onNoProgress": "restart", "maxFailures": 1}
    name = tenant.apply(tiny_job("hangs", steps=LONG, progressDeadlineSeconds=60, retry=retry))

    with tenant.held(name):
        status = tenant.wait(name, lambda status: status.get("failures", 0) == 1)

    assert status["lastFailure"]["reason"] == "ProgressDeadlineExceeded"
    status = tenant.succeed(name)
    assert status["disruptions"] == 0
