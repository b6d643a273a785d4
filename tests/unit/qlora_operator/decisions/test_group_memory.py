"""Jobs that do not fit the GPU together: they end before a GPU is asked for, and only if that is sure."""

import math
from dataclasses import replace
from typing import Any

import pytest

from qlora_api.memory.estimate import GIB, LOW_FACTOR
from qlora_api.spec.group import GroupStatus
from qlora_api.status import MemoryStatus, QLoRAJobStatus
from qlora_operator.decisions.groups.group import look_again_after, waiting_for
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.members import GroupFacts, member_of
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import CreateJob, Plan, cannot_be_undone, plan
from qlora_operator.decisions.status import next_status
from tests.support.builders import NAME, child, facts, message_of, pod, reason_of, resolved, running
from tests.support.grouped import ALL, FOLLOWER, Doing, alphas, job, led_by


def member(
    name: str,
    joined: GroupStatus,
    *,
    doing: Doing = "prepared",
    gib: int = 18,
    shared: int | None = 5,
    gpu: int | None = 24,
    **spec: Any,
) -> QLoRAJob:
    """A job that takes so many GiB, of which some are shared, of a GPU of this size."""
    memory = MemoryStatus(
        estimate_bytes=gib * GIB,
        low_bytes=math.floor(LOW_FACTOR * gib * GIB),
        shared_bytes=None if shared is None else shared * GIB,
        verdict="fits",
    )
    body = job(doing, name, joined, **({} if gpu is None else {"resources": {"gpuMemory": gpu}}) | spec)
    return replace(body, status=body.status.model_copy(update={"memory": memory}))


def seen_with(own: QLoRAJob, *others: QLoRAJob, bodies: tuple[dict[str, Any], ...] = ()) -> Facts:
    return facts(own, *bodies, group=GroupFacts(tuple(filter(None, map(member_of, others)))))


def planned(found: Facts) -> tuple[QLoRAJobStatus, Plan]:
    """The next status and what is done."""
    status = next_status(found)
    again = look_again_after(status, found)
    return status, plan(found.job, status, found.observed, found.now, group_again=again)


def refused() -> QLoRAJob:
    """The leader of a group that is too large, once it has ended."""
    leader = member("alpha", ALL)
    return replace(leader, status=next_status(seen_with(leader, member(NAME, FOLLOWER), member("zulu", FOLLOWER))))


def test_jobs_that_do_not_fit_together_end_without_a_train_job_and_say_what_to_do() -> None:
    leader, followers = member("alpha", ALL), [member(name, FOLLOWER) for name in (NAME, "zulu")]
    status, todo = planned(seen_with(leader, *followers))
    assert (status.phase, reason_of(status), todo.actions) == ("Failed", "DoesNotFit", ())
    assert message_of(status).startswith(
        "trained together, the 3 jobs of group 'rates' need about 44.0 GiB of GPU memory (at least 35.2), but a GPU of "
        "24 GiB (spec.resources.gpuMemory) has 23.5 to use: create the jobs again with a smaller spec.group.size"
    )
    assert cannot_be_undone(leader, status, ()), "so that it is decided by what is stored then"
    others = [each for each in map(member_of, followers) if each is not None]
    assert waiting_for(leader, status, others) == [NAME, "zulu"]


def test_the_others_end_with_their_leader_and_none_goes_on_alone() -> None:
    leader = refused()
    status, todo = planned(seen_with(member(NAME, FOLLOWER), leader, member("zulu", FOLLOWER)))
    assert (status.phase, reason_of(status), todo.actions) == ("Failed", "DoesNotFit", ())
    assert message_of(status) == message_of(leader.status)


@pytest.mark.parametrize("name", ["alpha", NAME])
def test_whoever_is_retried_is_trained_alone(name: str) -> None:
    leader = refused()
    follower = member(NAME, FOLLOWER)
    follower = replace(follower, status=next_status(seen_with(follower, leader)))
    own, other = (leader, follower) if name == "alpha" else (follower, leader)
    spec = own.spec.model_copy(update={"retry": own.spec.retry.model_copy(update={"request": 1})})
    status, todo = planned(seen_with(replace(own, spec=spec), other))
    assert status.group == led_by(name, name)
    stored = replace(own, spec=spec, status=status)
    _, todo = planned(seen_with(stored, other))
    assert todo.actions == (CreateJob("train", 2),)


def test_a_leader_that_is_retried_before_the_others_have_seen_its_end_leaves_them_alone() -> None:
    leader = member("alpha", led_by("alpha", "alpha"))
    _, todo = planned(seen_with(member(NAME, FOLLOWER), leader))
    assert todo.actions == (CreateJob("train", 1),)


def test_after_any_other_end_of_their_leader_the_others_go_on_alone() -> None:
    leader = refused()
    assert leader.status.last_failure is not None
    late = leader.status.last_failure.model_copy(update={"reason": "DeadlineExceeded"})
    leader = replace(leader, status=leader.status.model_copy(update={"last_failure": late}))
    _, todo = planned(seen_with(member(NAME, FOLLOWER), leader))
    assert todo.actions == (CreateJob("train", 1),)


def test_whom_the_leader_has_left_out_goes_on_alone() -> None:
    leader = refused()
    without_zulu = leader.status.model_copy(update={"group": led_by("alpha", "alpha", NAME)})
    _, todo = planned(seen_with(member("zulu", FOLLOWER), replace(leader, status=without_zulu)))
    assert todo.actions == (CreateJob("train", 1),)


def test_a_job_that_is_suspended_meanwhile_is_not_ended() -> None:
    status, _ = planned(seen_with(member(NAME, FOLLOWER, doing="suspended"), refused()))
    assert status.phase == "Suspended"


def test_nothing_is_judged_before_all_have_noted_who_trains_them() -> None:
    zulu = member("zulu", FOLLOWER)
    zulu = replace(zulu, status=zulu.status.model_copy(update={"group": None}))
    status, todo = planned(seen_with(member("alpha", ALL), member(NAME, FOLLOWER), zulu))
    assert (reason_of(status), todo.actions) == ("WaitingForGroup", ())


@pytest.mark.parametrize(
    "changed",
    [
        {"gpu": None},
        {"gpu": 80},
        {"gib": 11},
        {"shared": 17},
        {"gib": 60, "shared": None},
    ],
    ids=["no GPU named", "fits", "tight", "much is shared", "unknown"],
)
def test_jobs_that_may_fit_are_trained(changed: dict[str, Any]) -> None:
    """Of a job that an earlier trainer has prepared, nothing says what is shared."""
    followers = [member(name, FOLLOWER, **changed) for name in (NAME, "zulu")]
    _, todo = planned(seen_with(member("alpha", ALL, **changed), *followers))
    assert todo.actions == (CreateJob("train", 1),)


def test_the_smallest_gpu_that_a_job_names_counts() -> None:
    around = [member(NAME, FOLLOWER, gpu=24), member("zulu", FOLLOWER, gpu=None)]
    status, _ = planned(seen_with(member("alpha", ALL, gpu=80), *around))
    assert "a GPU of 24 GiB" in message_of(status)


def test_those_that_the_pod_would_not_train_do_not_count() -> None:
    """All three take at least 35.2 GiB, and two of them 24.8."""
    leader, follower = member("alpha", ALL, gpu=32), member(NAME, FOLLOWER, gpu=32)
    all_three = planned(seen_with(leader, follower, member("zulu", FOLLOWER, gpu=32)))
    assert reason_of(all_three[0]) == "DoesNotFit"
    _, todo = planned(seen_with(leader, follower, member("zulu", FOLLOWER, gpu=32, doing="failed")))
    assert todo.actions == (CreateJob("train", 1),)


def test_a_group_that_has_been_trained_for_a_while_goes_on_whatever_is_estimated() -> None:
    leader = member("alpha", ALL)
    step = leader.status.step
    assert step is not None
    again = step.model_copy(update={"attempt": 2, "job_name": "alpha-train-2"})
    leader = replace(leader, status=leader.status.model_copy(update={"step": again}))
    _, todo = planned(seen_with(leader, member(NAME, FOLLOWER), member("zulu", FOLLOWER)))
    assert todo.actions == (CreateJob("train", 2),)


def test_the_leader_says_what_all_need() -> None:
    leader = member("alpha", ALL, doing="training", gib=8)
    around = [member(NAME, FOLLOWER, gib=7), member("zulu", FOLLOWER, gib=7)]
    train = (alphas(child("train")), alphas(running(pod("train"))))
    status = next_status(seen_with(leader, *around, bodies=train))
    assert f"its Job trains {NAME} and zulu too, on the same base: about 12.0 GiB of GPU memory for all" in (
        message_of(status)
    )


def test_prepare_is_told_how_many_are_trained_together() -> None:
    def told(body: QLoRAJob, step: Any) -> str | None:
        (container,) = build_job(body, resolved(), step, 1)["spec"]["template"]["spec"]["containers"]
        return {entry["name"]: entry.get("value") for entry in container["env"]}.get("QLORA_GROUP_SIZE")

    assert told(job(), "prepare") == "3"
    assert told(job(), "train") is None
    assert told(replace(job(), spec=job().spec.model_copy(update={"group": None})), "prepare") is None
