"""Records of the steps in the status: results, figures, artifacts."""

from typing import Any

import pytest

from qlora_api.artifact_status import BaseStatus, MergedStatus
from qlora_api.choice import Choice
from qlora_api.contract import needed_contract
from qlora_api.profile import Profile
from qlora_api.spec.output import GgufStatus, TrackedRun, TrackingStatus
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.events import tracking_event
from tests.support.builders import (
    ADAPTER,
    BASE,
    FACTS,
    FOUND,
    MEMORY,
    NAME,
    NOW,
    PROFILE,
    child,
    conditions_of,
    ended,
    follow,
    make_job,
    message_of,
    pod,
    present,
    progress,
    reason_of,
    resolved,
    result,
    running,
    status_in,
    step_status,
    succeeded,
    time,
)
from tests.support.resolved import DECIDED

SIGNING = Profile.model_validate(PROFILE.dump() | {"signingKey": {"name": "signing"}})


@pytest.mark.parametrize(("spec", "version"), [({}, 6), (DECIDED, 2)], ids=["open", "all set"])
def test_only_a_job_with_open_settings_needs_a_trainer_that_chooses(spec: dict[str, Any], version: int) -> None:
    """An older one ends with UnsupportedContract, and would not know what is not set."""
    status = follow(make_job(**spec))
    assert present(status.resolved).contract_version == version


def test_a_profile_with_a_key_needs_a_trainer_that_signs() -> None:
    """An older one ends with UnsupportedContract before it publishes anything."""
    status = follow(make_job(), profiles={"default": SIGNING})
    assert present(status.resolved).contract_version == needed_contract(1, signed=True, chosen=True) == 7


TRACKING = Profile.model_validate(PROFILE.dump() | {"tracking": {"mlflow": {"url": "https://m.example.org"}}})


def published(
    profile: Profile, *, lineage: str | None = None, remark: str | None = None, **spec: Any
) -> QLoRAJobStatus:
    """Return the status after publish reported an adapter, signed or unsigned."""
    body = pod("publish")
    adapter = ADAPTER.model_copy(update={"lineage": lineage, "remark": remark})
    done = ended(body, 0, result(body, "publish", adapter=adapter))
    stored = status_in("publish", resolved=resolved(profile).dump())
    return follow(make_job(stored, **spec), child("publish", Complete="Done"), done)


@pytest.mark.parametrize("lineage", [None, "unsigned"])
def test_an_adapter_that_is_not_signed_although_the_profile_has_a_key_fails_the_job(lineage: str | None) -> None:
    """A resumed run's trainer may be too old to read the key that was added since."""
    status = published(SIGNING, lineage=lineage)
    assert (status.phase, reason_of(status, "Failed")) == ("Failed", "AdapterNotSigned")
    assert ADAPTER.uri in message_of(status, "Failed")
    assert "create the job again" in message_of(status, "Failed")
    signed = published(SIGNING, lineage="signed")
    assert (signed.phase, present(signed.adapter).lineage) == ("Succeeded", "signed")
    assert published(PROFILE, lineage=lineage).phase == "Succeeded"


def test_success_names_a_loss_that_has_hardly_fallen_and_the_gate_against_it() -> None:
    status = published(PROFILE, remark="learned little: loss 5.12 to 5.08")
    assert message_of(status, "Succeeded") == (
        f"the adapter is at {ADAPTER.uri}; it learned little: loss 5.12 to 5.08 "
        "(gate.minImprovement makes this a failure)"
    )


def test_a_run_that_the_trainer_does_not_upload_is_named_in_the_status() -> None:
    status = published(TRACKING, training={"reportTo": ["mlflow", "tensorboard"]})
    assert status.phase == "Succeeded"
    assert status.tracking is not None
    assert set(status.tracking.failures) == {"mlflow"}
    assert "of an earlier release" in status.tracking.failures["mlflow"]
    assert published(TRACKING).tracking is None
    assert published(PROFILE, training={"reportTo": ["mlflow"]}).tracking is None


def test_the_status_names_page_and_tracked_runs_and_an_event_a_failed_upload() -> None:
    body = pod("publish")
    tracking = TrackingStatus(mlflow=TrackedRun(url="https://m.example.org/#/r"), wandb=TrackedRun(message="denied"))
    reported = ended(body, 0, result(body, "publish", adapter=ADAPTER, report_sha256="d" * 64, tracking=tracking))
    before = make_job(status_in("publish"))
    end = follow(before, child("publish", Complete=""), reported)
    assert end.phase == "Succeeded"
    assert end.report is not None
    assert (end.report.uri, end.report.sha256) == (f"{ADAPTER.uri}/report.html", "d" * 64)
    assert end.tracking == tracking
    event = present(tracking_event(before, end, NOW))
    assert (event["type"], event["reason"]) == ("Warning", "TrackingFailed")
    assert event["message"].endswith("could not be uploaded to wandb: denied")
    assert tracking_event(make_job(end), end, NOW) is None


def test_a_run_that_prepare_finds_finished_is_published_without_another_train_job() -> None:
    body = pod("prepare")
    found = FACTS["prepare"] | FACTS["train"] | {"trained": True}
    done = ended(body, 0, result(body, "prepare", **found))
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), done)
    assert status.step == step_status("publish", jobUid="")
    assert present(status.progress).summary == "100% 10/10"


def test_the_results_of_prepare_are_shown_and_train_is_next() -> None:
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), succeeded("prepare"))
    assert (status.memory, status.dataset, status.base) == (MEMORY, FOUND, BASE)
    assert status.model_revision == "c0ffee"
    assert conditions_of(status)["Prepared"] == "True"
    assert status.step == step_status("train", jobUid="")
    assert status.phase == "Preparing"


SETTINGS = (Choice.of("lora.rank", 16, "few tokens"), Choice.of("training.learningRate", 0.0013, ""))


def test_chosen_settings_are_shown_from_the_record_of_prepare_on() -> None:
    body = pod("prepare")
    prepared = ended(body, 0, result(body, "prepare", **FACTS["prepare"], settings=SETTINGS))
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), prepared)
    assert status.settings == SETTINGS
    assert status.dump()["settings"][0] == {"setting": "lora.rank", "value": "16", "reason": "few tokens"}
    trained = follow(make_job(status_in("train", settings=SETTINGS)), child("train", Complete=""), succeeded("train"))
    assert trained.settings == SETTINGS
    published = make_job(status_in("publish", settings=SETTINGS))
    assert follow(published, child("publish", Complete=""), succeeded("publish")).settings == SETTINGS


def test_a_job_that_sets_everything_shows_no_chosen_settings() -> None:
    body = pod("prepare")
    prepared = ended(body, 0, result(body, "prepare", **FACTS["prepare"], settings=()))
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), prepared)
    assert "settings" not in status.dump()


def test_deviations_of_a_step_from_the_spec_are_in_its_condition() -> None:
    said = "2 rows are ready; no packing: rows in one sequence would affect each other"
    body = pod("prepare")
    prepared = ended(body, 0, result(body, "prepare", **FACTS["prepare"], message=said))
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), prepared)
    assert message_of(status, "Prepared") == said


def test_the_final_figures_of_training_are_shown() -> None:
    stored = status_in("train", memory=MEMORY.dump())
    status = follow(make_job(stored), child("train", Complete=""), succeeded("train"))
    assert status.progress is not None
    assert (status.progress.summary, status.progress.loss, status.progress.percent) == ("100% 10/10", 1.2346, 100)
    assert present(status.memory).peak_bytes == 99
    assert present(status.step).name == "publish"
    assert status.step == step_status("publish", jobUid="")


def test_a_run_that_has_stopped_early_is_done() -> None:
    body = pod("train")
    stopped = ended(body, 0, result(body, "train", training_step=120, total_steps=400, loss=1.0, eval_loss=1.23456))
    status = follow(make_job(status_in("train")), child("train", Complete=""), stopped)
    assert status.progress is not None
    assert (status.progress.summary, status.progress.percent) == ("stopped early 120/400", 100)
    assert (status.progress.step, status.progress.total_steps, status.progress.remaining) == (120, 400, "")
    assert (status.progress.eval_loss, present(status.step).name) == (1.23456, "publish")


def test_a_run_that_was_interrupted_has_not_stopped_early() -> None:
    body = pod("train")
    interrupted = ended(body, 143, result(body, "train", 143, training_step=120, total_steps=400))
    stored = status_in("train", progress={"step": 110, "totalSteps": 400, "percent": 27, "summary": "27% 110/400"})
    status = follow(make_job(stored), child("train", Failed="BackoffLimitExceeded"), interrupted)
    assert "stopped early" not in present(status.progress).summary


def test_the_results_of_a_failed_step_are_shown() -> None:
    body = pod("prepare")
    exceeds = MEMORY.model_copy(update={"verdict": "exceeds", "budget_bytes": 5})
    record = result(body, "prepare", 17, reason="DoesNotFit", message="needs 10", memory=exceeds)
    bodies = [child("prepare", Failed="PodFailurePolicy"), ended(body, 17, record)]
    status = follow(make_job(status_in("prepare")), *bodies)
    assert (status.phase, status.memory, status.dataset) == ("Failed", exceeds, None)


def test_the_checkpoint_of_a_result_is_shown_without_a_log_line() -> None:
    body = pod("train")
    stored = status_in("train", checkpoint={"step": 5, "savedAt": time(-40)})
    saved = ended(body, 143, result(body, "train", 143, training_step=7, total_steps=10))
    status = follow(make_job(stored), child("train"), saved)
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.saved_at) == (7, time())
    set_back = status.model_copy(update={"checkpoint": status.checkpoint.model_copy(update={"step": 5})})
    assert follow(make_job(set_back), child("train"), saved).checkpoint == set_back.checkpoint
    done = follow(make_job(stored), child("train", Complete=""), succeeded("train"))
    assert present(done.checkpoint).step == 10


@pytest.mark.parametrize(
    "message", ["", "garbage", result(pod("train"), "train", job_uid="x"), result(pod("train"), "train", code=203)]
)
def test_without_a_verified_record_a_complete_job_is_done_again_once(message: str) -> None:
    job = make_job(status_in("train"))
    status = follow(job, child("train", Complete=""), ended(pod("train"), 0, message))
    assert status.step == step_status("train", 2, jobUid="", unverified=1)
    assert status.phase == "Queued"
    again = make_job(status.model_copy(update={"step": step_status("train", 2, unverified=1)}))
    status = follow(again, child("train", Complete=""), child("train", 2, Complete=""), ended(pod("train", 2), 0))
    assert (status.phase, reason_of(status)) == ("Failed", "ResultUnreadable")


def test_a_record_counts_only_with_exit_code_0() -> None:
    killed = pod("train")
    bodies = [
        ended(killed, 137, result(killed, "train", training_step=10, total_steps=10)),
        ended(pod("train", number=2), 0),
    ]
    status = follow(make_job(status_in("train")), child("train", Complete=""), *bodies)
    assert present(status.step).job_name == f"{NAME}-train-2"


@pytest.mark.parametrize("code", [0, 11])
def test_the_end_of_a_pod_changes_nothing_until_its_job_has_ended(code: int) -> None:
    stored = follow(make_job(status_in("train")), child("train"), running(pod("train")))
    assert follow(make_job(stored), child("train"), ended(pod("train"), code)) == stored


def test_the_result_of_a_pod_that_the_steps_job_does_not_control_is_no_result() -> None:
    """A tenant may create a pod with the job's labels and any termination message."""
    forged = succeeded("publish")
    forged["metadata"]["ownerReferences"] = [
        {"kind": "ReplicaSet", "name": "mine", "uid": "uid-of-a-replicaset", "controller": True}
    ]
    status = follow(make_job(status_in("publish")), child("publish", Complete=""), forged)
    assert (status.adapter, conditions_of(status)["Succeeded"]) == (None, "Unknown")
    assert status.step == step_status("publish", 2, jobUid="", unverified=1)


GGUF = GgufStatus(file="adapter.gguf", sha256="c" * 64, size_bytes=3, architecture="llama")
MERGED = MergedStatus(uri="pvc://out/merged", sha256="b" * 64, size_bytes=14, eval_loss=1.5, adapter_eval_loss=1.5)
PUBLISHED_BASE = BaseStatus(origin="cache", sha256="b" * 64, uri="pvc://out/base")


@pytest.mark.parametrize(
    ("output", "whole", "partial"),
    [
        ({"merged": {}}, {"merged": MERGED}, {}),
        ({"gguf": {}}, {"adapter": ADAPTER.model_copy(update={"gguf": GGUF})}, {}),
        ({"base": {"destination": "pvc://out/base"}}, {"base": PUBLISHED_BASE}, {}),
        (
            {"base": {"destination": "pvc://out/base"}},
            {"base": PUBLISHED_BASE},
            {"base": PUBLISHED_BASE.model_copy(update={"uri": None})},
        ),
        ({}, {"adapter": ADAPTER}, {"adapter": None}),
    ],
    ids=["merged model", "GGUF file", "base", "base that is not published", "the adapter alone"],
)
def test_each_output_is_reported_and_required_for_success(
    output: dict[str, Any], whole: dict[str, Any], partial: dict[str, Any]
) -> None:
    body = pod("publish")

    def reported(found: dict[str, Any]) -> QLoRAJobStatus:
        end = ended(body, 0, result(body, "publish", **{"adapter": ADAPTER, **found}))
        return follow(make_job(status_in("publish"), output=output), child("publish", Complete=""), end)

    status = reported(whole)
    assert status.phase == "Succeeded"
    assert {name: getattr(status, name) for name in whole} == whole
    assert ("its base at pvc://out/base" in message_of(status)) == ("base" in output)
    assert reported(partial).step == step_status("publish", 2, jobUid="", unverified=1)


def test_progress_is_shown_and_kept_without_new_records() -> None:
    record = progress(
        training_step=420,
        total_steps=1000,
        epoch=1.5,
        loss=1.23456789,
        remaining_seconds=4320.0,
        micro_batch_size=2,
        goodput=0.97,
        checkpoint_step=400,
        checkpoint_time=time(-30),
    )
    bodies = [child("train"), running(pod("train"))]
    status = follow(make_job(status_in("train")), *bodies, progress=record)
    assert status.progress is not None
    shown = status.progress
    assert (shown.summary, shown.remaining, shown.loss, shown.updated_at) == (
        "42% 420/1000",
        "1h12m",
        1.2346,
        time(),
    )
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.saved_at) == (400, time(-30))
    assert follow(make_job(status), *bodies).progress == shown
    newer = follow(make_job(status), *bodies, progress=progress(training_step=421, total_steps=1000))
    assert newer.progress is not None
    assert (newer.progress.step, newer.progress.loss, newer.progress.micro_batch_size) == (421, 1.2346, 2)
    assert newer.progress.goodput == 0.97
    assert newer.checkpoint == status.checkpoint


def test_figures_of_preferences_are_shown_with_four_digits_from_progress_and_result() -> None:
    figures: dict[str, Any] = {"reward_margin": 0.123456, "accuracy": 0.75, "eval_accuracy": 2 / 3}
    record, body = progress(training_step=2, total_steps=4, **figures), pod("train")
    live = follow(make_job(status_in("train")), child("train"), running(pod("train")), progress=record)
    done = ended(body, 0, result(body, "train", training_step=4, **figures))
    for status in (live, follow(make_job(status_in("train")), child("train", Complete=""), done)):
        assert status.progress is not None
        shown = status.progress
        assert (shown.reward_margin, shown.accuracy, shown.eval_accuracy) == (0.1235, 0.75, 0.6667)


def test_the_activity_of_prepare_is_shown_until_training_has_figures() -> None:
    record = progress(step="prepare", activity="downloading 40%")
    status = follow(make_job(status_in("prepare")), child("prepare"), running(pod("prepare")), progress=record)
    assert present(status.progress).summary == "downloading 40%"
    status = follow(make_job(status), child("prepare", Complete=""), succeeded("prepare"))
    assert status.progress is None
