"""A job that resumes another one's run: its start, and its pods' mounts."""

import asyncio
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
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.decisions.profile_limit import held_back
from qlora_operator.kube.listing import ChildKind, ChildList, child_view
from qlora_operator.metrics.metrics import Metrics
from qlora_operator.reconcile.job import Reconciler
from qlora_operator.watch.store import Store
from tests.support.builders import (
    NAME,
    NOW,
    PROFILE,
    PROFILES,
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
    reason_of,
    resolved,
    running,
    seen,
    starts,
    status_in,
)
from tests.support.cluster.shared_pods import OWNER

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
    return parse_job(other_body(status_in("train", resolved=fixed.dump(), conditions=list(conditions))))


@pytest.mark.parametrize(
    "conditions",
    [ENDED, [condition("Succeeded", "True")], [condition("Suspended", "True")]],
    ids=["failed", "succeeded", "suspended"],
)
def test_it_starts_when_the_other_job_has_ended_or_is_suspended(conditions: list[dict[str, Any]]) -> None:
    status = follow(make_job(continues="other"), continued=other(*conditions))
    assert present(status.resolved).continued == RUN


@pytest.mark.parametrize(
    ("found", "reason", "says"),
    [
        (None, "ContinuedJobNotFound", "QLoRAJob 'other' (spec.continues) was not found: create"),
        (parse_job(other_body(None)), "ContinuedJobNotStarted", "has not started"),
        (other(), "ContinuedJobRunning", "spec.suspend: true saves a checkpoint"),
        (other(condition("Suspended", "False")), "ContinuedJobRunning", "is still running"),
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
    first = build_job(make_job(continues="other"), again.resolved, "prepare", 1)
    body = child("prepare") | {"metadata": child("prepare")["metadata"] | first["metadata"] | {"uid": "u"}}
    remembered = follow(make_job(continues="other"), body)
    assert present(remembered.resolved).continued == RUN, "the first Job remembers it before the status does"


NEWER = {"default": PROFILE.model_copy(update={"image": "example.org/newer"})}


def of_sweep(body: dict[str, Any], uid: str) -> QLoRAJob:
    owner = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRASweep", "name": "rates", "uid": uid, "controller": True}
    return parse_job(body | {"metadata": body["metadata"] | {"ownerReferences": [owner]}})


def image(status: QLoRAJobStatus) -> str:
    return present(status.resolved).profile.image


def test_the_job_that_publishes_a_sweeps_cell_uses_the_trainer_of_that_cell() -> None:
    """A release that was installed since resumes no run of the one before."""
    fixed = resolved().model_copy(update={"claim_name": "shared"})
    cell_body = other_body(status_in("publish", resolved=fixed.dump(), conditions=[condition("Succeeded", "True")]))
    cell = of_sweep(cell_body, OTHER_UID)

    def best(status: QLoRAJobStatus | None = None, **spec: Any) -> QLoRAJob:
        return of_sweep(job_body(status.dump() if status else None, continues="other", **spec), OTHER_UID)

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
    retried = follow(best(failed, retry={"request": 1}), profiles=NEWER)
    assert (retried.phase, image(retried)) == ("Pending", PROFILE.image)
    # A continued job of another kind is retried with today's trainer, and its message states it.
    for another in (parse_job(cell_body), of_sweep(cell_body, OTHER_UID.replace("f", "e"))):
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
    ("reached", "cleaned", "still_mounted"),
    [
        (("Prepared", "Trained"), True, False),
        (("Prepared", "Trained"), False, False),
        (("Prepared",), False, False),
        (("Prepared",), True, True),
        ((), False, True),
    ],
)
def test_a_retried_job_mounts_the_other_run_only_if_it_still_needs_it(
    reached: tuple[str, ...], cleaned: bool, still_mounted: bool
) -> None:
    """The other job's claim may be gone; a pod would wait for it for ever."""
    conditions = [condition(name, "True") for name in (*reached, "Failed", *(["CleanedUp"] if cleaned else []))]
    fixed = resolved().model_copy(update={"continued": RUN}).dump()
    cached = Profile.model_validate(PROFILE.dump() | {"modelCache": {"claimName": "models"}})
    step: Any = ("prepare", "train", "publish")[len(reached)]
    stored = status_in(step, resolved=fixed, conditions=conditions)

    status = follow(make_job(stored, continues="other", retry={"request": 1}), profiles={"default": cached})

    assert status.resolved is not None
    assert present(status.step).job_name == f"{NAME}-prepare-2"
    assert bool(mounts(status.resolved, "prepare")) == still_mounted


class TwoJobs:
    """Answers a waiting job's calls to the API server. `bodies`: the jobs by name."""

    def __init__(
        self,
        *bodies: Object,
        jobs: Sequence[Object] = (),
        pods: Sequence[Object] = (),
        sweep: Object | None = None,
    ) -> None:
        self.sweep = sweep
        self.bodies = {body["metadata"]["name"]: body for body in bodies}
        self.jobs, self.pods = list(jobs), list(pods)
        self.asked: list[str] = []
        self.written: Object = {}
        self.created = ""

    async def get_qlora_job(self, namespace: str, name: str) -> Object | None:
        self.asked.append(f"{namespace}/{name}")
        return self.bodies.get(name)

    async def get_sweep(self, _namespace: str, _name: str) -> Object | None:
        return self.sweep

    async def list_jobs(self, _namespace: str, _job_name: str, job_uid: str) -> ChildList:
        return self._children("jobs", self.jobs, job_uid)

    async def list_pods(self, _namespace: str, job_uid: str) -> ChildList:
        return self._children("pods", self.pods, job_uid)

    def _children(self, kind: ChildKind, bodies: Sequence[Object], job_uid: str) -> ChildList:
        views = [child_view(kind, body) for body in bodies]
        return ChildList([view for view in views if view.job_uid == job_uid], "9")

    async def create_claim(self, namespace: str, manifest: Object) -> None: ...

    async def create_job(self, namespace: str, manifest: Object) -> Object:
        self.created = str(manifest["metadata"]["name"])
        return child("prepare") | {"metadata": child("prepare")["metadata"] | dict(manifest["metadata"])}

    async def apply_status(self, job: QLoRAJob, status: Object) -> Object:
        self.written = status
        self.bodies[job.name] = dict(self.bodies[job.name]) | {"status": status}
        return self.bodies[job.name]

    async def create_event(self, namespace: str, manifest: Object) -> None: ...


def test_the_operator_reads_it_in_the_jobs_namespace_every_15_seconds() -> None:
    cluster, store = TwoJobs(job_body(continues="other"), other_body(None) | {"status": {"step": "?"}}), Store()
    store.job_changed(cluster.bodies[NAME], created=True)
    reconciler = Reconciler(cluster, PROFILES, None, Metrics(), lambda: NOW, starts(), store)  # type: ignore[arg-type]
    assert asyncio.run(reconciler.reconcile(("team", NAME))) == 15
    assert set(cluster.asked) == {"team/other"}
    reasons = {each["type"]: each["reason"] for each in cluster.written["conditions"]}
    assert reasons["Succeeded"] == "ContinuedJobNotFound", "nor is one that cannot be read an end of the operator"


def owned(body: dict[str, Any], name: str, uid: str) -> dict[str, Any]:
    """A Job or a pod as one of the QLoRAJob of that name and UID."""
    found: dict[str, Any] = json.loads(json.dumps(body).replace(f"{NAME}-train", f"{name}-train").replace(UID, uid))
    return found


def one_pass(cluster: TwoJobs) -> str:
    """The message of Succeeded after a pass, or the name of the job's first Job."""
    store = Store()
    store.job_changed(cluster.bodies[NAME], created=True)
    reconciler = Reconciler(cluster, PROFILES, None, Metrics(), lambda: NOW, starts(), store)  # type: ignore[arg-type]
    asyncio.run(reconciler.reconcile(("team", NAME)))
    if cluster.created:
        return cluster.created
    (why,) = [each for each in cluster.written["conditions"] if each["type"] == "Succeeded"]
    return f"{why['reason']}: {why['message']}"


def stored_other(*conditions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    fixed = resolved().model_copy(update={"claim_name": "shared", "workspace_path": "other-ffffffff"})
    return other_body(status_in("train", resolved=fixed.dump(), conditions=list(conditions), **fields))


def test_it_waits_for_the_train_pod_of_a_failed_job_to_save_its_checkpoint() -> None:
    still = owned(running(pod("train")), "other", OTHER_UID)
    waiting = one_pass(TwoJobs(job_body(continues="other"), stored_other(*ENDED), pods=[still]))
    assert waiting.startswith("ContinuedJobRunning: pod other-train-1-pod1 may still save a checkpoint")
    job = owned(child("train"), "other", OTHER_UID)
    waiting = one_pass(TwoJobs(job_body(continues="other"), stored_other(*ENDED), jobs=[job]))
    assert waiting.startswith("ContinuedJobRunning: Job other-train-1 may still save a checkpoint"), "it may make a pod"
    cluster = TwoJobs(
        job_body(continues="other"),
        stored_other(*ENDED),
        jobs=[owned(child("train", Failed="x"), "other", OTHER_UID)],
        pods=[owned(ended(pod("train"), 143), "other", OTHER_UID)],
    )
    assert one_pass(cluster) == f"{NAME}-prepare-1"


def test_it_waits_for_the_pod_of_a_sweep_that_trains_a_suspended_cell_on() -> None:
    cell = stored_other(condition("Suspended", "True"))
    marks = {"annotations": {CELLS_IN_POD_ANNOTATION: "2"}, "ownerReferences": [OWNER]}
    cell["metadata"] |= marks

    def started(*cells: str) -> str:
        step = {"name": "train", "jobName": "rates-p00-train-1", "jobUid": "uid", "attempt": 1}
        sweep = {"metadata": {}, "status": {"pods": [{"number": 0, "step": step, "cells": list(cells)}]}}
        return one_pass(TwoJobs(job_body(continues="other"), cell, sweep=sweep))

    assert started("other", "rates-01").startswith(
        "ContinuedJobRunning: Job rates-p00-train-1 of QLoRASweep rates may still save"
    )
    assert started() == f"{NAME}-prepare-1"
