"""A QLoRAJob in every phase, with its status, and its expected view in Argo CD."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_api.spec.job import API_VERSION, KIND
from qlora_api.status import QLoRAJobStatus
from tests.support.builders import (
    ADAPTER,
    after,
    child,
    failed,
    follow,
    job_body,
    make_job,
    pod,
    progress,
    running,
    status_in,
    succeeded,
)


@dataclass(frozen=True)
class Case:
    """An object, its health, its message's start in Argo CD, and its action, if any."""

    name: str
    body: dict[str, Any]
    health: str
    message: str
    action: str | None


def _stored(status: QLoRAJobStatus | None, /, generation: int = 1, **spec: Any) -> dict[str, Any]:
    body = job_body(status.dump() if status else None, generation=generation, **spec)
    return {"apiVersion": API_VERSION, "kind": KIND, **body}


def _training() -> QLoRAJobStatus:
    record = progress(training_step=6, total_steps=12, loss=1.66971, remaining_seconds=36.0)
    return follow(make_job(status_in("train")), child("train"), running(pod("train")), progress=record)


def _preparing() -> QLoRAJobStatus:
    record = progress(step="prepare", activity="downloading 40%")
    return follow(make_job(status_in("prepare")), child("prepare"), running(pod("prepare")), progress=record)


def cases() -> Sequence[Case]:
    """Every phase, and its obstacles."""
    unknown = {"profileName": "h100"}
    ended = follow(
        make_job(status_in("prepare")),
        child("prepare", Failed="PodFailurePolicy"),
        failed("prepare", 11, "BadDataset", "row 3 is cut"),
    )
    retried = failed("train", 200, "Unreachable", "no route to the hub")
    published = [child("publish", Complete=""), succeeded("publish")]
    stopping = follow(make_job(_training(), suspend=True), child("train"), running(pod("train")))
    rejected = pod("train", phase="Failed", reason="UnexpectedAdmissionError", message="no healthy devices present")
    rejecting = [child("train", Failed="BackoffLimitExceeded"), rejected]
    return [
        Case("new", _stored(None), "Progressing", "the operator has not seen it yet", "suspend"),
        Case("pending", _stored(follow(make_job())), "Progressing", "the first Job is about to be created", "suspend"),
        Case(
            "without a profile",
            _stored(follow(make_job(scheduling=unknown)), scheduling=unknown),
            "Progressing",
            "there is no valid QLoRAProfile 'h100', which spec.scheduling.profileName names",
            "suspend",
        ),
        Case("preparing", _stored(_preparing()), "Progressing", "downloading 40%", "suspend"),
        Case(
            "queued",
            _stored(follow(make_job(status_in("train")), child("train"), pod("train"))),
            "Progressing",
            "the train Job waits for its pod to start",
            "suspend",
        ),
        Case(
            "without a pod",
            _stored(follow(make_job(status_in("train")), child("train"))),
            "Progressing",
            "Job tune-train-1 has had no pod for more than a minute",
            "suspend",
        ),
        Case("training", _stored(_training()), "Progressing", "50% 6/12, loss 1.6697, 36s left", "suspend"),
        Case(
            "retrying",
            _stored(follow(make_job(_training()), child("train"), retried)),
            "Progressing",
            "the latest attempt failed and is retried: Unreachable: no route to the hub",
            "suspend",
        ),
        Case(
            "waiting after a rejected pod",
            _stored(follow(make_job(_training()), *rejecting, now=after(-590))),
            "Progressing",
            "a node has rejected a pod, which uses no retry: Job tune-train-2 is created at 2026-01-02T11:51:01Z",
            "suspend",
        ),
        Case(
            "publishing",
            _stored(follow(make_job(status_in("publish")), child("publish"), running(pod("publish")))),
            "Progressing",
            "the adapter is being checked and published",
            "suspend",
        ),
        Case(
            "suspending",
            _stored(stopping, suspend=True),
            "Progressing",
            "the running step saves a checkpoint and stops",
            "resume",
        ),
        Case(
            "suspended",
            _stored(follow(make_job(stopping, suspend=True)), suspend=True),
            "Suspended",
            "spec.suspend is true; false resumes the job",
            "resume",
        ),
        Case(
            "resumed a moment ago",
            _stored(follow(make_job(stopping, suspend=True)), generation=2, suspend=False),
            "Progressing",
            "the operator has not seen the latest change yet",
            "suspend",
        ),
        Case(
            "succeeded",
            _stored(follow(make_job(status_in("publish")), *published)),
            "Healthy",
            f"the adapter is at {ADAPTER.uri}",
            None,
        ),
        Case(
            "suspended after its end",
            _stored(follow(make_job(status_in("publish")), *published), suspend=True),
            "Healthy",
            f"the adapter is at {ADAPTER.uri}",
            None,
        ),
        Case("failed", _stored(ended, retry={"maxFailures": 0}), "Degraded", "BadDataset: row 3 is cut", "retry"),
        Case(
            "retried a moment ago",
            _stored(ended, generation=2, retry={"request": "a"}),
            "Progressing",
            "the operator has not seen the latest change yet",
            "retry",
        ),
    ]


def changed_spec(body: dict[str, Any], action: str) -> dict[str, Any]:
    """The spec after the action: nothing else of the object may change."""
    spec = dict(body["spec"])
    if action == "retry":
        return spec | {"retry": spec.get("retry", {}) | {"request": "1970-01-01T00:00:00Z"}}
    return spec | {"suspend": action == "suspend"}
