"""Deadline, clean-up, deletion, and a namesake that is created right after.

Most are slow: see tests/unit/qlora_operator for decisions, tests/api for the API server.
"""

import pytest

from tests.cluster.environment import ENDLESS, Tenant, tiny_job
from tests.support.waiting import eventually


@pytest.mark.slow
def test_clean_up_deletes_pods_and_scratch_but_neither_job_nor_adapter(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("tidy", cleanupAfterSeconds=0))
    tenant.succeed(name)
    status = tenant.wait(name, lambda _: tenant.condition(name, "CleanedUp").get("status") == "True")
    eventually(lambda: not tenant.children(name, "jobs") and not tenant.children(name, "pods"), seconds=60)
    assert status["phase"] == "Succeeded"
    assert tenant.adapter_sum(status) == status["adapter"]["sha256"]
    workspace = status["workspace"]
    with tenant.volume(workspace["claimName"]) as files:
        left = files.run("ls", f"/volume/{workspace['path']}").split()
    assert set(left) == {"adapter", "records", "report"}


@pytest.mark.slow
def test_a_deleted_job_takes_its_pods_along_and_leaves_the_adapter(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("gone"))
    status = tenant.succeed(name)
    tenant.kubectl("delete", "qlorajob", name)
    eventually(lambda: not tenant.children(name, "jobs") and not tenant.children(name, "pods"), seconds=60)
    assert tenant.adapter_sum(status) == status["adapter"]["sha256"]


@pytest.mark.slow
def test_a_namesake_created_right_after_starts_from_scratch(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("again", steps=ENDLESS))
    first = tenant.wait_for_phase(name, "Training")
    tenant.kubectl("delete", "qlorajob", name)
    tenant.apply(tiny_job("again"))
    second = tenant.succeed(name)
    assert second["workspace"]["claimName"] != first["workspace"]["claimName"]
    assert second["progress"]["totalSteps"] != first.get("progress", {}).get("totalSteps")
    owners = {job["metadata"]["ownerReferences"][0]["uid"] for job in tenant.children(name)}
    assert owners == {tenant.job(name)["metadata"]["uid"]}


@pytest.mark.slow
def test_a_destination_on_another_claim_outlives_the_workspace(tenant: Tenant) -> None:
    name = tenant.apply(
        tiny_job(
            "elsewhere",
            output={"destination": "pvc://inputs/adapters/elsewhere"},
            workspace={"size": "1Gi", "persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}},
        )
    )
    status = tenant.succeed(name)
    assert status["adapter"]["uri"] == "pvc://inputs/adapters/elsewhere"
    tenant.kubectl("delete", "qlorajob", name)
    claim = status["workspace"]["claimName"]
    eventually(lambda: claim not in tenant.kubectl("get", "pvc", "--output=name"), seconds=90)
    assert tenant.adapter_sum(status) == status["adapter"]["sha256"]
