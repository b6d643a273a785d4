"""A new job: what its status resolves, and why it waits."""

from typing import Any

import pytest

from qlora_api.profile import Profile
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


def test_a_profile_that_changes_later_does_not_change_the_job() -> None:
    changed = PROFILE.model_copy(update={"image": "other"})
    status = follow(make_job(status_in("train")), child("train"), profiles={"default": changed})
    assert present(status.resolved).profile == PROFILE


def test_a_job_that_is_created_suspended_is_current_and_nothing_is_fixed_yet() -> None:
    status = follow(make_job(suspend=True))
    assert (status.phase, status.resolved, status.step) == ("Suspended", None, None)
    assert {"Suspended": "True", "Reconciling": "False", "Ready": "True"}.items() <= conditions_of(status).items()
