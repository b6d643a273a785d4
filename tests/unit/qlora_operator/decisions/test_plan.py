"""The operator's action, given a job and the existing objects."""

from typing import Any

import pytest

from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.plan import Action, CreateClaim, CreateJob, DeleteJob, Plan, cannot_be_undone, is_settled
from qlora_operator.decisions.status import Decision, next_status
from tests.support.builders import (
    NAME,
    NOW,
    after,
    child,
    deleted,
    ended,
    facts,
    failed,
    follow,
    make_job,
    message_of,
    plan_of,
    pod,
    reason_of,
    running,
    seen,
    status_in,
    step_status,
    succeeded,
    time,
)


def decide(job: Any, *bodies: dict[str, Any], at: float = 0) -> Plan:
    found = facts(job, *bodies, now=after(at))
    return plan_of(job, next_status(found).status, found.observed, found.now)


def delete(step: str, attempt: int = 1) -> DeleteJob:
    name = f"{NAME}-{step}-{attempt}"
    return DeleteJob(name, f"uid-{name}")


def test_a_new_job_gets_its_claim_and_its_first_job_in_one_pass() -> None:
    assert decide(make_job()).actions == (CreateClaim(), CreateJob("prepare", 1))
    assert decide(make_job(follow(make_job()))).actions == (CreateClaim(), CreateJob("prepare", 1))


@pytest.mark.parametrize(
    ("job", "bodies", "careful"),
    [
        (make_job(), [], False),
        (make_job(), [child("prepare")], False),
        (make_job(), [child("prepare"), failed("prepare", 203, "InternalError", "")], True),
        (make_job(status_in("prepare")), [child("prepare"), running(pod("prepare"))], False),
        (make_job(status_in("prepare")), [], True),
        (make_job(status_in("train")), [running(pod("train"))], False),
        (make_job(status_in("train")), [deleted(running(pod("train")), -5)], True),
        (make_job(status_in("train")), [child("train"), ended(pod("train"), 203)], True),
        (make_job(status_in("train"), suspend=True), [child("train")], True),
        (make_job(status_in("train"), suspend=True), [child("train", Failed="x")], True),
        (make_job(status_in("prepare")), [child("prepare", Complete=""), succeeded("prepare")], True),
        (make_job(status_in("publish")), [child("publish", Complete=""), succeeded("publish")], True),
    ],
)
def test_irreversible_actions_are_distinguished_from_reversible_ones(job: Any, bodies: Any, careful: bool) -> None:
    found = facts(job, *bodies)
    status = next_status(found).status
    actions = plan_of(job, status, found.observed, found.now).actions
    assert cannot_be_undone(Decision.from_status(job, status, found.observed), actions) == careful


ANNOUNCED = {"output": {"announce": {"configMap": "adapters"}}}


@pytest.mark.parametrize(
    ("status", "bodies", "spec", "settled"),
    [
        ("failed", [], {}, True),
        ("failed", [child("prepare", Failed="x")], {}, True),
        ("failed", [child("prepare")], {}, False),
        ("succeeded", [child("publish", Complete="")], {}, True),
        ("succeeded", [], {"cleanupAfterSeconds": 100}, False),
        ("cleaned", [], {"cleanupAfterSeconds": 100}, True),
        ("cleaned", [child("clean", Complete="")], {"cleanupAfterSeconds": 100}, False),
        ("running", [], {}, False),
        ("succeeded", [], ANNOUNCED, False),
        ("failed", [], ANNOUNCED, True),
    ],
)
def test_a_job_is_settled_once_nothing_is_left_to_do_for_it(
    status: str, bodies: Any, spec: dict[str, Any], settled: bool
) -> None:
    cleaned = follow(make_job(FINISHED, cleanupAfterSeconds=100), child("clean", Complete=""), now=after(130))
    bad = follow(make_job(status_in("prepare")), child("prepare", Failed="x"), failed("prepare", 11, "BadDataset", ""))
    statuses = {"failed": bad, "succeeded": FINISHED, "cleaned": cleaned, "running": status_in("train")}
    assert is_settled(make_job(statuses[status], **spec), seen(*bodies)) == settled
    assert not is_settled(make_job(statuses[status], generation=2, **spec), seen(*bodies))


def test_a_claim_of_the_user_is_not_created() -> None:
    job = make_job(workspace={"claimName": "shared"})
    stored = make_job(follow(job), workspace={"claimName": "shared"})
    assert decide(stored).actions == (CreateJob("prepare", 1),)


def test_an_unknown_profile_creates_nothing() -> None:
    job = make_job(scheduling={"profileName": "h100"})
    assert decide(make_job(follow(job), scheduling={"profileName": "h100"})) == Plan()


@pytest.mark.parametrize(
    ("step", "bodies", "actions"),
    [
        ("prepare", [child("prepare")], []),
        ("prepare", [child("prepare"), running(pod("prepare"))], []),
        ("prepare", [child("prepare"), ended(pod("prepare"), 0)], []),
        ("prepare", [child("prepare", Complete=""), succeeded("prepare")], [CreateJob("train", 1)]),
        ("prepare", [child("prepare", Complete=""), succeeded("prepare"), child("train")], []),
        ("train", [child("train", Complete=""), succeeded("train")], [CreateJob("publish", 1)]),
        ("train", [child("train", Complete=""), ended(pod("train"), 0)], [CreateJob("train", 2)]),
        ("train", [], [CreateJob("train", 2)]),
        ("train", [running(pod("train"))], []),
        ("train", [deleted(running(pod("train")), -5)], []),
        ("train", [ended(pod("train"), 143)], [CreateJob("train", 2)]),
        ("train", [child("train", owner="somebody-else")], [CreateJob("train", 2)]),
        ("train", [child("train"), ended(pod("train"), 203)], []),
        ("prepare", [child("prepare", Failed="x"), failed("prepare", 11, "BadDataset", "")], []),
        ("publish", [child("publish", Complete=""), succeeded("publish")], []),
        ("prepare", [child("train"), running(pod("train"))], [delete("train")]),
    ],
)
def test_one_step_at_a_time_and_the_next_only_after_a_verified_result(
    step: Any, bodies: Any, actions: list[Action]
) -> None:
    assert decide(make_job(status_in(step)), *bodies).actions == tuple(actions)


def test_prepare_that_is_repeated_finds_or_creates_its_claim() -> None:
    assert decide(make_job(status_in("prepare"))).actions == (CreateClaim(), CreateJob("prepare", 2))


def test_a_suspension_deletes_the_running_step_and_creates_nothing() -> None:
    job = make_job(status_in("train"), suspend=True)
    assert decide(job, child("train"), running(pod("train"))).actions == (delete("train"),)
    assert decide(job, deleted(running(pod("train")), -5)).actions == ()
    assert decide(job).actions == ()
    # A step that ended before the suspension is kept, and none is created before the start.
    assert decide(job, child("train", Complete=""), succeeded("train")).actions == ()
    new = make_job(suspend=True)
    assert decide(make_job(follow(new), suspend=True)) == Plan()


def test_resuming_creates_the_next_number() -> None:
    suspended = follow(make_job(status_in("train"), suspend=True))
    assert decide(make_job(suspended)).actions == (CreateJob("train", 2),)


@pytest.mark.parametrize(
    "bodies",
    [
        [child("train"), ended(pod("train"), 137, reason="OOMKilled")],
        [child("train"), running(pod("train"), since=-100)],
    ],
    ids=["killed", "after its deadline"],
)
def test_a_step_that_ends_its_job_is_recorded_first_and_deleted_then(bodies: list[dict[str, Any]]) -> None:
    job = make_job(status_in("train"), activeDeadlineSeconds=100)
    assert decide(job, *bodies) == Plan(store_first=True)
    assert decide(make_job(follow(job, *bodies), activeDeadlineSeconds=100), *bodies).actions == (delete("train"),)


def test_a_deletion_is_requested_once() -> None:
    def going(step: Any, **true: str) -> dict[str, Any]:
        body = child(step, **true)  # type: ignore[arg-type]
        body["metadata"]["deletionTimestamp"] = "2026-01-02T11:59:00Z"
        return body

    assert decide(make_job(status_in("train"), suspend=True), going("train")).actions == ()
    cleaned = [going("publish", Complete=""), child("clean", Complete="")]
    assert decide(make_job(FINISHED, cleanupAfterSeconds=0), *cleaned, at=10).actions == ()


ENDED = [child("prepare", Complete=""), child("train", Complete=""), child("publish", Complete="")]
FINISHED = follow(make_job(status_in("publish")), ENDED[2], succeeded("publish"))


@pytest.mark.parametrize("bodies", [[], ENDED, ENDED[:1], [succeeded("publish")]])
def test_a_finished_job_is_never_started_again(bodies: Any) -> None:
    assert decide(make_job(FINISHED), *bodies, at=10_000) == Plan()


@pytest.mark.parametrize(
    ("at", "bodies", "actions", "look_again"),
    [
        (99, ENDED, [], 100),
        (100, ENDED, [CreateJob("clean", 1)], None),
        (110, [*ENDED, child("clean")], [], None),
        (110, [*ENDED, child("clean", Failed="x")], [], None),
        (
            120,
            [*ENDED, child("clean", Complete="")],
            [delete("prepare"), delete("publish"), delete("train")],
            None,
        ),
        (130, [child("clean", Complete="")], [], None),
    ],
)
def test_clean_up_runs_its_own_job_before_the_others_go(
    at: float, bodies: Any, actions: list[Action], look_again: float | None
) -> None:
    found = decide(make_job(FINISHED, cleanupAfterSeconds=100), *bodies, at=at)
    assert set(found.actions) == set(actions)
    assert found.look_again == (None if look_again is None else after(look_again))


def test_clean_up_waits_for_the_last_pod_that_may_still_write() -> None:
    job = make_job(FINISHED, cleanupAfterSeconds=100)
    stopping = deleted(running(pod("publish")), -5)
    assert decide(job, *ENDED, stopping, at=110).actions == ()
    assert decide(job, *ENDED, at=110).actions == (CreateJob("clean", 1),)


def test_the_clean_up_job_goes_last_after_clean_up_is_recorded() -> None:
    def job(status: Any) -> Any:
        return make_job(status, cleanupAfterSeconds=100)

    recorded = follow(job(FINISHED), child("clean", Complete=""), now=after(130))
    assert decide(job(recorded), child("clean", Complete=""), at=140).actions == (delete("clean"),)
    assert decide(job(recorded), at=150) == Plan()


@pytest.mark.parametrize(
    ("bodies", "due"),
    [
        # At its deadline.
        ([child("train"), running(pod("train"), since=-60)], 10),
        ([child("train"), pod("train")], None),
        # After a minute without a pod.
        ([child("train", created=-10)], 50),
        ([child("train", created=-61)], None),
        # When a pod should have ended.
        ([child("train"), deleted(running(pod("train"), since=-20), -20)], 50),
        ([child("train"), deleted(pod("train"), -20)], 160),
    ],
)
def test_a_job_is_requeued_when_time_alone_decides(bodies: list[dict[str, Any]], due: float | None) -> None:
    job = make_job(status_in("train", activeSeconds=30), activeDeadlineSeconds=100)
    assert decide(job, *bodies).look_again == (None if due is None else after(due))


def test_a_job_whose_creation_was_interrupted_keeps_its_number() -> None:
    job = make_job(status_in("train", step=step_status("train", 2, jobUid="").dump()))
    assert decide(job).actions == (CreateJob("train", 2),)
    assert decide(job, child("train", 2)).actions == ()


def deleted_at(status: QLoRAJobStatus, at: float, *bodies: dict[str, Any]) -> tuple[float, QLoRAJobStatus]:
    """Return seconds until a deleted Job's step gets another one, and the status then."""
    found = decide(make_job(status), *bodies, at=at)
    status = follow(make_job(status), *bodies, now=after(at))
    if not found.actions:
        assert reason_of(status) == "JobDeleted"
        assert found.look_again is not None
        due = (found.look_again - NOW).total_seconds()
        assert decide(make_job(status), *bodies, at=due - 1) == Plan((), found.look_again)
        return due - at, follow(make_job(status), *bodies, now=after(due))
    return 0, status


def test_a_deleted_job_is_replaced_immediately_and_then_with_backoff() -> None:
    status, at, pauses = status_in("train"), 0.0, []
    for attempt in range(2, 12):
        pause, status = deleted_at(status, at)
        at += pause
        pauses.append(pause)
        assert decide(make_job(status), at=at).actions == (CreateJob("train", attempt),)
        status = follow(make_job(status), child("train", attempt, created=at), now=after(at))
        assert reason_of(status) == "Queued"
        at += 1
    assert pauses == [0, 5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_no_pause_follows_a_suspension_a_long_run_or_jobs_that_ended_by_themselves() -> None:
    fourth = status_in("train", 4)
    assert deleted_at(fourth, 0)[0] == 20
    suspended = follow(make_job(fourth, suspend=True))
    assert decide(make_job(suspended)).actions == (CreateJob("train", 5),)
    stopping = follow(make_job(fourth, suspend=True), deleted(running(pod("train", 4)), -5))
    assert decide(make_job(stopping)).actions == (CreateJob("train", 5),)
    ran = {"runningPod": "a", "runningSince": time(-400)}
    assert deleted_at(status_in("train", 4, step=step_status("train", 4, **ran).dump()), 0)[0] == 0
    expired = [child("train", attempt, Failed="DeadlineExceeded") for attempt in (1, 2, 3)]
    assert deleted_at(fourth, 0, *expired)[0] == 0


def test_jobs_restarted_by_the_operator_are_not_counted_as_deleted_by_others() -> None:
    restarted = status_in("train", 4, step=step_status("train", 4, failures=3).dump())
    for on_no_progress, moments in (("restart", [0]), ("report", [20])):
        job = make_job(restarted, retry={"onNoProgress": on_no_progress})
        waits = make_job(follow(job), retry={"onNoProgress": on_no_progress})
        assert [moment for moment in (0, 20) if decide(waits, at=moment).actions][:1] == moments


def test_jobs_that_a_suspension_may_have_ended_are_not_reported_as_deleted() -> None:
    status = follow(make_job(status_in("train", 4)))
    assert message_of(status) == (
        f"Job {NAME}-train-4 was deleted, as were earlier Jobs of this step: the next is created after a pause of up "
        "to five minutes; the API server's audit log shows who deleted it"
    )


def test_pods_that_stop_after_their_job_was_deleted_do_not_end_the_pause() -> None:
    stopping = [deleted(running(pod("train", 4)), -5)]
    status = follow(make_job(status_in("train", 4)), *stopping)
    assert reason_of(status) == "JobDeleted"
    assert decide(make_job(status), at=19).actions == ()
    assert decide(make_job(status), at=20).actions == (CreateJob("train", 5),)
