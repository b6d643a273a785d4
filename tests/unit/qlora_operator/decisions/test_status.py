"""The status that follows from the stored one and the seen objects."""

from typing import Any

import pytest

from qlora_api.artifact_status import BaseStatus, MergedStatus
from qlora_api.contract import needed_contract
from qlora_api.profile import Profile
from qlora_api.spec.output import GgufStatus, TrackedRun, TrackingStatus
from qlora_api.status import QLoRAJobStatus
from qlora_operator.decisions.cleanup import cleanup_at
from qlora_operator.decisions.events import tracking_event
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.status import next_status, with_child, with_rejection
from tests.support.builders import (
    ADAPTER,
    BASE,
    DATASET,
    FACTS,
    FOUND,
    MEMORY,
    NAME,
    NOW,
    PROFILE,
    after,
    child,
    conditions_of,
    deleted,
    ended,
    facts,
    failed,
    follow,
    make_job,
    message_of,
    node,
    pod,
    progress,
    reason_of,
    resolved,
    result,
    running,
    status_in,
    step_status,
    succeeded,
    time,
    waiting,
)

LIVE = {"Suspended": "False", "Failed": "False", "Stalled": "False", "Succeeded": "Unknown"}


def test_the_first_visit_sets_every_condition_and_resolves_before_any_job_exists() -> None:
    status = follow(make_job())
    assert conditions_of(status) == LIVE | {
        "Prepared": "Unknown",
        "Trained": "Unknown",
        "Progressing": "Unknown",
        "Reconciling": "True",
        "Ready": "False",
    }
    assert (status.observed_generation, status.phase, status.start_time) == (1, "Pending", time())
    assert status.resolved is not None
    assert (status.resolved.profile, status.resolved.claim_name) == (PROFILE, f"{NAME}-0a1b2c3d")
    assert status.step is not None
    assert (status.step.job_name, status.step.job_uid) == (f"{NAME}-prepare-1", "")


def test_a_claim_of_the_user_is_used_and_not_created() -> None:
    status = follow(make_job(workspace={"claimName": "shared"}))
    assert status.resolved is not None
    assert (status.resolved.claim_name, status.resolved.claim_created) == ("shared", False)


def test_a_job_of_an_unknown_profile_waits_and_names_the_profiles_that_exist() -> None:
    status = follow(make_job(scheduling={"profile": "h100"}))
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "ProfileNotFound")
    assert "'h100'" in message_of(status)
    assert "default" in message_of(status)
    assert conditions_of(status)["Stalled"] == "False"
    later = follow(make_job(status, scheduling={"profile": "h100"}), profiles={"h100": PROFILE})
    assert later.resolved is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priorityClassName", "high"),
        ("nodeSelector", {"node-role.kubernetes.io/control-plane": ""}),
        ("tolerations", [{"operator": "Exists"}]),
    ],
)
def test_a_job_above_its_profiles_limits_waits_and_names_them(field: str, value: object) -> None:
    job = make_job(scheduling={field: value})
    assert follow(job).resolved is not None
    strict = {"default": PROFILE.model_copy(update={"allow_job_scheduling": False})}
    status = follow(job, profiles=strict)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "SchedulingNotAllowed")
    assert f"spec.scheduling.{field}:" in message_of(status)
    assert follow(make_job(), profiles=strict).resolved is not None


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("workspace.claimName", {"workspace": {"claimName": "models"}}),
        ("model.source", {"model": {"source": "pvc://models/models/c0ffee"}}),
        ("dataset.source", {"dataset": {"source": "pvc://models/rows.jsonl"}}),
        ("dataset.mix[1].source", {"dataset": {"mix": [DATASET, {"source": "pvc://models/rows.jsonl"}]}}),
        ("dataset.eval.source", {"dataset": DATASET | {"eval": {"source": "pvc://models/rows.jsonl"}}}),
        ("output.destination", {"output": {"destination": "pvc://models/models/c0ffee"}}),
        ("lora.from.source", {"lora": {"from": {"source": "pvc://models/adapter"}}}),
        ("output.merged.destination", {"output": {"merged": {"destination": "pvc://models/merged"}}}),
        ("output.base.destination", {"output": {"base": {"destination": "pvc://models/base"}}}),
    ],
)
def test_a_job_that_names_the_claim_of_a_cache_waits_with_any_profile(field: str, spec: dict[str, Any]) -> None:
    assert follow(make_job(**spec)).resolved is not None
    cached = Profile.model_validate(PROFILE.dump() | {"modelCache": {"claimName": "models"}})
    status = follow(make_job(**spec), profiles={"default": PROFILE, "cached": cached})
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "ClaimNotAllowed")
    assert message_of(status).startswith(f"spec.{field} names the claim 'models'")
    assert follow(make_job(), profiles={"default": cached}).resolved is not None


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        (
            "model.tokenSecretRef",
            {"model": {"source": "hf://a/b", "tokenSecretRef": {"name": "signing", "key": "key"}}},
        ),
        ("output.secretRef", {"output": {"destination": "s3://team/a", "secretRef": {"name": "signing"}}}),
        (
            "output.tracking.secretRef",
            {"training": {"reportTo": ["wandb"]}, "output": {"tracking": {"secretRef": {"name": "signing"}}}},
        ),
    ],
)
def test_a_job_that_names_the_secret_with_a_signing_key_waits(field: str, spec: dict[str, Any]) -> None:
    """A step would send the key to a server as if it were a token."""
    assert follow(make_job(**spec)).resolved is not None
    signing = Profile.model_validate(PROFILE.dump() | {"signingKey": {"name": "signing"}})
    status = follow(make_job(**spec), profiles={"default": PROFILE, "signed": signing})
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "SecretNotAllowed")
    assert message_of(status).startswith(f"spec.{field} names the Secret 'signing'")
    assert follow(make_job(), profiles={"default": signing}).resolved is not None


def test_a_job_that_names_the_secret_with_the_proxys_password_waits() -> None:
    """Prepare would send the password to the hub as a token."""
    proxy = {"httpsProxy": "http://proxy:3128", "proxySecretName": "proxy-login"}
    behind = Profile.model_validate(PROFILE.dump() | proxy)
    spec: dict[str, Any] = {
        "model": {"source": "hf://a/b", "tokenSecretRef": {"name": "proxy-login", "key": "password"}}
    }
    status = follow(make_job(**spec), profiles={"default": PROFILE, "behind": behind})
    assert (status.resolved, reason_of(status)) == (None, "SecretNotAllowed")
    assert "(proxySecretName)" in message_of(status)


SIGNING = Profile.model_validate(PROFILE.dump() | {"signingKey": {"name": "signing"}})


def test_a_profile_with_a_key_needs_a_trainer_that_signs() -> None:
    """An older one ends with UnsupportedContract at its first step, and not after it has published."""
    status = follow(make_job(), profiles={"default": SIGNING})
    assert status.resolved is not None
    assert status.resolved.contract_version == needed_contract(1, signed=True) == 5


TRACKING = Profile.model_validate(PROFILE.dump() | {"tracking": {"mlflow": {"url": "https://m.example.org"}}})


def published(profile: Profile, *, lineage: str | None = None, **spec: Any) -> QLoRAJobStatus:
    """The status after publish has reported the adapter, whose lineage is signed or not."""
    body = pod("publish")
    adapter = ADAPTER.model_copy(update={"lineage": lineage})
    done = ended(body, 0, result(body, "publish", adapter=adapter))
    stored = status_in("publish", resolved=resolved(profile).dump())
    return follow(make_job(stored, **spec), child("publish", Complete="Done"), done)


@pytest.mark.parametrize("lineage", [None, "unsigned"])
def test_an_adapter_that_is_not_signed_although_the_profile_has_a_key_fails_the_job(lineage: str | None) -> None:
    """A resumed run keeps its trainer, which may be too old to read the key that the profile has since."""
    status = published(SIGNING, lineage=lineage)
    assert (status.phase, reason_of(status, "Failed")) == ("Failed", "AdapterNotSigned")
    assert ADAPTER.uri in message_of(status, "Failed")
    assert "create the job again" in message_of(status, "Failed")
    signed = published(SIGNING, lineage="signed")
    assert signed.adapter is not None
    assert (signed.phase, signed.adapter.lineage) == ("Succeeded", "signed")
    assert published(PROFILE, lineage=lineage).phase == "Succeeded"


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
    event = tracking_event(before, end, NOW)
    assert event is not None
    assert (event["type"], event["reason"]) == ("Warning", "TrackingFailed")
    assert event["message"].endswith("could not be uploaded to wandb: denied")
    assert tracking_event(make_job(end), end, NOW) is None


def test_a_profile_that_changes_later_does_not_change_the_job() -> None:
    changed = PROFILE.model_copy(update={"image": "other"})
    status = follow(make_job(status_in("train")), child("train"), profiles={"default": changed})
    assert status.resolved is not None
    assert status.resolved.profile == PROFILE


@pytest.mark.parametrize(
    ("step", "bodies", "phase", "reason"),
    [
        ("prepare", [child("prepare", created=-5)], "Preparing", "Preparing"),
        ("prepare", [child("prepare"), running(pod("prepare"))], "Preparing", "Preparing"),
        ("train", [child("train")], "Queued", "NoPod"),
        ("train", [child("train"), pod("train")], "Queued", "Queued"),
        ("train", [child("train"), running(pod("train"))], "Training", "Training"),
        ("train", [child("train"), ended(pod("train"), 0)], "Training", "Training"),
        ("train", [child("train"), ended(pod("train"), 14)], "Training", "Training"),
        ("train", [child("train"), ended(pod("train"), 200)], "Queued", "Retrying"),
        ("train", [child("train"), ended(pod("train"), 143), pod("train", number=2)], "Queued", "Queued"),
        ("publish", [child("publish"), running(pod("publish"))], "Publishing", "Publishing"),
        ("train", [child("train"), waiting(pod("train"), "ImagePullBackOff")], "Queued", "ImagePullBackOff"),
    ],
)
def test_phase_and_reason_show_the_current_step(step: Any, bodies: Any, phase: str, reason: str) -> None:
    status = follow(make_job(status_in(step)), *bodies)
    assert (status.phase, reason_of(status)) == (phase, reason)
    assert conditions_of(status)["Ready"] == "True"
    assert conditions_of(status)["Reconciling"] == "False"


def test_the_results_of_prepare_are_shown_and_train_is_next() -> None:
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), succeeded("prepare"))
    assert (status.memory, status.dataset, status.base) == (MEMORY, FOUND, BASE)
    assert status.resolved is not None
    assert status.resolved.model_revision == "c0ffee"
    assert conditions_of(status)["Prepared"] == "True"
    assert status.step == step_status("train", jobUid="")
    assert status.phase == "Preparing"


def test_deviations_of_a_step_from_the_spec_are_in_its_condition() -> None:
    said = "2 rows are ready; no packing: rows in one sequence would affect each other"
    body = pod("prepare")
    prepared = ended(body, 0, result(body, "prepare", **FACTS["prepare"], message=said))
    status = follow(make_job(status_in("prepare")), child("prepare", Complete=""), prepared)
    assert message_of(status, "Prepared") == said


def test_once_the_next_job_is_made_the_phase_moves_on_in_the_same_write() -> None:
    found = facts(make_job(status_in("prepare")), child("prepare", Complete=""), succeeded("prepare"))
    status = with_child(next_status(found).status, found, "uid-new")
    assert status.step is not None
    assert (status.step.job_uid, status.phase) == ("uid-new", "Queued")


def test_the_clean_up_job_is_not_recorded_as_the_last_steps_job() -> None:
    found = facts(make_job(FINISHED, cleanupAfterSeconds=0))
    assert with_child(FINISHED, found, "uid-clean") == FINISHED


def test_a_step_waits_for_the_last_pod_of_the_attempt_before() -> None:
    stored = status_in("train", step=step_status("train", 2, jobUid="").dump())
    status = follow(make_job(stored), running(pod("train")))
    assert (status.phase, reason_of(status)) == ("Queued", "WaitingForPod")
    assert f"{NAME}-train-1-pod1" in message_of(status)


def test_the_final_figures_of_training_are_shown() -> None:
    stored = status_in("train", memory=MEMORY.dump())
    status = follow(make_job(stored), child("train", Complete=""), succeeded("train"))
    assert status.progress is not None
    assert (status.progress.summary, status.progress.loss, status.progress.percent) == ("100% 10/10", 1.2346, 100)
    assert status.memory is not None
    assert status.memory.peak_bytes == 99
    assert conditions_of(status)["Trained"] == "True"
    assert status.step == step_status("publish", jobUid="")


def test_a_run_that_has_stopped_early_is_done() -> None:
    body = pod("train")
    stopped = ended(body, 0, result(body, "train", training_step=120, total_steps=400, loss=1.0, eval_loss=1.23456))
    status = follow(make_job(status_in("train")), child("train", Complete=""), stopped)
    assert status.progress is not None
    assert (status.progress.summary, status.progress.percent) == ("stopped early 120/400", 100)
    assert (status.progress.step, status.progress.total_steps, status.progress.remaining) == (120, 400, "")
    assert (status.progress.eval_loss, conditions_of(status)["Trained"]) == (1.23456, "True")


def test_a_run_that_was_interrupted_has_not_stopped_early() -> None:
    body = pod("train")
    interrupted = ended(body, 143, result(body, "train", 143, training_step=120, total_steps=400))
    stored = status_in("train", progress={"step": 110, "totalSteps": 400, "percent": 27, "summary": "27% 110/400"})
    status = follow(make_job(stored), child("train", Failed="BackoffLimitExceeded"), interrupted)
    assert status.progress is not None
    assert "stopped early" not in status.progress.summary


def test_the_end_decides_both_summary_conditions() -> None:
    status = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))
    assert (status.phase, status.adapter, status.completion_time) == ("Succeeded", ADAPTER, time())
    assert conditions_of(status) == {
        "Prepared": "True",
        "Trained": "True",
        "Succeeded": "True",
        "Failed": "False",
        "Suspended": "False",
        "Progressing": "Unknown",
        "Reconciling": "False",
        "Ready": "True",
        "Stalled": "False",
    }


@pytest.mark.parametrize(
    ("step", "bodies", "reason", "words"),
    [
        (
            "prepare",
            [child("prepare", Failed="PodFailurePolicy"), failed("prepare", 11, "BadDataset", "row 3 is cut")],
            "BadDataset",
            "row 3 is cut",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), failed("train", 203, "InternalError", "no luck")],
            "InternalError",
            "no luck",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), ended(pod("train"), 137)],
            "InternalError",
            "kubectl logs tune-train-1-pod1",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), ended(pod("train"), 1)],
            "InternalError",
            "the end of records/train.log in the workspace",
        ),
        (
            "train",
            [child("train", Failed="BackoffLimitExceeded"), ended(node(1), 1)],
            "InternalError",
            "the end of records/train.node-1.log in the workspace",
        ),
        (
            "train",
            [child("train", Failed="PodFailurePolicy"), ended(pod("train"), 12, "{not a record")],
            "ModelUnavailable",
            "exit code 12",
        ),
        ("train", [child("train", Failed="BackoffLimitExceeded")], "BackoffLimitExceeded", "why"),
        ("train", [child("train"), ended(pod("train"), 137, reason="OOMKilled")], "HostOutOfMemory", "24Gi"),
        ("prepare", [child("prepare"), ended(pod("prepare"), 1, reason="OOMKilled")], "HostOutOfMemory", "4Gi"),
    ],
)
def test_a_failures_message_prefers_the_most_specific_source(step: Any, bodies: Any, reason: str, words: str) -> None:
    status = follow(make_job(status_in(step)), *bodies)
    assert status.phase == "Failed"
    assert {"Succeeded": "False", "Failed": "True", "Stalled": "True", "Ready": "False"}.items() <= (
        conditions_of(status).items()
    )
    for kind in ("Succeeded", "Failed", "Stalled"):
        assert reason_of(status, kind) == reason
    assert words in message_of(status)
    assert status.last_failure is not None
    assert (status.last_failure.reason, status.last_failure.step) == (reason, step)
    assert status.completion_time == time()


def test_only_the_conditions_that_tools_read_have_the_failure_message() -> None:
    sentence = "row 3 is cut" * 80
    bodies = [child("prepare", Failed="PodFailurePolicy"), failed("prepare", 11, "BadDataset", sentence)]
    running_job = follow(make_job(status_in("prepare")), child("prepare"), running(pod("prepare")))
    status = follow(make_job(running_job), *bodies)
    found = {entry.type: (entry.status, entry.reason) for entry in status.conditions}
    assert {entry.type for entry in status.conditions if sentence in entry.message} == {
        "Succeeded",
        "Failed",
        "Stalled",
    }
    assert {kind: found[kind] for kind in ("Prepared", "Trained", "Suspended", "Reconciling", "Ready")} == {
        "Prepared": ("False", "BadDataset"),
        "Trained": ("Unknown", "NotReached"),
        "Suspended": ("False", "NotSuspended"),
        "Reconciling": ("False", "Finished"),
        "Ready": ("False", "BadDataset"),
    }


def test_conditions_that_do_not_apply_to_a_success_do_not_repeat_its_message() -> None:
    status = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))
    assert {entry.type for entry in status.conditions if ADAPTER.uri in entry.message} == {"Succeeded", "Ready"}
    assert (reason_of(status, "Failed"), reason_of(status, "Stalled")) == ("NotFailed", "NotStalled")


def test_an_attempt_that_is_retried_is_explained_once() -> None:
    job = make_job(status_in("prepare"))
    status = follow(job, child("prepare"), failed("prepare", 200, "Unreachable", "secret hub is missing"))
    assert [entry.type for entry in status.conditions if "secret hub" in entry.message] == ["Succeeded"]
    assert (reason_of(status, "Prepared"), reason_of(status, "Trained")) == ("NotEnded", "NotReached")


def test_a_failure_without_its_pods_is_reported_from_the_last_status() -> None:
    def last_failure(step: str) -> dict[str, Any]:
        return {"step": step, "reason": "InternalError", "message": "no luck", "time": time(-90), "exitCode": 203}

    failure = child("train", Failed="BackoffLimitExceeded")
    status = follow(make_job(status_in("train", lastFailure=last_failure("train"))), failure)
    assert (status.phase, reason_of(status), message_of(status)) == ("Failed", "InternalError", "no luck")
    assert status.last_failure is not None
    assert status.last_failure.exit_code == 203
    status = follow(make_job(status_in("train", lastFailure=last_failure("prepare"))), failure)
    assert reason_of(status) == "BackoffLimitExceeded"


def rejected_by_the_kubelet(step: Any) -> dict[str, Any]:
    """A pod that failed without a container, as after the restart of a node."""
    return pod(step, phase="Failed", reason="UnexpectedAdmissionError", message="no healthy devices present")


def test_a_pod_that_the_kubelet_rejects_is_reported_and_uses_up_no_retry() -> None:
    status = follow(make_job(status_in("train")), child("train"), rejected_by_the_kubelet("train"))
    assert (status.failures, status.disruptions, status.active_seconds) == (0, 0, 0)
    assert status.last_failure is not None
    assert (status.last_failure.reason, status.last_failure.exit_code) == ("UnexpectedAdmissionError", None)
    sentence = f"pod {NAME}-train-1-pod1 failed before the trainer ran: no healthy devices present"
    assert (reason_of(status), status.last_failure.message) == ("Retrying", sentence)


def test_a_job_whose_pods_the_kubelet_rejected_is_followed_by_another() -> None:
    own = failed("train", 203, "InternalError", "no luck", number=2)
    rejected = pod("train", number=3, phase="Failed", reason="OutOfcpu")
    bodies = [child("train", Failed="BackoffLimitExceeded"), rejected_by_the_kubelet("train"), own, rejected]

    status = follow(make_job(status_in("train"), retry={"maxFailures": 2}), *bodies)

    assert (status.phase, status.failures) == ("Queued", 1)
    assert status.step is not None
    assert (status.step.job_name, status.step.failures) == (f"{NAME}-train-2", 1)
    # Failures of the step itself count as before.
    status = follow(make_job(status_in("train"), retry={"maxFailures": 0}), *bodies)
    assert status.phase == "Failed"


@pytest.mark.parametrize(("step", "phase"), [("prepare", "Preparing"), ("train", "Queued"), ("publish", "Publishing")])
def test_a_step_that_waits_after_a_rejected_pod_reports_reason_and_time(step: Any, phase: str) -> None:
    bodies = [child(step, Failed="BackoffLimitExceeded"), rejected_by_the_kubelet(step)]
    status = follow(make_job(status_in(step)), *bodies, now=after(-590))
    assert (status.phase, reason_of(status), status.failures) == (phase, "PodRejected", 0)
    assert message_of(status) == (
        f"a node has rejected a pod, which uses no retry: Job {NAME}-{step}-2 is created at {time(-539)}, or soon "
        f"after that; UnexpectedAdmissionError: pod {NAME}-{step}-1-pod1 failed before the trainer ran: no healthy "
        "devices present"
    )
    assert conditions_of(status) | {"Ready": "True", "Reconciling": "False", "Failed": "False"} == conditions_of(status)
    later = follow(make_job(status), *bodies, now=after(-540))
    assert (later.phase, later.conditions) == (status.phase, status.conditions)

    created = follow(make_job(status), *bodies, child(step, 2, created=-539), now=after(-539))
    assert (created.phase, reason_of(created)) == (phase, "Retrying")


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
    assert done.checkpoint is not None
    assert done.checkpoint.step == 10


def test_out_of_memory_names_the_jobs_limit_and_the_remedy() -> None:
    job = make_job(status_in("train"), resources={"memory": "9Gi"})
    status = follow(job, child("train"), ended(pod("train"), 137, reason="OOMKilled"))
    assert "9Gi" in message_of(status)
    assert "spec.resources.memory" in message_of(status)


def test_a_retried_attempt_is_shown() -> None:
    job = make_job(status_in("prepare"))
    status = follow(job, child("prepare"), failed("prepare", 200, "Unreachable", "secret hub is missing"))
    assert (status.failures, status.disruptions, status.phase) == (1, 0, "Preparing")
    assert status.last_failure is not None
    assert (status.last_failure.exit_code, status.last_failure.time) == (200, time(-10))
    assert "secret hub is missing" in message_of(status)


def test_an_interruption_is_not_a_failure() -> None:
    status = follow(make_job(status_in("train")), child("train"), ended(pod("train"), 143), pod("train", number=2))
    assert (status.failures, status.disruptions, status.last_failure, status.active_seconds) == (0, 1, None, 50)


@pytest.mark.parametrize(("earlier", "phase"), [(1, "Preparing"), (2, "Failed")])
def test_a_step_that_is_interrupted_too_often_ends_the_job(earlier: int, phase: str) -> None:
    job = make_job(status_in("prepare", disruptions=earlier), retry={"maxDisruptions": 2})
    evicted = ended(pod("prepare"), 137)
    evicted["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet"}]
    status = follow(job, child("prepare"), evicted)
    assert (status.phase, status.disruptions) == (phase, earlier + 1)
    if phase == "Failed":
        assert reason_of(status) == "RetriesExhausted"
        assert "spec.retry.maxDisruptions allows 2" in message_of(status)


def test_unseen_interruptions_do_not_end_a_finished_step() -> None:
    job = make_job(status_in("prepare", disruptions=9), retry={"maxDisruptions": 2})
    status = follow(job, child("prepare", Complete=""), succeeded("prepare"))
    assert (status.phase, conditions_of(status)["Prepared"]) == ("Preparing", "True")


def test_attempts_are_counted_once_while_they_come_and_go() -> None:
    job = make_job(status_in("train"))
    first = running(pod("train"), since=-60)
    steps = [
        ([first], (0, 0, 0)),
        ([deleted(first, -20)], (0, 0, 0)),
        ([deleted(ended(pod("train"), 143, start=-60, end=-10), -20)], (0, 1, 50)),
        ([], (0, 1, 50)),
        ([running(pod("train", number=2), since=-8)], (0, 1, 50)),
        ([ended(pod("train", number=2), 203, start=-8, end=-5)], (1, 1, 53)),
        ([ended(pod("train", number=2), 203, start=-8, end=-5), pod("train", number=3)], (1, 1, 53)),
    ]
    for pods, expected in steps:
        for _ in range(2):
            status = follow(job, child("train"), *pods)
            assert (status.failures, status.disruptions, status.active_seconds) == expected
            job = make_job(status)


def test_an_attempt_is_not_counted_again_after_its_pod_is_deleted() -> None:
    """The first attempt ended in the same second as the start and deletion of the next one."""
    stored = status_in(
        "train",
        step=step_status("train", countedPod="uid-of-a-pod-that-is-gone").dump(),
        failures=1,
        disruptions=1,
        activeSeconds=50,
        activeUntil=time(-10),
    )
    status = follow(make_job(stored), child("train"), ended(pod("train"), 203, start=-60, end=-10))
    assert (status.failures, status.disruptions, status.active_seconds) == (1, 1, 50)


def test_an_attempt_that_begins_and_is_deleted_within_a_second_counts_once() -> None:
    job = make_job(status_in("train", active_until=time(-60)))
    first = deleted(running(pod("train"), since=-60), -60)
    status = follow(job, child("train"), first)
    status = follow(make_job(status), child("train"), deleted(ended(pod("train"), 143, start=-60, end=-50), -60))
    assert (status.disruptions, status.active_seconds) == (1, 10)


def test_a_pod_that_ends_because_of_a_suspension_was_not_disturbed() -> None:
    status = follow(make_job(status_in("train"), suspend=True), ended(pod("train"), 143))
    assert (status.disruptions, status.active_seconds) == (0, 50)


def test_a_pod_that_ends_because_its_job_is_being_deleted_was_not_disturbed() -> None:
    going = child("train")
    going["metadata"]["deletionTimestamp"] = time(-20)
    status = follow(make_job(status_in("train")), going, ended(pod("train"), 143))
    assert (status.disruptions, status.active_seconds) == (0, 50)


def test_a_child_job_that_was_deleted_is_followed_by_the_next_number() -> None:
    status = follow(make_job(status_in("train", 3)))
    assert status.step == step_status("train", 4, jobUid="")
    assert status.phase == "Queued"


def test_a_job_that_was_made_just_before_the_operator_died_is_found() -> None:
    job = make_job(status_in("prepare"))
    status = follow(job, child("prepare", Complete=""), succeeded("prepare"), child("train"), running(pod("train")))
    assert status.step == step_status("train")
    assert status.phase == "Training"


def test_attempts_of_a_job_created_just_before_a_crash_are_counted() -> None:
    stored = status_in("train", step=step_status("train", jobUid="").dump())
    status = follow(make_job(stored), child("train"), ended(pod("train"), 203))
    assert status.step == step_status("train", countedPod=f"uid-{NAME}-train-1-pod1", failures=1)
    assert (status.failures, status.active_seconds) == (1, 50)


def test_a_step_killed_and_then_finished_without_an_operator_is_done() -> None:
    second = pod("train", number=2)
    bodies = [
        child("train", Complete=""),
        ended(pod("train"), 137, reason="OOMKilled", start=-60, end=-40),
        ended(second, 0, result(second, "train", training_step=10, total_steps=10), start=-30),
    ]
    status = follow(make_job(status_in("train")), *bodies)
    assert (conditions_of(status)["Trained"], status.failures) == ("True", 1)


def test_several_steps_that_ended_without_an_operator_are_recorded_in_one_pass() -> None:
    bodies: list[dict[str, Any]] = []
    for step in ("prepare", "train", "publish"):
        bodies += [child(step, Complete=""), succeeded(step)]
    assert follow(make_job(status_in("prepare")), *bodies).phase == "Succeeded"


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
    assert status.step is not None
    assert (status.step.job_name, conditions_of(status)["Trained"]) == (f"{NAME}-train-2", "Unknown")


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


def test_a_published_adapter_that_the_record_does_not_name_is_no_success() -> None:
    body = pod("publish")
    status = follow(
        make_job(status_in("publish")),
        child("publish", Complete=""),
        ended(body, 0, result(body, "publish")),
    )
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
    ],
    ids=["merged model", "GGUF file", "base", "base that is not published"],
)
def test_a_further_output_is_reported_and_required_for_success(
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


def test_a_suspension_ends_when_no_pod_is_left() -> None:
    stored = status_in("train", progress={"remaining": "1h12m"})
    job = make_job(stored, suspend=True)
    status = follow(job, child("train"), running(pod("train")))
    assert (status.phase, reason_of(status, "Suspended")) == ("Training", "Suspending")
    status = follow(make_job(status, suspend=True), deleted(running(pod("train")), -5))
    assert conditions_of(status)["Suspended"] == "False"
    status = follow(make_job(status, suspend=True))
    assert (status.phase, conditions_of(status)["Suspended"]) == ("Suspended", "True")
    assert status.step is not None
    assert status.step.attempt == 1
    assert status.progress is not None
    assert status.progress.remaining == ""
    resumed = follow(make_job(status))
    assert (resumed.phase, resumed.step) == ("Queued", step_status("train", 2, jobUid=""))


def test_a_suspension_does_not_end_while_a_job_may_still_create_a_pod() -> None:
    status = follow(make_job(status_in("train"), suspend=True), child("train"))
    assert (conditions_of(status)["Suspended"], reason_of(status, "Suspended")) == ("False", "Suspending")


def test_a_suspension_that_a_lost_node_blocks_is_reported() -> None:
    status = follow(make_job(status_in("train"), suspend=True), deleted(running(pod("train")), -180))
    assert reason_of(status, "Suspended") == reason_of(status) == "PodStuckTerminating"
    assert "node may be lost" in message_of(status)


def test_a_job_that_is_created_suspended_is_current_and_nothing_is_fixed_yet() -> None:
    status = follow(make_job(suspend=True))
    assert (status.phase, status.resolved, status.step) == ("Suspended", None, None)
    assert {"Suspended": "True", "Reconciling": "False", "Ready": "True"}.items() <= conditions_of(status).items()


@pytest.mark.parametrize(
    ("limit", "earlier", "bodies", "exceeded"),
    [
        (100, 0, [child("train"), running(pod("train"), since=-99)], False),
        (100, 0, [child("train"), running(pod("train"), since=-100)], True),
        (100, 60, [child("train"), running(pod("train"), since=-40)], True),
        (100, 60, [child("train"), pod("train")], False),
        (100, 100, [child("train"), pod("train")], True),
        (100, 0, [child("train", Complete=""), succeeded("train")], False),
    ],
)
def test_the_deadline_counts_running_time_over_all_steps(limit: int, earlier: int, bodies: Any, exceeded: bool) -> None:
    job = make_job(status_in("train", activeSeconds=earlier), activeDeadlineSeconds=limit)
    status = follow(job, *bodies)
    assert (reason_of(status) == "DeadlineExceeded") == exceeded
    assert (status.phase == "Failed") == exceeded


def test_a_step_that_has_ended_well_counts_although_the_deadline_has_passed() -> None:
    job = make_job(status_in("publish", activeSeconds=500), activeDeadlineSeconds=100)
    assert follow(job, child("publish", Complete=""), succeeded("publish")).phase == "Succeeded"


def test_the_transition_time_moves_only_when_the_status_flips() -> None:
    job = make_job(follow(make_job()))
    status = follow(make_job(job.status, generation=2, suspend=True), now=after(60))
    found = {entry.type: entry for entry in status.conditions}
    assert found["Suspended"].last_transition_time == time(60)
    assert found["Failed"].last_transition_time == time(0)
    assert found["Failed"].observed_generation == 2
    assert status.observed_generation == 2


@pytest.mark.parametrize(
    ("step", "bodies"),
    [
        ("prepare", [child("prepare")]),
        ("train", [child("train"), running(pod("train"))]),
        ("train", [child("train"), ended(pod("train"), 200)]),
        ("train", [child("train"), waiting(pod("train"), "ImagePullBackOff")]),
        ("publish", [child("publish", Failed="PodFailurePolicy"), failed("publish", 16, "StorageFull", "full")]),
        ("publish", [child("publish", Complete=""), succeeded("publish")]),
    ],
)
def test_a_later_pass_changes_nothing(step: Any, bodies: Any) -> None:
    once = follow(make_job(status_in(step)), *bodies)
    stored = QLoRAJobStatus.model_validate(once.dump())
    assert follow(make_job(stored), *bodies, now=after(30)).dump() == once.dump()


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
    assert status.progress is not None
    assert status.progress.summary == "downloading 40%"
    status = follow(make_job(status), child("prepare", Complete=""), succeeded("prepare"))
    assert status.progress is None


FINISHED = follow(make_job(status_in("publish")), child("publish", Complete=""), succeeded("publish"))


def test_a_finished_job_stays_finished_after_any_deletion_or_change() -> None:
    status = follow(make_job(FINISHED, generation=2, suspend=True), now=after(1000))
    assert status == FINISHED.model_copy(update={"observed_generation": 2})


def test_clean_up_is_announced_done_and_recorded() -> None:
    def look(status: QLoRAJobStatus, *bodies: dict[str, Any], at: float) -> QLoRAJobStatus:
        return follow(make_job(status, cleanupAfterSeconds=100), *bodies, now=after(at))

    rest = [child("publish", Complete="")]
    status = look(FINISHED, *rest, at=1)
    assert (reason_of(status, "CleanedUp"), time(100) in message_of(status, "CleanedUp")) == ("Scheduled", True)
    assert cleanup_at(make_job(status, cleanupAfterSeconds=100), status) == after(100)
    assert look(status, *rest, child("clean", Complete=""), at=101) == status
    done = look(status, child("clean", Complete=""), at=102)
    assert conditions_of(done)["CleanedUp"] == "True"
    assert (done.phase, done.adapter) == ("Succeeded", ADAPTER)
    assert look(done, at=103) == done


def test_a_failed_clean_up_is_reported_and_keeps_the_jobs_phase() -> None:
    status = follow(
        make_job(FINISHED, cleanupAfterSeconds=0), child("publish", Complete=""), child("clean", Failed="Backoff")
    )
    assert (status.phase, reason_of(status, "CleanedUp")) == ("Succeeded", "CleanupFailed")


def test_a_rejection_by_the_api_server_is_shown_and_the_phase_stays() -> None:
    found = facts(make_job(follow(make_job())))
    status = with_rejection(next_status(found).status, found.job, found.now, Reason("JobRejected", "exceeded quota"))
    assert (status.phase, reason_of(status), message_of(status)) == ("Pending", "JobRejected", "exceeded quota")
    again = facts(make_job(status), now=after(30))
    assert (
        with_rejection(next_status(again).status, again.job, again.now, Reason("JobRejected", "exceeded quota")).dump()
        == status.dump()
    )


def test_a_message_of_any_length_fits_the_schema() -> None:
    found = facts(make_job(follow(make_job())))
    status = with_rejection(next_status(found).status, found.job, found.now, Reason("JobRejected", "x" * 5000))
    assert len(message_of(status)) == 1024
    assert QLoRAJobStatus.model_validate(status.dump()) == status
