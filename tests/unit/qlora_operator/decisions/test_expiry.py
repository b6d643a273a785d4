"""The end of finished jobs: their deletion, and that of their claims."""

from typing import Any

import pytest

from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus
from qlora_api.usage import PodUsage, UsageStatus
from qlora_operator.decisions.announcing import without_announcement
from qlora_operator.decisions.expiry import deletion_at, is_held_up
from qlora_operator.decisions.manifests.objects import build_claim, owners_of_claim
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import (
    Action,
    ApplyClaimPolicy,
    CreateJob,
    DeleteClaim,
    DeleteJob,
    DeleteQLoRAJob,
    plan,
)
from qlora_operator.decisions.status import Decision, next_status
from tests.support.builders import (
    NAME,
    NOW,
    PROFILE,
    UID,
    after,
    child,
    conditions_of,
    facts,
    failed,
    follow,
    make_job,
    pod,
    present,
    reason_of,
    resolved,
    running,
    seen,
    status_in,
    succeeded,
    time,
)

FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))
FAILED = follow(make_job(status_in("prepare")), child("prepare", Failed="x"), failed("prepare", 11, "BadDataset", ""))
ANNOUNCED = {"announce": {"configMap": "adapters"}}
ELSEWHERE = {"destination": "hf://org/adapter"}


def profiles(**fields: Any) -> dict[str, Profile]:
    return {"default": Profile.model_validate(PROFILE.dump() | fields)}


def seconds_to_deletion(job: QLoRAJob, **profile: Any) -> float | None:
    due = deletion_at(job, job.status, profiles(**profile))
    return None if due is None else (due - NOW).total_seconds()


LIMIT = {"limits": {"ttlSecondsAfterFinished": 30}}


@pytest.mark.parametrize(
    ("spec", "profile", "seconds"),
    [
        ({}, {}, None),
        ({"ttlSecondsAfterFinished": 0}, {}, 0),
        ({}, {"ttlSecondsAfterFinished": 60}, 60),
        ({"ttlSecondsAfterFinished": 90}, {"ttlSecondsAfterFinished": 60}, 90),
        ({"ttlSecondsAfterFinished": 90}, LIMIT, 30),
        ({"ttlSecondsAfterFinished": 20}, LIMIT, 20),
        ({}, LIMIT | {"ttlSecondsAfterFinished": 60}, 30),
        ({}, LIMIT, 30),
        ({"output": ANNOUNCED}, {"ttlSecondsAfterFinished": 60}, None),
        ({"output": ANNOUNCED}, LIMIT | {"ttlSecondsAfterFinished": 60}, 30),
    ],
)
def test_a_job_is_deleted_by_its_own_time_its_profiles_and_its_limit(
    spec: dict[str, Any], profile: dict[str, Any], seconds: float | None
) -> None:
    for status in (FINISHED, FAILED):
        assert seconds_to_deletion(make_job(status, **spec), **profile) == seconds
    assert seconds_to_deletion(make_job(status_in("train"), **spec), **profile) is None


def test_a_retried_job_is_not_deleted() -> None:
    assert seconds_to_deletion(make_job(FAILED, ttlSecondsAfterFinished=0, retry={"request": "a"})) is None
    assert seconds_to_deletion(make_job(FINISHED, ttlSecondsAfterFinished=0, retry={"request": "a"})) == 0


def planned(status: QLoRAJobStatus, *bodies: Any, at: float = 100, **spec: Any) -> tuple[Action, ...] | None:
    """The actions at that time, once the status that they follow from is stored."""
    for _ in range(3):
        found = facts(make_job(status, **spec), *bodies, now=after(at))
        decision = next_status(found)
        due = deletion_at(found.job, decision.status, found.profiles)
        result = plan(found.job, decision, found.observed, found.now, expires=due)
        if decision.status == status:
            return result.actions
        status = decision.status
    return None


REJECTED = without_announcement(FINISHED, "forbidden")
SOON = {"ttlSecondsAfterFinished": 50}
DELETED = (DeleteQLoRAJob(),)


@pytest.mark.parametrize(
    ("status", "bodies", "spec", "deleted"),
    [
        (FINISHED, [], {}, True),
        (FINISHED, [], {"ttlSecondsAfterFinished": 200}, False),
        (FAILED, [], {}, True),
        (FINISHED, [child("publish", Complete="")], {}, True),
        (FINISHED, [], {"output": ANNOUNCED}, False),
        (REJECTED, [], {"output": ANNOUNCED}, True),
        (FINISHED, [], {"cleanupAfterSeconds": 40}, False),
        (FINISHED, [], {"cleanupAfterSeconds": 60}, True),
        (FINISHED, [child("clean")], {"cleanupAfterSeconds": 40}, False),
        (FINISHED, [child("clean", Complete="")], {"cleanupAfterSeconds": 40}, True),
        (FINISHED, [child("clean", Failed="x")], {"cleanupAfterSeconds": 40}, True),
    ],
    ids=str,
)
def test_what_is_left_to_do_comes_before_the_deletion(
    status: QLoRAJobStatus, bodies: Any, spec: dict[str, Any], deleted: bool
) -> None:
    assert (planned(status, *bodies, **(SOON | spec)) == DELETED) == deleted


def test_a_job_whose_pod_still_has_its_gpu_is_not_deleted() -> None:
    for end in (None, "completed"):
        entry = PodUsage(name=f"{NAME}-train-1-pod1", uid="gone", created=time(-60), since=time(-60), end=end)
        job = make_job(FINISHED.model_copy(update={"usage": UsageStatus(pods=(entry,))}))
        assert is_held_up(job, NOW) == (end is None)


DELETE = {"persistentVolumeClaimRetentionPolicy": {"whenFinished": "Delete"}}
BY_DEFAULT = follow(
    make_job(status_in("publish", resolved=resolved(Profile.model_validate(PROFILE.dump() | {"workspace": DELETE})))),
    child("publish", Complete=""),
    succeeded("publish"),
)


@pytest.mark.parametrize(
    ("status", "bodies", "spec", "deleted"),
    [
        (FINISHED, [], {"workspace": DELETE, "output": ELSEWHERE}, True),
        (
            FINISHED,
            [child("publish", Complete=""), succeeded("publish")],
            {"workspace": DELETE, "output": ELSEWHERE},
            True,
        ),
        (FINISHED, [running(pod("train"))], {"workspace": DELETE, "output": ELSEWHERE}, False),
        (FAILED, [], {"workspace": DELETE, "output": ELSEWHERE}, False),
        (FINISHED, [], {"output": ELSEWHERE}, False),
        (BY_DEFAULT, [], {"output": ELSEWHERE}, True),
        (BY_DEFAULT, [], {}, False),
        (BY_DEFAULT, [], {"workspace": {"claimName": "ours"}}, False),
        (FINISHED.model_copy(update={"claim_deletion_time": time()}), [], {"output": ELSEWHERE}, False),
    ],
    ids=str,
)
def test_the_claim_of_a_job_that_has_succeeded_is_deleted_if_asked_for(
    status: QLoRAJobStatus, bodies: Any, spec: dict[str, Any], deleted: bool
) -> None:
    assert (DeleteClaim() in present(planned(status, *bodies, **spec))) == deleted
    assert planned(status, *bodies, **(SOON | spec)) != DELETED or not deleted, "the claim goes first"


def test_a_clean_up_of_a_deleted_claim_needs_no_pod() -> None:
    spec: dict[str, Any] = {"workspace": DELETE, "output": ELSEWHERE, "cleanupAfterSeconds": 10}
    done = child("publish", Complete="")
    gone = FINISHED.model_copy(update={"claim_deletion_time": time()})
    assert planned(gone, done, **spec) == (DeleteJob(f"{NAME}-publish-1", f"uid-{NAME}-publish-1"),)
    assert CreateJob("clean", 1) not in present(planned(FINISHED, done, **spec))
    status = follow(make_job(gone, **spec), done, now=after(20))
    assert reason_of(status, "CleanedUp") == "Scheduled"
    assert conditions_of(follow(make_job(status, **spec), now=after(20)))["CleanedUp"] == "True"


def test_a_changed_policy_is_applied_to_the_claim_of_any_job() -> None:
    for status, bodies in ((status_in("train"), [child("train"), running(pod("train"))]), (FINISHED, [])):
        stored = status.model_copy(update={"observed_generation": 1})
        for generation, actions in ((1, ()), (2, (ApplyClaimPolicy(),))):
            job = make_job(stored, generation=generation, output=ELSEWHERE)
            found = facts(job, *bodies)
            decision = next_status(found)
            assert plan(job, decision, found.observed, NOW).actions == actions


def test_the_change_comes_before_the_status_that_ends_the_job() -> None:
    stored = status_in("publish", observedGeneration=1)
    job = make_job(stored, generation=2, output=ELSEWHERE)
    found = seen(child("publish", Complete=""), succeeded("publish"))
    decision = Decision.from_status(job, follow(job, child("publish", Complete=""), succeeded("publish")), found)
    assert decision.ends
    assert plan(job, decision, found, NOW).actions == (ApplyClaimPolicy(),)


def test_the_change_comes_before_the_deletion_of_the_job() -> None:
    stored = FINISHED.model_copy(update={"observed_generation": 1})
    job = make_job(stored, generation=2, output=ELSEWHERE, ttlSecondsAfterFinished=0)
    found = facts(job)
    decision = next_status(found)
    due = deletion_at(job, decision.status, {"default": PROFILE})
    assert plan(job, decision, found.observed, NOW, expires=due).actions == (ApplyClaimPolicy(),)
    seen_since = make_job(decision.status, generation=2, output=ELSEWHERE, ttlSecondsAfterFinished=0)
    again = next_status(facts(seen_since))
    assert plan(seen_since, again, found.observed, NOW, expires=due).actions == (DeleteQLoRAJob(),)


def test_the_job_owns_its_claim_while_its_policy_deletes_both() -> None:
    other = {"kind": "Other", "uid": "other"}
    policy = {"persistentVolumeClaimRetentionPolicy": {"whenDeleted": "Delete"}}
    deleted, kept = make_job(workspace=policy, output=ELSEWHERE), make_job(output=ELSEWHERE)
    (owner,) = build_claim(deleted, resolved())["metadata"]["ownerReferences"]
    assert owner["uid"] == UID
    assert owners_of_claim(deleted, PROFILE, [other]) == [other, owner]
    assert owners_of_claim(deleted, PROFILE, [other, owner]) == [other, owner]
    assert owners_of_claim(kept, PROFILE, [other, owner]) == [other]
