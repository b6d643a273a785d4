"""The forecast of GPU hours, their cost, and the budget that stops a job at a checkpoint."""

from typing import Any

import pytest

from qlora_api.forecast import ASSUMED_UTILIZATION, cost_text, hours_text, seconds_of_flops, training_flops
from qlora_api.profile import Limits, Profile
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import WorkStatus
from qlora_operator.decisions.events import budget_event
from qlora_operator.decisions.plan import DeleteJob
from qlora_operator.decisions.usage.budget import budget_at
from tests.support.builders import (
    FACTS,
    NAME,
    PROFILE,
    after,
    child,
    deleted,
    ended,
    follow,
    make_job,
    message_of,
    node,
    plan_of,
    pod,
    present,
    progress,
    reason_of,
    resolved,
    result,
    running,
    seen,
    status_in,
    stored_again,
    time,
)

PRICED = Profile.model_validate(PROFILE.dump() | {"gpuTflops": 1000, "gpuHourPrice": "2.50", "currency": "EUR"})
WORK = WorkStatus(parameters=10**9, tokens=10**9, flops=6e18)
RUNNING = (child("train"), running(pod("train"), since=-3600))


def status_with(step: str, profile: Profile = PRICED, **fields: Any) -> QLoRAJobStatus:
    return status_in(step, resolved=resolved(profile).dump(), **fields)  # type: ignore[arg-type]


def prepared(profile: Profile = PRICED, **spec: Any) -> QLoRAJobStatus:
    """The status after prepare's report of the steps to compute."""
    body = pod("prepare")
    done = ended(body, 0, result(body, "prepare", **FACTS["prepare"], work=WORK))
    return follow(make_job(status_with("prepare", profile), **spec), child("prepare", Complete="Done"), done)


def seen_running(**spec: Any) -> QLoRAJobStatus:
    """The status of a job whose pod has had its GPU for an hour."""
    return follow(make_job(status_with("train"), **spec), *RUNNING)


def test_operations_are_counted_as_a_frozen_base_needs_them() -> None:
    assert [training_flops(7 * 10**9, 10**6, share) for share in (0, 0.5, 1)] == [4 * 7e15, 5 * 7e15, 6 * 7e15]
    assert seconds_of_flops(1e15, 1000) == pytest.approx(1 / ASSUMED_UTILIZATION)


def test_hours_and_costs_are_decimal() -> None:
    assert [hours_text(seconds) for seconds in (0, 18, 5400, 3600 * 10**6)] == ["0.00", "0.01", "1.50", "1000000.00"]
    assert cost_text(5400, "2.50", "EUR") == "3.75 EUR"
    # In floating point it would be 1.00.
    assert cost_text(3600, "1.005", "USD") == "1.01 USD"
    assert cost_text(5400, None, None) is None


def test_the_largest_numbers_that_a_pod_may_report_have_a_forecast() -> None:
    """A tenant can write a record, and an error would end every pass over the job."""
    assert float(hours_text(3.6e43)) == pytest.approx(1e40)
    with pytest.raises(ValueError, match="flops"):
        WorkStatus(parameters=1, tokens=1, flops=1e31)
    with pytest.raises(ValueError, match="gpuTflops"):
        Profile.model_validate(PROFILE.dump() | {"gpuTflops": 0.001})
    slow = Profile.model_validate(PRICED.dump() | {"gpuTflops": 0.01, "gpuHourPrice": "999999999.999999"})
    body = pod("prepare")
    work = WorkStatus(parameters=10**9, tokens=10**9, flops=1e30)
    done = ended(body, 0, result(body, "prepare", **FACTS["prepare"], work=work))
    status = follow(make_job(status_with("prepare", slow)), child("prepare", Complete="Done"), done)
    assert status.forecast is not None
    assert float(present(status.forecast.cost).removesuffix(" EUR")) == pytest.approx(1e30 / 0.01e12 / 0.3 / 3600 * 1e9)
    assert stored_again(status) == status


def test_prepare_is_followed_by_a_forecast_if_the_gpus_speed_is_known() -> None:
    forecast = present(prepared().forecast)
    assert (forecast.gpu_hours, forecast.basis, forecast.utilization) == ("5.56", "Flops", ASSUMED_UTILIZATION)
    assert forecast.cost == "13.89 EUR"
    assert prepared(PROFILE).forecast is None
    [ready] = [condition for condition in prepared().conditions if condition.type == "Prepared"]
    time = "training is expected to take 3h58m to 8h20m on 1 GPU (5.56 GPU hours, 13.89 EUR); "
    assert ready.message.startswith(time)


def test_after_ten_steps_the_forecast_is_of_the_runs_own_pace() -> None:
    def report(stored: QLoRAJobStatus, step: int, at: float) -> QLoRAJobStatus:
        record = progress(
            training_step=step, total_steps=99, training_since=time(-30), remaining_seconds=7200.0, time=time(at)
        )
        return follow(make_job(stored), *RUNNING, progress=record, log_read=True, now=after(at))

    stored = report(prepared_and_running(), 5, 0)
    assert present(stored.forecast).basis == "Flops"
    # The pod has made nine steps since it was first seen to train, then ten.
    assert (report(stored, 14, 60).forecast, report(stored, 14, 60).forecast) == (stored.forecast, stored.forecast)
    measured = present(report(stored, 15, 1800).forecast)
    assert (measured.basis, measured.gpu_hours, measured.cost) == ("Measured", "3.50", "8.75 EUR")
    assert measured.utilization is None


def prepared_and_running() -> QLoRAJobStatus:
    stored = status_with("train", forecast={"gpuHours": "5.56", "basis": "Flops", "utilization": 0.3})
    return follow(make_job(stored), *RUNNING)


def test_a_forecast_above_the_budget_is_reported_before_the_gpu_is_used() -> None:
    budget: dict[str, Any] = {"budget": {"gpuHours": 5}}
    status = prepared(**budget)
    assert status.step is not None
    assert (status.step.name, status.step.job_uid) == ("train", "")
    assert present(status.forecast).within_budget is False
    assert "raise spec.budget.gpuHours" in present(status.forecast).message
    event = present(budget_event(make_job(status_with("prepare"), **budget), status, after(0)))
    assert (event["type"], event["reason"]) == ("Warning", "ForecastExceedsBudget")
    assert budget_event(make_job(status, **budget), status, after(0)) is None
    # It is raised, then taken away.
    raised = follow(make_job(status, budget={"gpuHours": 6}))
    assert (present(raised.forecast).within_budget, present(raised.forecast).message) == (True, "")
    assert present(follow(make_job(raised)).forecast).within_budget is None


def test_a_job_that_has_used_its_budget_stops_at_a_checkpoint() -> None:
    job = make_job(seen_running(), budget={"gpuHours": 1.5})
    assert follow(job, *RUNNING, now=after(1799)).phase == "Training"
    status = follow(job, *RUNNING)
    planned = plan_of(job, status, seen(*RUNNING), after(600))
    assert planned.look_again == after(1800)

    status = follow(job, *RUNNING, now=after(1800))

    assert (status.phase, reason_of(status)) == ("Failed", "BudgetExceeded")
    assert message_of(status) == (
        "the train pods have used 1.50 GPU hours, and 1.50 are allowed: raise spec.budget.gpuHours, and "
        "set a new spec.retry.request to continue from the checkpoint"
    )
    assert status.usage is not None
    assert (status.usage.gpu_seconds, status.usage.cost, status.active_seconds) == (5400, "3.75 EUR", 5400)
    assert budget_event(job, status, after(1800)) is None
    # The Job is deleted, so that the trainer is asked to save and stop.
    stored = make_job(status, budget={"gpuHours": 1.5})
    deletion = plan_of(stored, follow(stored, *RUNNING, now=after(1801)), seen(*RUNNING), after(1801))
    assert deletion.actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)


def test_a_retry_with_a_larger_budget_keeps_the_counted_hours() -> None:
    failed = follow(make_job(seen_running(), budget={"gpuHours": 0.5}), *RUNNING)
    assert reason_of(failed) == "BudgetExceeded"
    body = pod("train")
    saved = ended(body, 143, result(body, "train", 143, training_step=7), start=-3600, end=60)
    stopped = follow(make_job(failed, budget={"gpuHours": 0.5}), deleted(saved, 0), now=after(70))
    assert present(stopped.usage).gpu_seconds == 3660

    again: dict[str, Any] = {"retry": {"request": "a"}}
    same = follow(make_job(stopped, budget={"gpuHours": 0.5}, **again), deleted(saved, 0), now=after(80))
    assert reason_of(same) == "BudgetExceeded"
    more = follow(make_job(stopped, budget={"gpuHours": 2}, **again), deleted(saved, 0), now=after(80))
    assert more.step is not None
    assert (more.phase, more.step.name, more.step.attempt) == ("Queued", "train", 2)
    assert more.usage == stopped.usage


def test_a_trained_adapter_is_published_above_its_budget() -> None:
    spent = {"gpuHours": "27.7775", "lostGpuHours": {}, "pods": []}
    body = pod("publish")
    status = follow(make_job(status_with("publish", usage=spent), budget={"gpuHours": 1}), child("publish"), body)
    assert status.phase == "Publishing"


def test_a_run_that_has_just_ended_is_not_stopped_by_its_budget() -> None:
    job, body = make_job(seen_running(), budget={"gpuHours": 1}), pod("train")
    done = ended(body, 0, result(body, "train", **FACTS["train"]), start=-3600, end=60)
    assert follow(job, child("train"), done, now=after(61)).phase == "Training"
    assert follow(job, child("train", Complete="Done"), done, now=after(62)).phase == "Publishing"


def test_a_succeeded_pod_does_not_hide_a_running_one() -> None:
    """A user may make a pod that the Job seems to own, and one of two nodes may hang."""
    job, body = make_job(seen_running(), budget={"gpuHours": 1}), pod("train", 1, 9)
    decoy = ended(body, 0, start=-50, end=-49)
    status = follow(job, *RUNNING, decoy, now=after(61))
    assert (status.phase, reason_of(status)) == ("Failed", "BudgetExceeded")


def test_the_budget_of_a_publishing_job_is_not_checked() -> None:
    spec: dict[str, Any] = {"budget": {"gpuHours": 0.5}}
    used = seen_running().usage
    stored = make_job(status_with("publish", usage=used.dump() if used else None), **spec)
    assert budget_at(stored, stored.status, seen(*RUNNING), after(60)) is None


def test_the_budget_of_several_nodes_is_used_up_by_all_of_them() -> None:
    spec: dict[str, Any] = {"budget": {"gpuHours": 1}, "resources": {"gpus": 2, "nodes": 2}}
    pods = child("train"), running(node(0), since=-600), running(node(1), since=-300)
    stored = make_job(follow(make_job(status_with("train"), **spec), *pods), **spec)
    assert present(stored.status.usage).gpu_seconds == 2 * 900
    # 1800 of 3600 GPU seconds are left at NOW, and both nodes have 4 GPUs.
    for at in (0, 300):
        status = follow(stored, *pods, now=after(at))
        assert budget_at(stored, status, seen(*pods), after(at)) == after(450)
    assert plan_of(stored, status, seen(*pods), after(300)).look_again == after(450)
    assert reason_of(follow(stored, *pods, now=after(450))) == "BudgetExceeded"


def test_the_profile_limits_a_job_without_a_budget() -> None:
    profile = PROFILE.model_copy(update={"limits": Limits(gpu_hours=0.5)})
    fixed = present(follow(make_job(), profiles={"default": profile}).resolved)
    assert (fixed.gpu_hours, fixed.profile.limits) == (0.5, None)
    stored = status_in("train", resolved=resolved().model_copy(update={"gpu_hours": 0.5}).dump())
    status = follow(make_job(stored, budget={"gpuHours": 9}), *RUNNING)
    assert reason_of(status) == "BudgetExceeded"
    assert "ask the administrator to raise limits.gpuHours of profile 'default'" in message_of(status)

    waits = follow(make_job(budget={"gpuHours": 9}), profiles={"default": profile})
    assert reason_of(waits) == "LimitExceeded"
    assert "spec.budget.gpuHours is 9, and profile 'default' allows 0.5" in message_of(waits)


def test_a_job_without_gpus_has_no_budget_to_exceed() -> None:
    cpu = PROFILE.model_copy(update={"gpu_resource": None})
    stored = follow(make_job(status_with("train", cpu), budget={"gpuHours": 0.01}), *RUNNING)
    assert stored.phase == "Training"


@pytest.mark.parametrize(
    "broken",
    [{"gpuHourPrice": "2.50"}, {"currency": "EUR"}, {"gpuHourPrice": "-1", "currency": "EUR"}, {"gpuTflops": 0}],
)
def test_a_price_is_a_decimal_with_its_currency(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"gpuHourPrice|gpuTflops"):
        Profile.model_validate(PROFILE.dump() | broken)
