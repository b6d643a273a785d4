"""Jobs that are trained together: when they start, who leads, what the others wait for, and what happens to each."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from qlora_api.contract import needed_contract
from qlora_api.profile import Profile
from qlora_api.status import BaseStatus, QLoRAJobStatus
from qlora_operator.decisions.groups.group import MAX_DOCUMENTS, lingering, look_again_after, trains_now, waiting_for
from qlora_operator.decisions.manifests.objects import build_job, document
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.members import GroupFacts, Member, member_of
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import CreateJob, Plan, is_settled, plan
from qlora_operator.decisions.profile_limit import held_back
from qlora_operator.decisions.status import next_status
from tests.support.builders import (
    NAME,
    NOW,
    PROFILE,
    PROFILES,
    after,
    child,
    ended,
    facts,
    message_of,
    pod,
    progress,
    reason_of,
    resolved,
    result,
    running,
    seen,
    step_status,
    succeeded,
    time,
)
from tests.support.grouped import ALL, CLAIM, DOCUMENT, FOLLOWER, Doing, alphas, job, led_by


def others(*jobs: QLoRAJob, **more: Any) -> GroupFacts:
    return GroupFacts(tuple(filter(None, map(member_of, jobs))), **more)


def seen_with(own: QLoRAJob, *jobs: QLoRAJob, bodies: Sequence[dict[str, Any]] = (), **fields: Any) -> Facts:
    return facts(own, *bodies, **{"group": others(*jobs)} | fields)


def planned(found: Facts) -> tuple[QLoRAJobStatus, Plan]:
    """The next status and what is done."""
    status = next_status(found)
    again = look_again_after(status, found)
    return status, plan(found.job, status, found.observed, found.now, group_again=again)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([], "1 of 3 jobs of group 'rates' are prepared: waiting for 2 that do not exist yet"),
        ([job("preparing", "zulu")], "waiting for zulu (preparing) and 1 that does not exist yet"),
        ([job(None, "alpha"), job("preparing", "zulu")], "waiting for zulu (preparing) and alpha (new)"),
        (
            [job("suspended", "alpha"), job(name="zulu")],
            "2 of 3 jobs of group 'rates' are prepared: waiting for alpha (suspended)",
        ),
        ([job("failed", "alpha")], "2 of 3 jobs of group 'rates' are prepared: waiting for 1 that does not exist yet"),
        ([job(name="alpha"), job(name="zulu")], "3 of 3 jobs of group 'rates' are prepared"),
    ],
)
def test_a_prepared_job_waits_until_the_others_are_and_says_for_whom(found: list[QLoRAJob], says: str) -> None:
    status, todo = planned(seen_with(job(), *found))
    assert (status.phase, status.group, reason_of(status)) == ("Queued", None, "WaitingForGroup")
    assert says in message_of(status)
    assert (todo.actions, todo.look_again) == ((), after(15))


def test_the_first_by_name_leads_and_says_so_before_it_trains() -> None:
    status, todo = planned(seen_with(job(name="alpha"), job(), job(name="zulu")))
    assert status.group == ALL
    assert (todo.actions, todo.store_first) == ((), True)
    status, todo = planned(seen_with(job(), job(name="alpha", joined=ALL), job(name="zulu")))
    assert status.group == led_by("alpha")
    assert (todo.actions, todo.store_first) == ((), False)


def test_the_leader_trains_once_all_have_noted_it() -> None:
    leader = job(name="alpha", joined=ALL)
    status, todo = planned(seen_with(leader, job(joined=led_by("alpha")), job(name="zulu")))
    assert todo.actions == ()
    assert "complete; training starts once zulu has recorded their leader" in message_of(status)
    status, todo = planned(seen_with(leader, job(joined=led_by("alpha")), job(name="zulu", joined=led_by("alpha"))))
    assert status.group == ALL
    assert todo.actions == (CreateJob("train", 1),)


def test_what_has_ended_holds_nobody_back_and_is_not_waited_for_again() -> None:
    status, _ = planned(seen_with(job(), job("failed", "alpha"), job(name="zulu")))
    assert status.group == led_by(NAME, NAME, "zulu", "alpha")
    leader = job(joined=status.group)
    failed = with_status(job("failed", "alpha"), observed_generation=1)
    alone = replace(failed, status=next_status(seen_with(failed, leader)))
    assert (is_settled(failed, seen()), is_settled(alone, seen())) == (False, True), "once that is stored"
    status, _ = planned(seen_with(job(name="zulu"), alone))
    assert "1 of 3 jobs" in message_of(status), "nor does it count in a later group of that name"


@pytest.mark.parametrize(
    ("own", "leader"),
    [
        (job("failed"), job(name="alpha", joined=ALL)),
        (job("failed"), job("trained", "alpha", ALL)),
        (job("preparing"), job(name="alpha", joined=ALL)),
        (job("preparing"), job("trained", "alpha", ALL)),
        (job("suspended"), job(name="alpha", joined=ALL)),
        (job(), job("training", "alpha", ALL)),
        (job(), job("trained", "alpha", ALL)),
        (job(), job("failed", "alpha", ALL)),
        (job(), job(name="alpha", joined=ALL, model={"source": "hf://org/other"})),
    ],
    ids=["failed", "long ago", "retried", "retried late", "suspended", "late", "too late", "spared", "other base"],
)
def test_who_cannot_be_trained_by_its_leader_notes_that_it_is_trained_alone(own: QLoRAJob, leader: QLoRAJob) -> None:
    status, _ = planned(seen_with(own, leader))
    assert status.group == led_by(NAME, NAME)
    for around in ([leader], []):
        status, todo = planned(seen_with(job(joined=status.group), *around))
        assert todo.actions == (CreateJob("train", 1),), "whether the leader is still there or not"


@pytest.mark.parametrize("doing", ["preparing", "suspended", "failed"])
def test_the_leader_names_who_does_not_know_it_yet_and_does_not_wait_for_it(doing: Doing) -> None:
    leader = job(name="alpha", joined=ALL)
    status, todo = planned(seen_with(leader, job(doing), job(name="zulu", joined=FOLLOWER)))
    assert (status.group, todo.actions) == (ALL, (CreateJob("train", 1),))
    assert not trains_now(leader, job(doing))


@pytest.mark.parametrize(
    "rest",
    [[job("suspended", "zulu", led_by("alpha"))], [job(name="zulu", joined=led_by("yankee"))], []],
    ids=["suspended", "another's", "gone"],
)
def test_the_leader_leaves_out_who_does_not_take_part_and_that_one_goes_on_alone(rest: list[QLoRAJob]) -> None:
    leader, noted = job(name="alpha", joined=ALL), led_by("alpha")
    status, todo = planned(seen_with(leader, job(joined=noted), *rest))
    assert status.group == led_by("alpha", "alpha", NAME)
    assert todo.store_first
    resumed = job(name="zulu", joined=noted)
    _, todo = planned(seen_with(resumed, job("training", "alpha", led_by("alpha", "alpha", NAME))))
    assert todo.actions == (CreateJob("train", 1),)


def test_more_jobs_than_the_group_has_form_the_next_one() -> None:
    two: dict[str, Any] = {"group": {"name": "rates", "size": 2}}
    own = job(name="zulu", **two)
    status, todo = planned(seen_with(own, job(name="alpha", **two), job(**two)))
    assert (status.group, todo.actions) == (None, ())
    assert message_of(status) == (
        f"alpha and {NAME} are trained first; then 1 of 2 jobs of group 'rates' are prepared: waiting for 1 that does "
        "not exist yet"
    )
    formed = job("training", "alpha", led_by("alpha", "alpha", NAME), **two)
    status, _ = planned(seen_with(own, formed, job(joined=led_by("alpha"), **two)))
    assert message_of(status).startswith("1 of 2 jobs")


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"group": {"name": "rates", "size": 2}}, "spec.group.size is 2, and that of alpha is 3"),
        ({"workspace": {"claimName": "other"}}, f"spec.workspace.claimName is other, and that of alpha is {CLAIM}"),
        ({"model": {"source": "hf://org/other"}}, "spec.model.source is hf://org/other, and that of alpha is"),
        (
            {"model": {"source": "hf://org/model", "revision": "a1"}},
            "spec.model.revision is a1, and that of alpha is not set",
        ),
        ({"quantization": {"type": "fp4"}}, "spec.quantization.type is fp4, and that of alpha is nf4"),
        ({"training": {"gradientCheckpointing": False}}, "spec.training.gradientCheckpointing is False"),
        ({"scheduling": {"priorityClassName": "low"}}, "spec.scheduling.priorityClassName is low"),
    ],
)
@pytest.mark.parametrize("doing", [None, "prepared"])
def test_what_does_not_fit_the_others_says_what_differs(doing: Doing, own: dict[str, Any], says: str) -> None:
    status, todo = planned(seen_with(job(doing, **own), job(name="alpha")))
    assert (reason_of(status), todo.actions, todo.look_again) == ("GroupMismatch", (), after(15))
    assert says in message_of(status)
    assert "delete this job and create it again like that one" in message_of(status)
    status, _ = planned(seen_with(job(name="alpha"), job(doing, **own)))
    assert "waiting for 2 that do not exist yet" in message_of(status), "nor is it waited for"


def test_the_queue_is_one_of_those_and_fixed_once_the_job_has_started() -> None:
    status, _ = planned(seen_with(job(None, scheduling={"queueName": "small"}), job(name="alpha")))
    assert "its queue is small, and that of alpha is not set" in message_of(status)


def test_jobs_that_fit_each_other_are_trained_although_an_odd_one_is_the_first_by_name() -> None:
    odd = job(name="alpha", workspace={"claimName": "other"})
    status, _ = planned(seen_with(job(), odd, job(name="yankee"), job("preparing", "zulu")))
    assert "2 of 3 jobs of group 'rates' are prepared: waiting for zulu (preparing)" in message_of(status)
    status, _ = planned(seen_with(job(), odd, job(name="yankee"), job(name="zulu")))
    assert status.group == led_by(NAME, NAME, "yankee", "zulu")
    status, _ = planned(seen_with(odd, job(), job(name="yankee")))
    assert f"cannot be trained together with {NAME}" in message_of(status)
    status, _ = planned(seen_with(odd))
    assert "waiting for 2 that do not exist yet" in message_of(status)


def test_enough_jobs_that_fit_each_other_are_trained_although_more_fit_others() -> None:
    two: dict[str, Any] = {"group": {"name": "rates", "size": 2}}
    more = [job("failed", "xray"), job(name="yankee"), job(name="zulu")]
    status, _ = planned(seen_with(job(None, **two), job(name="alpha", **two), *more))
    assert status.resolved is not None
    status, _ = planned(seen_with(job(name="alpha", **two), job(**two), *more))
    assert status.group == led_by("alpha", "alpha", NAME)


def with_status(body: QLoRAJob, **fields: Any) -> QLoRAJob:
    return replace(body, status=body.status.model_copy(update=fields))


def test_other_bytes_of_the_base_or_another_image_are_found_before_a_gpu_is_asked_for() -> None:
    base = with_status(job(), base=BaseStatus(origin="cache", sha256="a" * 64))
    same = with_status(job(name="alpha"), base=BaseStatus(origin="downloaded", sha256="a" * 64))
    other = with_status(job(name="alpha"), base=BaseStatus(origin="downloaded", sha256="b" * 64))
    assert reason_of(next_status(seen_with(base, same))) == "WaitingForGroup"
    assert "its 4-bit base has other bytes than that of alpha" in message_of(next_status(seen_with(base, other)))
    newer = resolved(PROFILE.model_copy(update={"image": "example.org/newer"}))
    assert "its image is example.org/newer" in message_of(
        next_status(seen_with(with_status(job(), resolved=newer), same))
    )


def with_image(body: QLoRAJob, image: str = "example.org/older") -> QLoRAJob:
    assert body.status.resolved is not None
    profile = PROFILE.model_copy(update={"image": image})
    return with_status(body, resolved=body.status.resolved.model_copy(update={"profile": profile}))


@pytest.mark.parametrize(
    ("own", "others", "image"),
    [
        (job(None), [with_image(job(name="alpha"))], "example.org/older"),
        (job(None), [with_image(job("preparing", "alpha"))], "example.org/older"),
        (job(None), [job(name="alpha"), with_image(job(name="yankee")), with_image(job(name="zulu"))], "older"),
        (job("failed", retry={"request": 1}), [with_image(job(name="alpha"))], "example.org/older"),
        (
            job("failed", joined=led_by(NAME, NAME), retry={"request": 1}),
            [with_image(job(name="alpha"))],
            PROFILE.image,
        ),
        (job(None), [with_image(job("failed", "alpha"))], PROFILE.image),
        (job(None), [with_image(job("training", "alpha", ALL))], PROFILE.image),
        (job(None), [job(None, "alpha")], PROFILE.image),
    ],
    ids=["new", "as soon", "that of most", "retried", "alone", "failed", "of another group", "the first"],
)
def test_a_job_starts_with_the_image_of_those_that_it_is_to_join(
    own: QLoRAJob, others: list[QLoRAJob], image: str
) -> None:
    status, _ = planned(seen_with(own, *others))
    assert status.resolved is not None
    assert status.resolved.profile.image.endswith(image)
    if own.status.resolved is None:
        again, _ = planned(seen_with(with_status(own, **dict(status)), *others))
        assert again.resolved == status.resolved


def test_jobs_whose_pods_are_rejected_for_their_image_all_get_that_of_the_mended_profile() -> None:
    step = step_status("prepare").model_copy(update={"job_uid": ""})
    rejected = [with_status(with_image(job("preparing", name)), step=step) for name in (NAME, "alpha", "zulu")]
    status, _ = planned(seen_with(*rejected))
    assert status.resolved is not None
    assert status.resolved.profile.image == PROFILE.image


def test_one_that_has_failed_with_another_image_holds_nobody_back() -> None:
    status, _ = planned(seen_with(job(), with_image(job("failed", "alpha")), job(name="zulu")))
    assert status.group == led_by(NAME, NAME, "zulu", "alpha")
    status, _ = planned(seen_with(job(), *(with_image(job("failed", name)) for name in ("alpha", "zulu"))))
    assert status.group == led_by(NAME, NAME, "alpha", "zulu")


def test_specs_that_one_pod_cannot_hold_are_named() -> None:
    large = resolved().model_copy(update={"document": "x" * (MAX_DOCUMENTS // 3 + 1)})
    found = [with_status(job(name=name), resolved=large) for name in ("alpha", NAME, "zulu")]
    status, _ = planned(seen_with(*found))
    assert (status.group, reason_of(status)) == (None, "SpecTooLarge")


def test_a_profile_with_fewer_places_than_the_group_has_jobs_is_refused_at_once() -> None:
    limited = {"default": Profile.model_validate(PROFILE.dump() | {"limits": {"jobs": 2}})}
    status, _ = planned(seen_with(job(None), profiles=limited))
    assert (status.resolved, reason_of(status)) == (None, "LimitExceeded")
    assert "allows 2 jobs at a time" in message_of(status)
    mismatch = seen_with(job(None, workspace={"claimName": "other"}), job(name="alpha"), profiles=PROFILES)
    assert held_back(mismatch) is None


@pytest.mark.parametrize(
    ("around", "started", "starts"),
    [
        ([], 1, True),
        ([], 2, False),
        ([job(None, "alpha"), job(None, "zulu")], 2, False),
        ([job(name="alpha")], 2, True),
        ([job(name="alpha")], 3, False),
        ([job(name="alpha"), job("preparing", "zulu")], 3, True),
        ([job(name="alpha"), job("failed", "zulu")], 3, True),
        ([job("training", "alpha", led_by("alpha", "alpha"))], 2, False),
    ],
)
def test_a_job_starts_only_if_its_whole_group_can(around: list[QLoRAJob], started: int, starts: bool) -> None:
    limited = {"default": Profile.model_validate(PROFILE.dump() | {"limits": {"jobs": 4}})}
    found = seen_with(job(None), *around, profiles=limited, jobs_of_profile=started)
    status, _ = planned(found)
    assert (status.resolved is not None) == starts
    if not starts:
        assert reason_of(status) == "JobLimitReached"
        assert "jobs of its group that have not started can start together" in message_of(status)
        assert held_back(found) is not None


def test_it_needs_a_trainer_that_knows_groups() -> None:
    status, _ = planned(seen_with(job(None)))
    assert status.resolved is not None
    assert status.resolved.contract_version == needed_contract(1, grouped=True) == 4
    assert "group" not in (status.resolved.document or "")


@pytest.mark.parametrize(
    ("leader", "phase", "reason", "says"),
    [
        (job("training", "alpha", ALL), "Training", "Training", "is being trained by QLoRAJob alpha, in pod the-pod"),
        (
            job("prepared", "alpha", ALL),
            "Queued",
            "WaitingForLeader",
            "and is not running: no node can run it",
        ),
        (
            job("suspended", "alpha", ALL),
            "Queued",
            "WaitingForLeader",
            "waiting for QLoRAJob alpha, whose pod",
        ),
    ],
    ids=["training", "queued", "suspended"],
)
def test_who_is_trained_by_another_one_shows_that_and_gets_no_job(
    leader: QLoRAJob, phase: str, reason: str, says: str
) -> None:
    status, todo = planned(seen_with(job(joined=FOLLOWER), leader))
    assert (status.phase, reason_of(status)) == (phase, reason)
    assert says in message_of(status)
    assert (todo.actions, todo.look_again) == ((), after(15))


def test_a_suspended_job_that_a_pod_trains_on_says_how_to_stop_that() -> None:
    own, leader = job("suspended", joined=FOLLOWER), job("training", "alpha", ALL)
    status, todo = planned(seen_with(own, leader))
    assert (status.phase, todo.actions, todo.look_again) == ("Suspended", (), after(15))
    assert "the pod of QLoRAJob alpha is still training this job; suspend alpha to stop it" in message_of(status)
    status, _ = planned(seen_with(own, job("trained", "alpha", ALL)))
    assert message_of(status) == "spec.suspend is true; false resumes the job"


@pytest.mark.parametrize(
    "around",
    [
        [job("trained", "alpha", ALL)],
        [job("failed", "alpha", ALL)],
        [job("training", "alpha", led_by("alpha", "alpha"))],
        [],
    ],
    ids=["trained", "failed", "retried", "deleted"],
)
def test_once_the_leader_trains_it_no_more_it_runs_its_own_step(around: list[QLoRAJob]) -> None:
    own = job(joined=FOLLOWER)
    status, todo = planned(seen_with(own, *around))
    assert todo.actions == (CreateJob("train", 1),)
    assert message_of(status).endswith("; alpha no longer trains this job")
    waits = seen_with(own, *around, group=others(*around, lingering="pod alpha-train-1-x"))
    status, todo = planned(waits)
    assert (todo.actions, reason_of(status)) == ((), "WaitingForPod")
    assert message_of(status) == "pod alpha-train-1-x of alpha must end before this job goes on"


@pytest.mark.parametrize(
    ("leader", "bodies", "found"),
    [
        (None, [], ""),
        (None, [running(pod("train"))], "pod alpha-train-1-pod1"),
        (None, [ended(pod("train"), 143)], ""),
        (job("training", "alpha", ALL), [child("train")], "Job alpha-train-1"),
        (job("failed", "alpha", ALL), [child("train", Failed="x")], ""),
        (job("trained", "alpha", ALL), [child("train", Complete="x"), running(pod("publish")), child("publish")], ""),
        (job("training", "alpha", led_by("alpha", "alpha")), [child("train"), running(pod("train"))], ""),
        (job("prepared", "alpha", led_by("alpha", "alpha")), [running(pod("train"))], "pod alpha-train-1-pod1"),
    ],
)
def test_what_may_still_write_to_its_folder_is_found(
    leader: QLoRAJob | None, bodies: list[dict[str, Any]], found: str
) -> None:
    assert lingering(job(joined=FOLLOWER), leader, seen(*map(alphas, bodies))) == found


def test_the_leader_says_whom_its_job_trains_and_that_the_estimate_is_of_one() -> None:
    leader = job("training", "alpha", ALL)
    bodies = [alphas(child("train")), alphas(running(pod("train")))]
    status = next_status(seen_with(leader, bodies=bodies))
    assert status.phase == "Training"
    assert f"its Job trains {NAME} and zulu too" in message_of(status)
    assert "more GPU memory than status.memory says for this job alone" in message_of(status)


def test_progress_of_the_others_shows_that_the_pod_is_alive() -> None:
    leader = job("training", "alpha", ALL)
    own = progress(training_step=10, total_steps=10, time=time(-50))
    beside = progress(training_step=12, total_steps=20, time=time(-1))
    bodies = [alphas(child("train")), alphas(running(pod("train")))]
    status = next_status(seen_with(leader, bodies=bodies, progress=own, progress_beside=beside))
    assert status.step is not None
    assert status.progress is not None
    assert (status.step.reported_at, status.progress.step, status.progress.updated_at) == (time(-1), 10, time(-50))
    status = next_status(seen_with(job(joined=FOLLOWER), leader, progress=beside))
    assert status.progress is not None
    assert status.progress.summary == "60% 12/20"


def test_a_retried_leader_trains_alone() -> None:
    leader = with_status(
        job("training", "alpha", ALL, retry={"request": 1}),
        conditions=job("failed", "alpha").status.conditions,
    )
    status, todo = planned(seen_with(leader, job(joined=FOLLOWER)))
    assert status.group == led_by("alpha", "alpha")
    assert todo.store_first
    _, todo = planned(seen_with(with_status(leader, **dict(status)), job(joined=FOLLOWER)))
    assert todo.actions == (CreateJob("train", 2),)


def test_an_own_step_of_a_job_that_was_trained_ends_as_any_other() -> None:
    own = job("training", joined=FOLLOWER)
    body = pod("train")
    status = next_status(seen_with(own, bodies=[child("train", Complete="x"), succeeded("train")]))
    assert status.step is not None
    assert status.step.name == "publish"
    assert result(body, "train")


def test_the_pod_of_the_leader_reads_the_documents_of_all_and_names_their_folders() -> None:
    leader, other = job("prepared", "alpha", ALL), job(joined=FOLLOWER)
    fixed = leader.status.resolved
    assert fixed is not None
    assert trains_now(leader, other)
    built = build_job(leader, fixed, "train", 1, others=[other])["spec"]["template"]
    container = built["spec"]["containers"][0]
    assert container["args"][-3:] == ["--with", f"/etc/qlora/with/{NAME}.json", f"/workspace/{NAME}-folder"]
    items = built["spec"]["volumes"][0]["downwardAPI"]["items"]
    assert items[1] == {
        "path": f"with/{NAME}.json",
        "fieldRef": {"fieldPath": f"metadata.annotations['qlora.dev/spec-of-{NAME}']"},
    }
    assert built["metadata"]["annotations"][f"qlora.dev/spec-of-{NAME}"] == DOCUMENT
    assert container == build_job(leader, fixed, "train", 1)["spec"]["template"]["spec"]["containers"][0] | {
        "args": container["args"]
    }
    assert document(leader)


@pytest.mark.parametrize(
    "other",
    [
        job(),
        job(joined=led_by("zulu")),
        job("suspended", joined=FOLLOWER),
        job("trained", joined=FOLLOWER),
        job("failed", joined=FOLLOWER),
    ],
    ids=["has not noted it", "is another's", "suspended", "trained", "failed"],
)
def test_the_pod_trains_nobody_else(other: QLoRAJob) -> None:
    assert not trains_now(job(name="alpha", joined=ALL), other)


def test_a_change_wakes_those_that_wait_for_it() -> None:
    around = [member for member in map(member_of, (job(name="alpha"), job(name="zulu"))) if member]
    own = job("preparing")
    prepared = job().status
    assert waiting_for(own, prepared, around) == ["alpha", "zulu"]
    assert waiting_for(job(), prepared, around) == []
    noted = [member for member in map(member_of, (job("training", "alpha", ALL), job(name="zulu"))) if member]
    assert waiting_for(job(), job(joined=FOLLOWER).status, noted) == ["alpha"]
    leader, trained = job("training", "alpha", ALL), job("trained", "alpha", ALL).status
    assert waiting_for(leader, trained, [member for member in (member_of(job(joined=FOLLOWER)),) if member]) == [NAME]


def test_a_group_of_thousands_is_looked_at_less_often() -> None:
    crowd = [
        Member(**{**_fields(job(None, "zulu")), "uid": str(number), "name": f"z{number}"}) for number in range(640)
    ]
    found = facts(job(), group=GroupFacts(tuple(crowd)))
    interval = look_again_after(next_status(found), found)
    assert interval is not None
    assert interval.total_seconds() == 15 * 11
    assert found.now == NOW


def _fields(body: QLoRAJob) -> dict[str, Any]:
    member = member_of(body)
    return {name: getattr(member, name) for name in Member.__slots__}
