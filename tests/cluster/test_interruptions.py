"""Nothing is lost: jobs suspended, the operator killed, memory exhausted. For a deleted pod see test_life.py."""

import pytest

from tests.cluster.environment import LONG, Tenant, tiny_job


@pytest.fixture(scope="module")
def undisturbed(tenant: Tenant) -> str:
    """The name of an undisturbed job that runs next to the disturbed one."""
    return tenant.apply(tiny_job("undisturbed", steps=LONG))


def test_suspension_frees_the_gpu_and_resumption_ends_in_the_same_bytes(tenant: Tenant, undisturbed: str) -> None:
    name = tenant.apply(tiny_job("suspended", steps=LONG))
    tenant.held_until_asked(name, lambda _: tenant.patch(name, suspend=True))
    status = tenant.wait_for_phase(name, "Suspended")
    assert tenant.running_pod(name, "train") is None
    assert status["checkpoint"]["step"] > 0
    assert tenant.condition(name, "Suspended")["status"] == "True"
    tenant.patch(name, suspend=False)
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
