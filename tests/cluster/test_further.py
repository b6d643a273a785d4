"""Features on top of one job: sweeps, gates, continued jobs and preferences.

For cells of one pod see test_life.py.
"""

import json

import pytest

from tests.cluster.environment import ENDLESS, INPUTS, SHORT, Tenant, tiny_job, tiny_sweep
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow


def test_a_sweep_trains_its_cells_names_the_best_and_its_deletion_leaves_that(tenant: Tenant) -> None:
    name = tenant.apply(tiny_sweep("rates"))
    status = tenant.sweep_succeeded(name)
    losses = {cell["name"]: cell["evalLoss"] for cell in status["cells"]}
    best = status["best"]
    assert best["cell"] == min(losses, key=lambda cell: losses[cell]) == "rates-01"
    job = tenant.status("rates-01")
    assert best["sha256"] == job["adapter"]["sha256"]
    claim, _, report = status["report"].removeprefix("pvc://").partition("/")
    tenant.kubectl("delete", "qlorasweep", name, "--wait=true")
    eventually(lambda: not tenant.children("rates-01", "pods"), seconds=120, what="the cells' pods are gone")
    assert tenant.adapter_sum(job) == best["sha256"]
    with tenant.volume(claim) as pod:
        page = pod.run("cat", f"/volume/{report}")
    assert "rates-00" in page
    assert "rates-01" in page


def test_a_sweep_stops_the_worse_cell_and_publishes_the_best_from_shared_files(tenant: Tenant) -> None:
    tenant.claim("published")
    body = tiny_sweep(
        "halved", grid={"learningRate": [5e-3, 1e-5]}, halving={"minSteps": 100, "factor": 2}, publish="best"
    )
    template = body["spec"]["template"]["spec"]
    template["training"] |= {"maxSteps": 600, "evalEverySteps": 100}
    template["output"] = {"destination": "pvc://published/adapter"}
    status = tenant.sweep_succeeded(tenant.apply(body))
    first, second = status["cells"]
    assert (first["phase"], second["phase"], second["reason"]) == ("Succeeded", "Stopped", "NotAmongBest")
    assert [(rung["step"], rung["rank"], rung["cells"]) for rung in second["rungs"]] == [(100, 2, 2)]
    published = tenant.status(status["published"]["name"])
    assert published["adapter"]["uri"] == "pvc://published/adapter"
    assert published["adapter"]["sha256"] == tenant.status("halved-00")["adapter"]["sha256"]
    assert tenant.adapter_sum(published) == published["adapter"]["sha256"]
    assert [tenant.status(name)["base"]["origin"] for name in ("halved-00", "halved-01")] == ["volume", "cache"]
    with tenant.volume(status["claimName"]) as pod:
        shared = pod.run(
            "ls", f"/volume/{status['report'].rpartition('/')[0].removeprefix('pvc://').partition('/')[2]}"
        )
    assert {"quantized", "rows"} <= set(shared.split())


def test_a_loosened_gate_releases_an_adapter_without_training_again(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("gated", gate={"maxEvalLoss": 0.0001}))
    status = tenant.wait_for_end(name)
    assert status["phase"] == "Failed"
    assert tenant.condition(name, "Failed")["reason"] == "GateFailed"
    assert status["gate"]["passed"] is False
    assert "adapter" not in status
    tenant.patch(name, gate={"maxEvalLoss": 100}, retry={"request": "a"})
    status = tenant.wait(name, lambda s: s.get("phase") == "Succeeded", what="the gate passes")
    assert status["gate"]["adapterSha256"] == status["adapter"]["sha256"]
    assert tenant.adapter_sum(status) == status["adapter"]["sha256"]


def test_a_job_that_continues_a_failed_one_begins_at_its_checkpoint(tenant: Tenant) -> None:
    first = tenant.apply(tiny_job("first", steps=ENDLESS, activeDeadlineSeconds=3600))
    tenant.wait(first, lambda s: s.get("checkpoint", {}).get("step", 0) >= 20, what="a checkpoint")
    tenant.patch(first, suspend=True)
    status = tenant.wait_for_phase(first, "Suspended")
    saved = status["checkpoint"]["step"]
    second = tenant.apply(tiny_job("second", steps=ENDLESS, continues=first))
    progress = tenant.wait(second, lambda s: s.get("progress", {}).get("step", 0) > 0, what="the second job trains")
    assert progress["progress"]["step"] >= saved

    tenant.patch(second, cancel=True)

    is_clean = lambda _: tenant.condition(second, "CleanedUp").get("status") == "True"  # noqa: E731
    status = tenant.wait(second, is_clean, what="the canceled job is cleaned up")
    assert tenant.condition(second, "Failed")["reason"] == "Cancelled"
    assert status["history"].startswith("step,train_loss,valid_loss\n")
    with tenant.volume(status["workspace"]["claimName"]) as files:
        assert set(files.run("ls", f"/volume/{status['workspace']['path']}").split()) == {"records", "report"}
    tenant.kubectl("delete", "qlorajob", first, "--wait=false")


def test_a_job_that_compares_answers_reports_how_often_it_prefers_the_chosen(tenant: Tenant) -> None:
    pairs = "".join(
        json.dumps({"prompt": f"Pods of n{number}?", "chosen": f"kubectl get pods -n n{number}", "rejected": "no"})
        + "\n"
        for number in range(40)
    )
    tenant.kubectl("create", "configmap", "pairs", f"--from-literal=pairs.jsonl={pairs}")
    training = {**tiny_job("x")["spec"]["training"], "objective": "dpo", "maxSteps": SHORT}
    dataset = {"source": "configMap://pairs/pairs.jsonl", "eval": {"fraction": 0.2}}
    name = tenant.apply(tiny_job("prefers", dataset=dataset, training=training))
    status = tenant.succeed(name)
    assert status["dataset"]["format"] == "preference"
    assert status["progress"]["evalAccuracy"] > 0.5
    assert status["adapter"]["baseModel"] == f"pvc://{INPUTS}/model"
