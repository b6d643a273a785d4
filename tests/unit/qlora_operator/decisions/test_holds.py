"""A paused profile stops its jobs at a checkpoint, and they continue by themselves."""

from dataclasses import replace
from typing import Any

import pytest

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_operator.decisions.observed.holds import hold_of
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import CreateJob, DeleteJob
from qlora_operator.decisions.resolution import is_canary
from tests.support.builders import (
    NAME,
    PROFILE,
    child,
    conditions_of,
    ended,
    failed,
    follow,
    make_job,
    message_of,
    plan_of,
    pod,
    present,
    reason_of,
    running,
    seen,
    status_in,
)

PAUSED = {"default": Profile.model_validate(PROFILE.dump() | {"paused": True})}
RUNNING = (child("train"), running(pod("train")))


def paused(status: QLoRAJobStatus | None = None, **spec: Any) -> QLoRAJob:
    job = make_job(status, **spec)
    return replace(job, hold=hold_of(job, PAUSED))


def test_a_running_job_of_a_paused_profile_is_stopped_and_waits_with_the_reason() -> None:
    job = paused(status_in("train"))
    stopping = follow(job, *RUNNING, profiles=PAUSED)
    assert plan_of(job, stopping, seen(*RUNNING)).actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)
    assert (stopping.phase, reason_of(stopping)) == ("Training", "ProfilePaused")
    assert message_of(stopping).endswith("the running step saves a checkpoint and stops")
    stopped = follow(paused(stopping), profiles=PAUSED)
    assert (stopped.phase, reason_of(stopped), conditions_of(stopped)["Suspended"]) == (
        "Queued",
        "ProfilePaused",
        "False",
    )
    assert plan_of(paused(stopped), stopped, seen()).actions == ()


def test_it_continues_with_the_next_job_however_often_it_was_paused() -> None:
    status = status_in("train")
    for attempt in (2, 3, 4):
        interrupted = ended(pod("train", attempt - 1), 143)
        status = follow(paused(status), child("train", attempt - 1), interrupted, profiles=PAUSED)
        status = follow(paused(status), interrupted, profiles=PAUSED)
        status = follow(make_job(status), interrupted)
        assert plan_of(make_job(status), status, seen(interrupted)).actions == (CreateJob("train", attempt),)
        step = present(status.step).model_copy(update={"job_uid": f"uid-{NAME}-train-{attempt}"})
        status = status.model_copy(update={"step": step})
    assert (status.disruptions, status.failures) == (0, 0)


def test_a_new_job_starts_when_the_pause_ends() -> None:
    status = follow(paused(), profiles=PAUSED)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "ProfilePaused")
    assert present(follow(make_job(status)).resolved).profile.paused is None


def test_a_failed_job_is_retried_when_the_pause_ends() -> None:
    end = (child("train", Failed="x"), failed("train", 10, "BadConfiguration", "the rank"))
    stored = follow(make_job(status_in("train")), *end)
    held = follow(paused(stored, retry={"request": "a"}), *end, profiles=PAUSED)
    assert (held.phase, reason_of(held, "Stalled")) == ("Failed", "ProfilePaused")
    assert follow(make_job(held, retry={"request": "a"}), *end).phase != "Failed"


def test_a_suspension_by_the_user_is_reported_before_a_pause() -> None:
    status = follow(paused(status_in("train"), suspend=True), profiles=PAUSED)
    assert (status.phase, reason_of(status)) == ("Suspended", "Suspended")


def canary(percent: int) -> dict[str, Profile]:
    image = {"image": "example.org/next", "percent": percent}
    return {"default": Profile.model_validate(PROFILE.dump() | {"canary": image})}


def test_a_canary_gets_its_share_of_the_new_jobs_and_no_started_one() -> None:
    status = follow(make_job(), profiles=canary(100))
    fixed = present(status.resolved)
    assert (fixed.profile.image, fixed.canary, fixed.profile.canary) == ("example.org/next", True, None)
    assert present(follow(make_job(status_in("train")), *RUNNING, profiles=canary(100)).resolved).canary is None
    job, profile = make_job(), canary(20)["default"]
    chosen = sum(
        is_canary(replace(job, uid=f"0a1b2c3d-0000-4000-8000-{number:012}"), profile) for number in range(2000)
    )
    assert 300 < chosen < 500


@pytest.mark.parametrize("prepared", [False, True])
def test_a_retried_job_changes_its_image_only_before_it_has_a_run(prepared: bool) -> None:
    step: StepName = "train" if prepared else "prepare"
    stored = follow(make_job(status_in(step)), child(step, Failed="x"), failed(step, 10, "BadConfiguration", "x"))
    status = follow(make_job(stored, retry={"request": "a"}), profiles=canary(100))
    assert present(status.resolved).canary is (None if prepared else True)


def test_all_cells_of_a_sweep_have_one_image() -> None:
    cells = [replace(make_job(), uid=f"uid-{number}", shares="rates-1") for number in range(50)]
    assert len({is_canary(cell, canary(50)["default"]) for cell in cells}) == 1
