"""A new job: what its status resolves, and why it waits."""

from typing import Any

import pytest

from qlora_api.profile import Canary, Evaluation, Profile
from qlora_operator.decisions.observed.objects import Reason
from tests.support.builders import (
    DATASET,
    NAME,
    PROFILE,
    child,
    conditions_of,
    follow,
    make_job,
    message_of,
    present,
    reason_of,
    status_in,
    time,
)

LIVE = {"Suspended": "False", "Failed": "False", "Stalled": "False", "Succeeded": "Unknown"}


def test_the_first_visit_sets_every_condition_and_resolves_before_any_job_exists() -> None:
    status = follow(make_job())
    assert conditions_of(status) == LIVE | {
        "Prepared": "Unknown",
        "Progressing": "Unknown",
        "Reconciling": "True",
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
    status = follow(make_job(scheduling={"profileName": "h100"}))
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "ProfileNotFound")
    assert "'h100'" in message_of(status)
    assert "default" in message_of(status)
    assert conditions_of(status)["Stalled"] == "False"
    later = follow(make_job(status, scheduling={"profileName": "h100"}), profiles={"h100": PROFILE})
    assert later.resolved is not None


def test_a_job_waits_for_a_gpu_that_training_can_use_and_nothing_takes_it_back_once_it_has_started() -> None:
    none = Reason("GPUNotSupported", "gpu-1 with driver 570, and 580 is needed")
    status = follow(make_job(), no_gpu=none)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "GPUNotSupported")
    assert message_of(status) == none.sentence
    assert conditions_of(status)["Stalled"] == "False"
    assert follow(make_job(status)).resolved is not None
    assert follow(make_job(status_in("prepare")), child("prepare"), no_gpu=none).phase == "Preparing"


def test_a_job_with_benchmarks_has_the_image_for_them_or_waits() -> None:
    job = make_job(gate={"benchmarks": [{"task": "arc"}]})
    evaluation = Evaluation(image="trainer:evaluation", claim_name="tasks", sha256="0" * 64)
    canary = Canary(image="trainer:next", percent=100)
    able = {"default": PROFILE.model_copy(update={"evaluation": evaluation, "canary": canary})}
    resolved = present(follow(job, profiles=able).resolved)
    assert (resolved.profile.image, resolved.canary) == ("trainer:evaluation", None)
    assert present(follow(make_job(), profiles=able).resolved).profile.image == "trainer:next"
    status = follow(job)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "EvaluationNotAvailable")


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
    lenient = {"default": PROFILE.model_copy(update={"allow_job_scheduling": True})}
    assert follow(job, profiles=lenient).resolved is not None
    status = follow(job)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, "SchedulingNotAllowed")
    assert f"spec.scheduling.{field}:" in message_of(status)
    assert follow(make_job()).resolved is not None


Reserved = tuple[dict[str, Any], str, str]
"""Settings of a profile, and the reason and the name of the object that they reserve."""
CACHED: Reserved = ({"modelCache": {"claimName": "models"}}, "ClaimNotAllowed", "the claim 'models'")
SIGNED: Reserved = ({"signingKey": {"name": "signing"}}, "SecretNotAllowed", "the Secret 'signing'")
PROXY = {"httpsProxy": "http://proxy:3128", "proxySecretName": "proxy-login"}
PROXIED: Reserved = (PROXY, "SecretNotAllowed", "the Secret 'proxy-login'")
PULLED: Reserved = ({"imagePullSecrets": ["pull"]}, "SecretNotAllowed", "the Secret 'pull'")


def token(secret: str) -> dict[str, Any]:
    """A job whose model is read with a token of that Secret."""
    return {"model": {"source": "hf://a/b", "tokenSecretRef": {"name": secret, "key": "key"}}}


@pytest.mark.parametrize(
    ("reserved", "field", "spec"),
    [
        (CACHED, "workspace.claimName", {"workspace": {"claimName": "models"}}),
        (CACHED, "model.source", {"model": {"source": "pvc://models/models/c0ffee"}}),
        (CACHED, "dataset.source", {"dataset": {"source": "pvc://models/rows.jsonl"}}),
        (CACHED, "dataset.mix[1].source", {"dataset": {"mix": [DATASET, {"source": "pvc://models/rows.jsonl"}]}}),
        (CACHED, "dataset.eval.source", {"dataset": DATASET | {"eval": {"source": "pvc://models/rows.jsonl"}}}),
        (CACHED, "output.destination", {"output": {"destination": "pvc://models/models/c0ffee"}}),
        (CACHED, "lora.from.source", {"lora": {"from": {"source": "pvc://models/adapter"}}}),
        (CACHED, "output.merged.destination", {"output": {"merged": {"destination": "pvc://models/merged"}}}),
        (CACHED, "output.base.destination", {"output": {"base": {"destination": "pvc://models/base"}}}),
        # A step would send the key, or the proxy's password, to a server as if it were a token.
        (SIGNED, "model.tokenSecretRef", token("signing")),
        (SIGNED, "output.secretRef", {"output": {"destination": "s3://team/a", "secretRef": {"name": "signing"}}}),
        (
            SIGNED,
            "output.tracking.secretRef",
            {"training": {"reportTo": ["wandb"]}, "output": {"tracking": {"secretRef": {"name": "signing"}}}},
        ),
        (PROXIED, "model.tokenSecretRef", token("proxy-login")),
        (
            PULLED,
            "output.secretRef",
            {"output": {"destination": "oci://example.org/a:v1", "secretRef": {"name": "pull"}}},
        ),
    ],
)
def test_a_job_that_names_an_object_of_any_profile_waits(reserved: Reserved, field: str, spec: dict[str, Any]) -> None:
    settings, reason, name = reserved
    assert follow(make_job(**spec)).resolved is not None
    other = Profile.model_validate(PROFILE.dump() | settings)
    status = follow(make_job(**spec), profiles={"default": PROFILE, "other": other})
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, reason)
    assert message_of(status).startswith(f"spec.{field} names {name}")
    assert ("(proxySecretName)" in message_of(status)) == (reserved is PROXIED)
    assert follow(make_job(), profiles={"default": other}).resolved is not None


def test_a_profile_that_changes_later_does_not_change_the_job() -> None:
    changed = PROFILE.model_copy(update={"image": "other"})
    status = follow(make_job(status_in("train")), child("train"), profiles={"default": changed})
    assert present(status.resolved).profile == PROFILE


def test_a_job_that_is_created_suspended_is_current_and_nothing_is_fixed_yet() -> None:
    status = follow(make_job(suspend=True))
    assert (status.phase, status.resolved, status.step) == ("Suspended", None, None)
    assert {"Suspended": "True", "Reconciling": "False"}.items() <= conditions_of(status).items()
