"""A failed job that its user retries: its next step, its inputs, and its kept state."""

import json
from typing import Any

import pytest

from qlora_api.artifact_status import GateStatus
from qlora_api.contract import is_signed, needed_contract
from qlora_api.naming import SPEC_ANNOTATION
from qlora_api.profile import Profile
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.plan import CreateJob, DeleteJob
from tests.support.builders import (
    DATASET,
    JUDGED,
    NAME,
    NOW,
    PROFILE,
    after,
    child,
    conditions_of,
    facts,
    failed,
    follow,
    make_job,
    message_of,
    plan_of,
    pod,
    present,
    reason_of,
    resolved,
    running,
    seen,
    status_in,
    step_status,
    succeeded,
)

SIGNING = Profile.model_validate(PROFILE.dump() | {"signingKey": {"name": "signing"}})
FORBIDDEN = (child("publish", Failed="PodFailurePolicy"), failed("publish", 10, "BadConfiguration", "the key expired"))


def failed_job(**spec: Any) -> QLoRAJobStatus:
    """The stored status of a job whose publication failed."""
    return follow(make_job(status_in("publish", failures=2, disruptions=3), **spec), *FORBIDDEN)


def take_up(stored: QLoRAJobStatus, request: str = "a", /, *bodies: Any, **more: Any) -> QLoRAJobStatus:
    profiles = more.pop("profiles", {"default": PROFILE})
    return follow(make_job(stored, retry={"request": request}, **more), *(bodies or FORBIDDEN), profiles=profiles)


def test_a_job_that_names_an_object_reserved_by_a_profile_is_not_retried() -> None:
    spec: dict[str, Any] = {"output": {"destination": "s3://team/a", "secretRef": {"name": "login"}}}
    proxy = {"httpsProxy": "http://proxy:3128", "proxySecretName": "login"}
    today = {"default": Profile.model_validate(PROFILE.dump() | proxy)}
    status = take_up(failed_job(**spec), profiles=today, **spec)
    assert (status.phase, reason_of(status, "Stalled")) == ("Failed", "SecretNotAllowed")
    assert take_up(failed_job(**spec), **spec).phase == "Publishing"


def test_a_new_request_retries_the_job_at_the_failed_step() -> None:
    status = take_up(failed_job())

    assert status.step is not None
    assert (status.step.job_name, status.step.job_uid, status.step.counted_pod) == (f"{NAME}-publish-2", "", "")
    assert (status.phase, status.completion_time, status.retry_request) == ("Publishing", None, "a")
    assert (status.failures, status.disruptions) == (0, 0)
    expected = {"Prepared": "True", "Failed": "False", "Stalled": "False", "Succeeded": "Unknown"}
    assert expected.items() <= conditions_of(status).items()
    assert "Failed" not in message_of(status)
    # The next Job gets another number, and is made as soon as no pod is left.
    job = make_job(status, retry={"request": "a"})
    assert plan_of(job, status, seen(*FORBIDDEN), NOW).actions == (CreateJob("publish", 2),)


def test_only_another_request_than_the_last_one_retries_the_job() -> None:
    """A GitOps tool may set any earlier text, or remove it."""
    stored = failed_job().model_copy(update={"retry_request": "2"})
    removed = follow(make_job(stored), *FORBIDDEN)
    assert [take_up(each, "2").phase for each in (stored, removed)] == ["Failed", "Failed"]
    assert take_up(removed, "1").phase == "Publishing"


def test_a_request_that_was_made_before_the_failure_is_spent() -> None:
    begun = make_job(status_in("publish"), retry={"request": "5"})
    stored = follow(make_job(status_in("publish")), child("publish"), running(pod("publish")))
    stored = follow(make_job(stored, retry={"request": "5"}), child("publish"), running(pod("publish")))
    assert (stored.retry_request, stored.step and stored.step.attempt, begun.name) == ("5", 1, NAME)
    end = follow(make_job(stored, retry={"request": "5"}), *FORBIDDEN)
    assert take_up(end, "5").phase == "Failed"


def test_a_job_that_succeeded_is_not_retried() -> None:
    stored = failed_job()
    conditions = tuple(
        entry.model_copy(update={"status": "False" if entry.type == "Failed" else "True"})
        for entry in stored.conditions
    )
    done = stored.model_copy(update={"conditions": conditions, "phase": "Succeeded"})
    assert take_up(done).phase == "Succeeded"


def test_a_retry_uses_the_current_profile() -> None:
    mended = Profile.model_validate(PROFILE.dump() | {"image": "example.org/mended", "hubEndpoint": "https://hub"})
    kept = mended.model_copy(update={"image": PROFILE.image})
    stored = failed_job()
    old = stored.model_copy(update={"resolved": present(stored.resolved).model_copy(update={"contract_version": 1})})

    status = take_up(old, profiles={"default": mended})

    assert status.resolved is not None
    # Except for the image: only the trainer that began a run continues it.
    assert (status.resolved.profile, status.resolved.contract_version) == (kept, 1)
    without = take_up(old, profiles={"other": mended})
    assert present(without.resolved).profile == PROFILE


def test_a_trainer_that_does_not_sign_does_not_publish_after_a_key_was_added() -> None:
    """The image stays, and ends with UnsupportedContract if it is too old for a key."""
    status = take_up(failed_job(), profiles={"default": SIGNING})
    assert status.step is not None
    assert (status.step.name, present(status.resolved).contract_version) == ("publish", needed_contract(1, signed=True))


def begun_with_a_key(*, chosen: bool = True) -> dict[str, Any]:
    version = needed_contract(1, signed=True, chosen=chosen)
    return {"resolved": resolved(SIGNING).model_copy(update={"contract_version": version}).dump()}


@pytest.mark.parametrize("chosen", [True, False], ids=["this release", "the one before"])
def test_a_trainer_that_does_not_sign_publishes_after_the_key_was_removed(chosen: bool) -> None:
    stored = follow(make_job(status_in("publish", **begun_with_a_key(chosen=chosen))), *FORBIDDEN)
    status = take_up(stored)
    assert not is_signed(present(status.resolved).contract_version)


def test_a_job_that_waits_for_a_signing_trainer_continues_without_a_key() -> None:
    old = (
        child("prepare", Failed="PodFailurePolicy"),
        failed("prepare", 19, "UnsupportedContract", "set the profile's image"),
    )
    waiting = follow(make_job(status_in("prepare", **begun_with_a_key())), *old, profiles={"default": SIGNING})
    assert reason_of(waiting) == "UnsupportedContract"

    status = follow(make_job(waiting), *old)

    assert present(status.step).job_name == f"{NAME}-prepare-2"
    assert status.resolved is not None
    assert (status.resolved.profile, status.resolved.contract_version) == (PROFILE, needed_contract(1, chosen=True))


def test_a_job_that_has_prepared_nothing_uses_the_current_image_too() -> None:
    broken = (child("prepare", Failed="PodFailurePolicy"), failed("prepare", 10, "BadConfiguration", "old"))
    newer = Profile.model_validate(PROFILE.dump() | {"image": "example.org/newer"})
    stored = follow(make_job(status_in("prepare")), *broken)
    status = take_up(stored, "a", *broken, profiles={"default": newer})
    assert status.resolved is not None
    assert (status.resolved.profile, status.resolved.contract_version) == (newer, needed_contract(1, chosen=True))


@pytest.mark.parametrize(("own", "expected"), [({}, "79Gi"), ({"resources": {"gpuMemory": "22Gi"}}, "22Gi")])
def test_a_job_that_has_prepared_nothing_uses_the_current_memory_of_a_gpu(own: dict[str, Any], expected: str) -> None:
    too_small = (child("prepare", Failed="PodFailurePolicy"), failed("prepare", 17, "DoesNotFit", "8Gi"))
    small, mended = (Profile.model_validate(PROFILE.dump() | {"gpuMemory": memory}) for memory in ("8Gi", "79Gi"))
    begun = follow(make_job(**own), profiles={"default": small})
    stored = follow(make_job(status_in("prepare").model_copy(update={"resolved": begun.resolved}), **own), *too_small)
    status = take_up(stored, "a", *too_small, profiles={"default": mended}, **own)
    assert json.loads(present(status.resolved).document)["spec"]["resources"]["gpuMemory"] == expected


def test_a_prepared_job_keeps_the_memory_of_a_gpu_that_its_settings_fit() -> None:
    mended = Profile.model_validate(PROFILE.dump() | {"gpuMemory": "79Gi"})
    assert "gpuMemory" not in present(take_up(failed_job(), profiles={"default": mended}).resolved).document


def test_no_number_of_a_job_is_used_twice() -> None:
    """Prepare had seven Jobs, and training failed in its first: no step reuses a name."""
    many = follow(make_job(status_in("prepare", 7)), child("prepare", 7, Complete=""), succeeded("prepare", 7))
    assert many.highest_attempt == 7
    training = many.model_copy(update={"step": step_status("train")})
    broken = (child("train", Failed="PodFailurePolicy"), failed("train", 14, "Diverged", "the loss is not finite"))
    stored = follow(make_job(training), *broken)
    status = take_up(stored, "a", child("clean"), *broken)
    assert present(status.step).job_name == f"{NAME}-prepare-8"
    begun = status.model_copy(update={"step": step_status("prepare", 8)})
    again = (child("prepare", 8, Complete=""), succeeded("prepare", 8), *broken)
    status = follow(make_job(begun, retry={"request": "a"}), *again)
    assert (present(status.step).job_name, status.last_failure) == (f"{NAME}-train-8", None)


def test_each_end_of_a_job_has_a_separate_clean_up() -> None:
    cleaned = child("clean", Complete="")
    job = make_job(take_up(failed_job(cleanupAfterSeconds=0), "a", cleaned), retry={"request": "a"})
    actions = plan_of(job, follow(job, cleaned), seen(cleaned), NOW).actions
    assert DeleteJob(f"{NAME}-clean-1", cleaned["metadata"]["uid"]) in actions


@pytest.mark.parametrize(
    ("step", "code", "reason"),
    [("train", 12, "ModelUnavailable"), ("train", 11, "BadDataset"), ("publish", 11, "BadDataset")],
)
def test_a_job_without_its_base_model_or_rows_restarts_at_prepare(step: StepName, code: int, reason: str) -> None:
    gone = (child(step, Failed="PodFailurePolicy"), failed(step, code, reason, "gone"))
    stored = follow(make_job(status_in(step)), *gone)
    status = take_up(stored, "a", *gone)
    assert present(status.step).name == "prepare"
    cached = Profile.model_validate(PROFILE.dump() | {"modelCache": {"claimName": "models"}})
    status = take_up(failed_job(), profiles={"default": cached})
    assert present(status.step).name == "prepare"


def test_a_step_that_could_not_start_uses_the_current_profile_on_request() -> None:
    mended = Profile.model_validate(PROFILE.dump() | {"image": "example.org/mended"})
    stored = follow(make_job(status_in("prepare")), child("prepare"), pod("prepare"))
    status = take_up(stored, "a", child("prepare"), pod("prepare"), profiles={"default": mended})
    assert status.step is not None
    assert (present(status.resolved).profile, status.step.job_name) == (mended, f"{NAME}-prepare-2")


def test_a_profile_is_not_fixed_before_anything_exists() -> None:
    mended = Profile.model_validate(PROFILE.dump() | {"image": "example.org/mended"})
    rejected = follow(make_job())
    status = follow(make_job(rejected), profiles={"default": mended})
    assert present(status.resolved).profile == mended
    # Existing objects name the profile that they were made from.
    status = follow(make_job(rejected), child("prepare"), profiles={"default": mended})
    assert present(status.resolved).profile == PROFILE


@pytest.mark.parametrize("cleaning", [child("clean"), child("clean", Complete="")], ids=["cleaning", "cleaned"])
def test_after_a_clean_up_it_restarts_at_prepare(cleaning: dict[str, Any]) -> None:
    stored = failed_job(cleanupAfterSeconds=0)

    status = take_up(stored, "a", cleaning)

    assert status.step is not None
    assert (status.step.name, status.step.job_name) == ("prepare", f"{NAME}-prepare-2")
    assert conditions_of(status)["Prepared"] == "Unknown"
    assert "CleanedUp" not in conditions_of(status)


def test_a_clean_up_that_runs_is_stopped_first() -> None:
    job = make_job(failed_job(cleanupAfterSeconds=0), retry={"request": "a"})
    cleaning = child("clean")
    status = follow(job, cleaning)
    uid = cleaning["metadata"]["uid"]
    assert plan_of(job, status, seen(cleaning), NOW).actions[:1] == (DeleteJob(f"{NAME}-clean-1", uid),)


def test_a_suspended_job_is_retried_when_it_is_resumed() -> None:
    status = take_up(failed_job(), suspend=True)
    assert status.phase == "Suspended"
    job = make_job(status, retry={"request": "a"})
    assert plan_of(job, follow(job, *FORBIDDEN), seen(*FORBIDDEN), NOW).actions == (CreateJob("publish", 2),)


def test_a_trainer_of_another_release_is_waited_for_and_costs_no_failure() -> None:
    old = (
        child("train", Failed="PodFailurePolicy"),
        failed("train", 19, "UnsupportedContract", "set the profile's image"),
    )
    status = follow(make_job(status_in("train")), *old)
    assert (status.phase, status.failures, reason_of(status)) == ("Queued", 0, "UnsupportedContract")
    assert "set the profile's image" in message_of(status)
    assert follow(make_job(status), *old) == status

    newer = Profile.model_validate(PROFILE.dump() | {"image": "example.org/newer"})
    status = follow(make_job(status), *old, profiles={"default": newer})

    assert present(status.step).job_name == f"{NAME}-train-2"
    assert present(status.resolved).profile.image == "example.org/newer"


def test_a_status_without_its_step_restarts_at_prepare() -> None:
    stored = status_in("train", highestAttempt=3).model_copy(update={"step": None})
    status = follow(make_job(stored))
    assert (present(status.step).job_name, status.phase) == (f"{NAME}-prepare-4", "Preparing")


def test_a_withdrawn_clean_up_is_removed_from_the_status() -> None:
    stored = follow(make_job(failed_job(), cleanupAfterSeconds=60), *FORBIDDEN)
    assert reason_of(stored, "CleanedUp") == "Scheduled"
    status = follow(make_job(stored), *FORBIDDEN, now=after(120))
    assert reason_of(status, "CleanedUp") == "NotScheduled"


def test_a_job_with_a_problem_gets_no_new_step_job() -> None:
    stored = status_in("train").model_copy(update={"resolved": resolved().model_copy(update={"contract_version": 99})})
    job = make_job(stored)
    found = facts(job)
    status = follow(job)
    assert (status.phase, reason_of(status), status.step) == ("Queued", "InvalidSpec", stored.step)
    assert plan_of(job, status, found.observed, NOW).actions == ()
    stopping = make_job(stored, suspend=True)
    actions = plan_of(stopping, follow(stopping, child("train")), seen(child("train")), NOW).actions
    assert actions == (DeleteJob(f"{NAME}-train-1", f"uid-{NAME}-train-1"),)
    limited = make_job(stored, activeDeadlineSeconds=30)
    assert follow(limited, child("train"), running(pod("train"), since=-60)).phase == "Failed"


GATED = {"eval": {"fraction": 0.1}} | DATASET
STRICT, MILD = {"minImprovement": 0.5}, {"minImprovement": 0.1}


def gate_read(job: QLoRAJob, status: QLoRAJobStatus) -> Any:
    """The gate that the next pod reads."""
    assert status.resolved is not None
    annotations = build_job(job, status.resolved, "publish", 2)["spec"]["template"]["metadata"]["annotations"]
    return json.loads(annotations[SPEC_ANNOTATION])["spec"].get("gate")


def test_a_rejected_adapter_is_checked_again_by_the_current_gate() -> None:
    failure = failed("publish", 20, "GateFailed", "spec.gate.minImprovement is 0.5", gate=JUDGED)
    seen_then = (child("publish", Failed="PodFailurePolicy"), failure)
    begun = follow(make_job(dataset=GATED, gate=STRICT))
    publishing = status_in("publish").model_copy(update={"resolved": begun.resolved})

    stored = follow(make_job(publishing, dataset=GATED, gate=STRICT), *seen_then)

    assert (stored.phase, reason_of(stored, "Failed"), stored.gate) == ("Failed", "GateFailed", JUDGED)
    assert "minImprovement is 0.5" in message_of(stored, "Failed")
    for gate, read in ((MILD, MILD), (None, None)):
        spec: dict[str, Any] = {"dataset": GATED, "retry": {"request": "a"}} | ({} if gate is None else {"gate": gate})
        status = follow(make_job(stored, **spec), *seen_then)
        assert (status.phase, present(status.step).job_name, status.gate) == ("Publishing", f"{NAME}-publish-2", None)
        assert gate_read(make_job(status, **spec), status) == read


def test_a_lost_guard_fails_the_job_with_its_figures_and_a_milder_limit_publishes_the_same_adapter() -> None:
    def guarded(most: float) -> dict[str, Any]:
        return {"guards": [{"name": "chat", "source": "pvc://data/chat.jsonl", "maxLossIncrease": most}]}

    message = "spec.gate.guards[chat].maxLossIncrease is 0.1, and the loss on its rows changed by +0.3000"
    limit = {"name": "maxLossIncrease", "required": 0.1, "found": 0.3, "passed": False}
    chat = {"name": "chat", "sha256": "d" * 64, "loss": 1.8, "baseLoss": 1.5, "tokens": 40, "criteria": [limit]}
    judged = GateStatus.model_validate(JUDGED.dump() | {"guards": [chat]})
    seen_then = (child("publish", Failed="PodFailurePolicy"), failed("publish", 20, "GateFailed", message, gate=judged))
    begun = follow(make_job(gate=guarded(0.1)))
    publishing = status_in("publish").model_copy(update={"resolved": begun.resolved})

    stored = follow(make_job(publishing, gate=guarded(0.1)), *seen_then)

    assert (stored.phase, reason_of(stored, "Failed"), stored.gate) == ("Failed", "GateFailed", judged)
    assert message in message_of(stored, "Failed")
    mild: dict[str, Any] = {"gate": guarded(0.5), "retry": {"request": "a"}}
    again = follow(make_job(stored, **mild), *seen_then)
    assert again.phase == "Publishing"
    assert gate_read(make_job(again, **mild), again) == guarded(0.5)


def test_a_gate_that_is_changed_while_the_job_runs_counts_from_the_next_step_on() -> None:
    begun = follow(make_job(dataset=GATED, gate=STRICT))
    assert gate_read(make_job(begun, dataset=GATED, gate=MILD), begun) == MILD
    # An older definition of the resource drops the field: the original gate of the job remains.
    assert gate_read(make_job(begun, dataset=GATED), begun) == STRICT
