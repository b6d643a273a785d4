"""A job that resumes another one's run: its start, and its pods' mounts."""

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest

from qlora_api.contract import needed_contract
from qlora_api.naming import CELLS_IN_POD_ANNOTATION
from qlora_api.profile import Profile, SigningKey
from qlora_api.status import ContinuedRun, QLoRAJobStatus, Resolved
from qlora_operator.decisions.manifests.objects import build_job
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.profile_limit import held_back
from qlora_operator.kube.client import Cluster
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.watch.store import Store
from tests.support.builders import (
    NAME,
    NOW,
    PROFILE,
    PROFILES,
    REVISIONS,
    UID,
    after,
    child,
    condition,
    ended,
    facts,
    follow,
    job_body,
    make_job,
    message_of,
    plan_of,
    pod,
    present,
    read_job,
    reason_of,
    resolved,
    revision_body,
    running,
    seen,
    starts,
    status_in,
    time,
)
from tests.support.cluster.shared_pods import OWNER
from tests.unit.qlora_operator.simulation.agenda import Agenda
from tests.unit.qlora_operator.simulation.api_server import ApiServer

OTHER_UID = "ffffffff-0000-4000-8000-000000000000"
ENDED = [condition("Failed", "True", reason="DeadlineExceeded")]
RUN = ContinuedRun(job="other", uid=OTHER_UID, claim_name="shared", workspace_path="other-ffffffff")


def other_body(status: QLoRAJobStatus | None, **spec: Any) -> dict[str, Any]:
    """The other job as stored, on a claim of its choice."""
    body = job_body(status.dump() if status else None, **spec)
    return body | {"metadata": body["metadata"] | {"name": "other", "uid": OTHER_UID}}


def other(*conditions: dict[str, Any], **changes: str) -> QLoRAJob:
    """The other job with its resolved spec, in a step."""
    fixed = resolved().model_copy(update={"claim_name": "shared", "workspace_path": "other-ffffffff", **changes})
    return read_job(other_body(status_in("train", resolved=fixed.dump(), conditions=list(conditions))))


@pytest.mark.parametrize(
    "conditions",
    [ENDED, [condition("Succeeded", "True")], [condition("Suspended", "True")]],
    ids=["failed", "succeeded", "suspended"],
)
def test_it_starts_when_the_other_job_has_ended_or_is_suspended(conditions: list[dict[str, Any]]) -> None:
    status = follow(make_job(continues="other"), continued=other(*conditions))
    assert present(status.resolved).continued == RUN


def without_claim() -> QLoRAJob:
    found = other(condition("Succeeded", "True"))
    return dataclasses.replace(found, status=found.status.model_copy(update={"claim_deletion_time": time()}))


@pytest.mark.parametrize(
    ("found", "reason", "says"),
    [
        (
            None,
            "ContinuedJobNotFound",
            "QLoRAJob 'other' (spec.continues) was not found, or has another",
        ),
        (read_job(other_body(None)), "ContinuedJobNotStarted", "has not started"),
        (other(), "ContinuedJobRunning", "spec.suspend: true saves a checkpoint"),
        (other(condition("Suspended", "False")), "ContinuedJobRunning", "is still running"),
        (without_claim(), "ContinuedJobDeletedItsClaim", "create this job again with its adapter in spec.lora.from"),
    ],
)
def test_until_then_it_waits_reports_the_reason_and_is_requeued(found: QLoRAJob | None, reason: str, says: str) -> None:
    job = make_job(continues="other")
    status = follow(job, continued=found)
    assert (status.phase, status.resolved, reason_of(status)) == ("Pending", None, reason)
    assert says in message_of(status)
    planned = plan_of(job, status, seen(), NOW)
    assert (planned.actions, planned.look_again) == ((), after(15))


def test_a_suspended_job_does_not_wait_for_the_other_job() -> None:
    job = make_job(continues="other", suspend=True)
    assert plan_of(job, follow(job), seen(), NOW).look_again is None


def test_it_takes_no_place_from_others_while_it_waits() -> None:
    limited = {"default": Profile.model_validate(PROFILE.dump() | {"limits": {"jobs": 1}})}
    waiting = facts(make_job(continues="other"), continued=other(), profiles=limited, jobs_of_profile=1)
    assert held_back(waiting) is None
    ready = facts(make_job(continues="other"), continued=other(*ENDED), profiles=limited, jobs_of_profile=1)
    assert held_back(ready) is not None


def test_a_run_on_the_claim_of_a_cache_is_not_mounted() -> None:
    cached = Profile.model_validate(PROFILE.dump() | {"modelCache": {"claimName": "shared"}})
    status = follow(
        make_job(continues="other"), continued=other(*ENDED), profiles={"default": PROFILE, "cached": cached}
    )
    assert (status.resolved, reason_of(status)) == (None, "ClaimNotAllowed")
    assert message_of(status).startswith("spec.continues names the claim 'shared'")


def test_the_resolved_run_stays_after_deletions_and_changes_of_the_profile() -> None:
    started = follow(make_job(continues="other"), continued=other(*ENDED))
    changed = {"default": PROFILE.model_copy(update={"image": "example.org/mended"})}
    again = follow(make_job(started, continues="other"), profiles=changed)
    assert again.resolved is not None
    assert again.resolved.continued == RUN
    assert again.resolved.profile.image == "example.org/mended"


NEWER = {"default": PROFILE.model_copy(update={"image": "example.org/newer"})}


def of_sweep(body: dict[str, Any], uid: str) -> QLoRAJob:
    owner = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": "rates", "uid": uid, "controller": True}
    return read_job(body | {"metadata": body["metadata"] | {"ownerReferences": [owner]}})


def image(status: QLoRAJobStatus) -> str:
    return present(status.resolved).profile.image


def test_the_job_that_publishes_a_sweeps_cell_uses_the_trainer_of_that_cell() -> None:
    """A release that was installed since resumes no run of the one before."""
    fixed = resolved().model_copy(update={"claim_name": "shared"})
    cell_body = other_body(status_in("publish", resolved=fixed.dump(), conditions=[condition("Succeeded", "True")]))
    cell = of_sweep(cell_body, OTHER_UID)

    def best(status: QLoRAJobStatus | None = None, **spec: Any) -> QLoRAJob:
        body = job_body(status.dump() if status else None, continues="other", **spec)
        if status is not None and status.resolved is not None:
            REVISIONS[str(status.current_revision)] = status.resolved
        return of_sweep(body, OTHER_UID)

    started = follow(best(), continued=cell, profiles=NEWER)
    assert image(started) == PROFILE.image
    assert present(started.resolved).contract_version == needed_contract(1)
    # If that trainer does not sign, it is not to publish for a profile that has got a key since.
    signing = {"default": PROFILE.model_copy(update={"signing_key": SigningKey(name="signing")})}
    signed = follow(best(), continued=cell, profiles=signing)
    assert present(signed.resolved).contract_version == needed_contract(1, signed=True)
    # The cell is read no more: its first Job could not be created yet, and the profile has changed again.
    assert image(follow(best(started), profiles=NEWER)) == PROFILE.image
    # Its first failure is likely in prepare, which first uses the credentials.
    ended = [condition("Failed", "True", reason="BadConfiguration"), condition("Succeeded", "False")]
    failed = status_in("prepare", resolved=resolved().dump(), conditions=ended)
    retried = follow(best(failed, retry={"request": "a"}), profiles=NEWER)
    assert (retried.phase, image(retried)) == ("Pending", PROFILE.image)
    # A continued job of another kind is retried with today's trainer, and its message states it.
    for another in (read_job(cell_body), of_sweep(cell_body, OTHER_UID.replace("f", "e"))):
        assert image(follow(best(), continued=another, profiles=NEWER)) == "example.org/newer"
    assert image(follow(make_job(continues="other"), continued=cell, profiles=NEWER)) == "example.org/newer"


def mounts(fixed: Resolved, step: Any) -> list[dict[str, Any]]:
    pod = build_job(make_job(continues="other"), fixed, step, 2)["spec"]["template"]["spec"]
    claims = {each["name"]: each.get("persistentVolumeClaim", {}).get("claimName") for each in pod["volumes"]}
    assert len(claims) == len(pod["volumes"])
    found = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["mountPath"] == "/continued"]
    return [{**mount, "name": claims[mount["name"]]} for mount in found]


def test_prepare_alone_sees_the_folder_of_the_other_run_and_cannot_write_to_it() -> None:
    fixed = resolved().model_copy(update={"continued": RUN})
    expected = {"name": "shared", "mountPath": "/continued", "readOnly": True, "subPath": "other-ffffffff"}
    assert mounts(fixed, "prepare") == [expected]
    for step in ("train", "publish", "clean"):
        assert mounts(fixed, step) == []
    assert mounts(resolved(), "prepare") == []


def test_a_claim_that_both_runs_are_on_is_one_volume_of_the_pod() -> None:
    own = RUN.model_copy(update={"claim_name": f"{NAME}-0a1b2c3d"})
    (mount,) = mounts(resolved().model_copy(update={"continued": own}), "prepare")
    assert mount["name"] == own.claim_name


def test_an_older_trainer_rejects_a_continued_job() -> None:
    status = follow(make_job(continues="other"), continued=other(*ENDED))
    assert '"continues":"other"' in (present(status.resolved).document or "")
    assert "continues" not in (present(follow(make_job()).resolved).document or "")


@pytest.mark.parametrize(
    ("step", "cleaned", "still_mounted"),
    [
        ("publish", True, False),
        ("publish", False, False),
        ("train", False, False),
        ("train", True, True),
        ("prepare", False, True),
    ],
)
def test_a_retried_job_mounts_the_other_run_only_if_it_still_needs_it(
    step: Any, cleaned: bool, still_mounted: bool
) -> None:
    """The other job's claim may be gone; a pod would wait for it for ever."""
    prepared = [] if step == "prepare" else ["Prepared"]
    conditions = [condition(name, "True") for name in (*prepared, "Failed", *(["CleanedUp"] if cleaned else []))]
    fixed = resolved().model_copy(update={"continued": RUN}).dump()
    cached = Profile.model_validate(PROFILE.dump() | {"modelCache": {"claimName": "models"}})
    stored = status_in(step, resolved=fixed, conditions=conditions)

    status = follow(make_job(stored, continues="other", retry={"request": "a"}), profiles={"default": cached})

    assert status.resolved is not None
    assert present(status.step).job_name == f"{NAME}-prepare-2"
    assert bool(mounts(status.resolved, "prepare")) == still_mounted


def one_pass(
    other: Object, *, jobs: Sequence[Object] = (), pods: Sequence[Object] = (), sweeps: Sequence[Object] = ()
) -> tuple[float | None, str]:
    """After a pass: the seconds until the next, and the message of Succeeded, or the name of the job's first Job."""
    api, store = ApiServer(Agenda(0)), Store()
    stored: dict[str, Sequence[Object]] = {"jobs": jobs, "pods": pods, "qlorasweeps": sweeps}
    for kind, bodies in stored.items():
        api.put(kind, *map(dict, bodies))
    api.put("qlorajobs", job_body(continues="other"), dict(other))
    for name, fixed in REVISIONS.items():
        api.put("controllerrevisions", owned(revision_body(fixed, name), "other", OTHER_UID))
    store.job_changed(api.objects["qlorajobs"][NAME], created=True)
    reconciler = Reconciler(Cluster(api), PROFILES, None, Metrics(), lambda: NOW, starts(), store)
    again = asyncio.run(reconciler.reconcile(("team", NAME)))
    if created := api.owned("jobs", UID):
        return again, str(created[0]["metadata"]["name"])
    conditions = api.objects["qlorajobs"][NAME]["status"]["conditions"]
    (why,) = [each for each in conditions if each["type"] == "Succeeded"]
    return again, f"{why['reason']}: {why['message']}"


def test_the_operator_reads_it_every_15_seconds_even_if_it_cannot_be_read() -> None:
    again, why = one_pass(other_body(None) | {"status": {"step": "?"}})
    assert again == 15
    assert why.startswith("ContinuedJobNotFound")


def owned(body: dict[str, Any], name: str, uid: str) -> dict[str, Any]:
    """A Job or a pod as one of the QLoRAJob of that name and UID."""
    found: dict[str, Any] = json.loads(json.dumps(body).replace(f"{NAME}-train", f"{name}-train").replace(UID, uid))
    return found


def stored_other(*conditions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    fixed = resolved().model_copy(update={"claim_name": "shared", "workspace_path": "other-ffffffff"})
    return other_body(status_in("train", resolved=fixed.dump(), conditions=list(conditions), **fields))


def test_it_waits_for_the_train_pod_of_a_failed_job_to_save_its_checkpoint() -> None:
    still = owned(running(pod("train")), "other", OTHER_UID)
    _, why = one_pass(stored_other(*ENDED), pods=[still])
    assert why.startswith("ContinuedJobRunning: pod other-train-1-pod1 may still save a checkpoint")
    _, why = one_pass(stored_other(*ENDED), jobs=[owned(child("train"), "other", OTHER_UID)])
    assert why.startswith("ContinuedJobRunning: Job other-train-1 may still save a checkpoint"), "it may make a pod"
    failed_job = owned(child("train", Failed="x"), "other", OTHER_UID)
    stopped = owned(ended(pod("train"), 143), "other", OTHER_UID)
    assert one_pass(stored_other(*ENDED), jobs=[failed_job], pods=[stopped])[1] == f"{NAME}-prepare-1"


def test_it_waits_for_the_pod_of_a_sweep_that_trains_a_suspended_cell_on() -> None:
    cell = stored_other(condition("Suspended", "True"))
    cell["metadata"] |= {"annotations": {CELLS_IN_POD_ANNOTATION: "2"}, "ownerReferences": [OWNER]}

    def started(*cells: str) -> str:
        step = {"name": "train", "jobName": "rates-p00-train-1", "jobUid": "uid", "attempt": 1}
        status = {"pods": [{"number": 0, "step": step, "cells": list(cells)}]}
        return one_pass(cell, sweeps=[{"metadata": {"name": "rates"}, "status": status}])[1]

    assert started("other", "rates-01").startswith(
        "ContinuedJobRunning: Job rates-p00-train-1 of QLoRASweep rates may still save"
    )
    assert started() == f"{NAME}-prepare-1"
