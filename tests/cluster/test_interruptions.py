"""Nothing is lost: pods deleted, jobs suspended, the operator killed, memory exhausted."""

import pytest

from tests.cluster.environment import LONG, Tenant, tiny_job


@pytest.fixture(scope="module")
def undisturbed(tenant: Tenant) -> str:
    """The name of an undisturbed job that runs next to the disturbed one."""
    return tenant.apply(tiny_job("undisturbed", steps=LONG))


def wait_for_checkpoint(tenant: Tenant, name: str) -> None:
    tenant.wait(name, lambda s: s.get("checkpoint", {}).get("step", 0) > 0 and s["phase"] == "Training")


def test_a_deleted_pod_is_resumed_to_the_same_bytes(tenant: Tenant, undisturbed: str) -> None:
    name = tenant.apply(tiny_job("pod-deleted", steps=LONG))
    wait_for_checkpoint(tenant, name)
    pod = tenant.running_pod(name, "train")
    assert pod is not None
    tenant.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
    status = tenant.succeed(name)
    successors = tenant.get("pods", f"--selector=qlora.dev/job={name},qlora.dev/step=train")["items"]
    assert {successor["metadata"]["uid"] for successor in successors} - {pod["metadata"]["uid"]}
    with tenant.volume(status["resolved"]["claimName"]) as files:
        attempts = files.run("cat", f"/volume/{status['resolved']['workspacePath']}/records/attempts.jsonl")
    assert len(attempts.splitlines()) >= 2
    assert tenant.adapter_sum(status) == tenant.adapter_sum(tenant.succeed(undisturbed))


def test_suspension_frees_the_gpu_and_resumption_ends_in_the_same_bytes(tenant: Tenant, undisturbed: str) -> None:
    name = tenant.apply(tiny_job("suspended", steps=LONG))
    wait_for_checkpoint(tenant, name)
    tenant.kubectl("patch", "qlorajob", name, "--type=merge", '--patch={"spec":{"suspend":true}}')
    status = tenant.wait_for_phase(name, "Suspended")
    assert tenant.running_pod(name, "train") is None
    assert status["checkpoint"]["step"] > 0
    assert tenant.condition(name, "Suspended")["status"] == "True"
    tenant.kubectl("patch", "qlorajob", name, "--type=merge", '--patch={"spec":{"suspend":false}}')
    status = tenant.succeed(name)
    assert tenant.condition(name, "Suspended")["status"] == "False"
    assert status["step"]["name"] == "publish"
    assert f"{name}-train-2" in [job["metadata"]["name"] for job in tenant.children(name)]
    assert status["adapter"]["sha256"] == tenant.succeed(undisturbed)["adapter"]["sha256"]


# An operator that dies at any write is swept by tests/api/operator/test_crash_sweep.py.
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("Preparing", marks=pytest.mark.slow),
        "Training",
        pytest.param("Publishing", marks=pytest.mark.slow),
    ],
)
def test_killing_the_operator_changes_nothing_but_time(tenant: Tenant, phase: str, undisturbed: str) -> None:
    name = tenant.apply(tiny_job(f"killed-{phase.lower()}", steps=LONG))
    tenant.wait_for_phase(name, phase)
    tenant.cluster.kill_operator()
    status = tenant.succeed(name)
    assert status["adapter"]["sha256"] == tenant.succeed(undisturbed)["adapter"]["sha256"]
    assert sorted(job["metadata"]["name"] for job in tenant.children(name)) == [
        f"{name}-{step}-1" for step in ("prepare", "publish", "train")
    ]


@pytest.mark.slow
def test_a_pod_over_its_memory_limit_is_reported_with_a_remedy(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("hungry", resources={"cpu": "500m", "memory": "128Mi"}))
    status = tenant.wait_for_end(name)
    assert status["phase"] == "Failed"
    assert status["lastFailure"]["reason"] == "HostOutOfMemory"
    message = tenant.condition(name, "Failed")["message"]
    assert "128Mi" in message
    assert "spec.resources.memory" in message
    assert tenant.running_pod(name, "train") is None
