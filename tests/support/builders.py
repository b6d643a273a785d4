"""Objects as the API server returns them, and a fixed clock, for the operator's unit tests."""

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from qlora_api.artifact_status import AdapterStatus, BaseStatus, GateStatus
from qlora_api.contract import ProgressRecord, ResultRecord, encode_record, needed_contract
from qlora_api.naming import (
    JOB_LABEL,
    JOB_UID_LABEL,
    STEP_LABEL,
    workspace_claim_name,
    workspace_folder,
)
from qlora_api.profile import Profile
from qlora_api.status import DatasetStatus, MemoryStatus, QLoRAJobStatus, Resolved, StepName, StepStatus
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed, QLoRAJob, format_time
from qlora_operator.decisions.observed.parsing import observe, profile_in_use
from qlora_operator.decisions.observed.stored_job import parse_job, with_resolved
from qlora_operator.decisions.plan import Plan, plan
from qlora_operator.decisions.revision import build_revision
from qlora_operator.decisions.status import Decision, next_status
from qlora_operator.reconcile.profile_limit import Starts

T = TypeVar("T")
NOW = datetime(2026, 1, 2, 12, 0, 0, tzinfo=UTC)
NAME = "tune"
UID = "0a1b2c3d-0000-4000-8000-000000000000"
PROFILE = Profile.model_validate({"image": "example.org/qlora-trainer@sha256:0", "gpuResource": "nvidia.com/gpu"})
PROFILES = {"default": PROFILE}
REVISION = f"{NAME}-1-0123456789"
DOCUMENT = f'{{"metadata":{{"uid":"{UID}"}},"spec":{{"model":{{"source":"hf://org/model"}},"resources":{{}}}}}}'

MODEL = {"source": "hf://org/model"}
DATASET = {"source": "hf://org/rows"}
MEMORY = MemoryStatus(estimate_bytes=10, low_bytes=9, high_bytes=11, verdict="unknown")
FOUND = DatasetStatus(format="chat", rows=12, used_rows=10)
BASE = BaseStatus(origin="cache", bytes_fetched=17, seconds=3)
ADAPTER = AdapterStatus(
    uri="pvc://tune-0a1b2c3d/tune-0a1b2c3d/adapter",
    sha256="a" * 64,
    size_bytes=7,
    base_model="hf://org/model",
    base_revision="c0ffee",
    rank=48,
    served_rank=64,
    quantization="nf4",
)
JUDGED = GateStatus(passed=False, adapter_sha256="0" * 64, eval_loss=1.25, initial_eval_loss=1.5, eval_tokens=90)
FACTS: dict[StepName, dict[str, Any]] = {
    "prepare": {"model_revision": "c0ffee", "memory": MEMORY, "dataset": FOUND, "base": BASE},
    "train": {"training_step": 10, "total_steps": 10, "loss": 1.234567, "peak_memory_bytes": 99},
    "publish": {"adapter": ADAPTER},
}


def after(seconds: float) -> datetime:
    """So many seconds after NOW."""
    return NOW + timedelta(seconds=seconds)


def time(seconds: float = 0) -> str:
    """The timestamp of so many seconds after NOW."""
    return format_time(after(seconds))


def job_body(status: Mapping[str, Any] | None = None, /, generation: int = 1, **spec: Any) -> dict[str, Any]:
    """A QLoRAJob as stored; keywords are fields of the spec."""
    return {
        "metadata": {
            "namespace": "team",
            "name": NAME,
            "uid": UID,
            "generation": generation,
            "resourceVersion": "7",
        },
        "spec": {"model": MODEL, "dataset": DATASET} | spec,
        "status": status if status is not None else {"observedGeneration": -1},
    }


def profile_body(name: str = "default", /, generation: int = 1, version: int = 7, **spec: Any) -> dict[str, Any]:
    """A QLoRAProfile as stored; keywords are fields of the spec."""
    metadata = {"name": name, "uid": f"uid-{name}", "generation": generation, "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": {"image": PROFILE.image} | spec}


def make_job(status: QLoRAJobStatus | None = None, /, generation: int = 1, **spec: Any) -> QLoRAJob:
    """The parsed job, with that stored status."""
    job = parse_job(job_body(status.dump() if status else None, generation=generation, **spec))
    fixed = status.resolved if status is not None else None
    return job if fixed is None else with_resolved(job, job.status.current_revision or revision_of(fixed), fixed)


def stored_again(status: QLoRAJobStatus) -> QLoRAJobStatus:
    """Return the status as the next pass reads it, with its revision."""
    return QLoRAJobStatus.model_validate(status.dump()).model_copy(update={"resolved": status.resolved})


def read_job(body: dict[str, Any]) -> QLoRAJob:
    """Return the stored QLoRAJob with what its revision has fixed."""
    job = parse_job(body)
    name = job.status.current_revision
    return job if name is None else with_resolved(job, name, REVISIONS[name])


def resolved(profile: Profile = PROFILE) -> Resolved:
    """Values that are fixed before the first pod."""
    return Resolved(
        contract_version=needed_contract(1),
        profile=profile,
        claim_name=workspace_claim_name(NAME, UID),
        claim_created=True,
        workspace_path=workspace_folder(NAME, UID),
        document=DOCUMENT,
    )


REVISIONS = {REVISION: resolved()}
"""What the revisions of all tests have fixed, by their names, which are of the content."""


def revision_of(fixed: Resolved) -> str:
    """Return the name of the revision with these values."""
    known = next((name for name, values in REVISIONS.items() if values == fixed), f"{NAME}-1-{len(REVISIONS):010}")
    REVISIONS[known] = fixed
    return known


def revision_body(fixed: Resolved | None = None, name: str = REVISION) -> dict[str, Any]:
    """The job's ControllerRevision as stored."""
    fixed = resolved() if fixed is None else fixed
    return build_revision(make_job(), name, fixed)


def step_status(step: StepName, attempt: int = 1, **fields: Any) -> StepStatus:
    """The step whose Job exists."""
    name = f"{NAME}-{step}-{attempt}"
    return StepStatus.model_validate(
        {"name": step, "jobName": name, "jobUid": f"uid-{name}", "attempt": attempt} | fields
    )


def status_in(step: StepName, attempt: int = 1, /, **fields: Any) -> QLoRAJobStatus:
    """Return the status of a job that has reached `step` and has the Job of this step."""
    conditions = [condition("Prepared", "True")] if step in ("train", "publish") else []
    start: dict[str, Any] = {
        "startTime": time(-3600),
        "conditions": conditions,
        "step": step_status(step, attempt).dump(),
    }
    fixed = Resolved.model_validate(fields.get("resolved", resolved()))
    workspace = {"claimName": fixed.claim_name, "path": fixed.workspace_path}
    start |= {"currentRevision": revision_of(fixed), "resolved": fixed, "workspace": workspace}
    return QLoRAJobStatus.model_validate(start | fields)


def condition(kind: str, value: str, at: float = -60, reason: str = "Test") -> dict[str, Any]:
    """A condition as stored."""
    return {"type": kind, "status": value, "reason": reason, "message": "", "lastTransitionTime": time(at)}


def child(step: StepName, attempt: int = 1, *, owner: str = UID, created: float = -600, **true: str) -> dict[str, Any]:
    """A batch/v1 Job; keywords are conditions that hold, with their reason."""
    name = f"{NAME}-{step}-{attempt}"
    conditions = [{"type": kind, "status": "True", "reason": reason, "message": "why"} for kind, reason in true.items()]
    return {
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-{name}",
            "resourceVersion": "5",
            "creationTimestamp": time(created),
            "labels": {JOB_LABEL: NAME, JOB_UID_LABEL: UID, STEP_LABEL: step},
            "ownerReferences": [{"kind": "QLoRAJob", "name": NAME, "uid": owner, "controller": True}],
        },
        "status": {"conditions": conditions},
    }


def pod(step: StepName, attempt: int = 1, number: int = 1, **status: Any) -> dict[str, Any]:
    """A pod of that Job, pending unless `status` is given."""
    owner = f"{NAME}-{step}-{attempt}"
    return {
        "metadata": {
            "name": f"{owner}-pod{number}",
            "namespace": "team",
            "labels": {JOB_LABEL: NAME, JOB_UID_LABEL: UID, STEP_LABEL: step},
            "resourceVersion": "6",
            "uid": f"uid-{owner}-pod{number}",
            "creationTimestamp": time(-600 + number),
            "ownerReferences": [{"kind": "Job", "name": owner, "uid": f"uid-{owner}", "controller": True}],
        },
        "status": {"phase": "Pending"} | status,
    }


def node(number: int, attempt: int = 1, *, created: float | None = None) -> dict[str, Any]:
    """The train pod of that node."""
    body = pod("train", attempt, number + 1)
    index = {"annotations": {"batch.kubernetes.io/job-completion-index": str(number)}}
    when = (
        {} if created is None else {"creationTimestamp": time(created), "uid": f"{body['metadata']['uid']}-{created}"}
    )
    return body | {"metadata": body["metadata"] | index | when}


def running(body: dict[str, Any], since: float = -60) -> dict[str, Any]:
    """The pod while its trainer runs."""
    return _with_state(body, "Running", {"running": {"startedAt": time(since)}})


def waiting(body: dict[str, Any], reason: str, message: str = "") -> dict[str, Any]:
    """The pod while its trainer cannot start."""
    return _with_state(body, "Pending", {"waiting": {"reason": reason, "message": message}})


def ended(
    body: dict[str, Any], code: int, message: str = "", *, reason: str = "", start: float = -60, end: float = -10
) -> dict[str, Any]:
    """The pod after its trainer has ended."""
    terminated = {
        "exitCode": code,
        "reason": reason or ("Completed" if code == 0 else "Error"),
        "message": message,
        "startedAt": time(start),
        "finishedAt": time(end),
    }
    return _with_state(body, "Failed" if code else "Succeeded", {"terminated": terminated})


def _with_state(body: dict[str, Any], phase: str, state: dict[str, Any]) -> dict[str, Any]:
    return body | {
        "status": body["status"] | {"phase": phase, "containerStatuses": [{"name": "trainer", "state": state}]}
    }


def deleted(body: dict[str, Any], requested: float, grace: int = 120) -> dict[str, Any]:
    """The pod after a request for its deletion."""
    marks = {"deletionTimestamp": time(requested + grace), "deletionGracePeriodSeconds": grace}
    return body | {"metadata": body["metadata"] | marks}


def result(body: dict[str, Any], step: StepName, code: int = 0, **fields: Any) -> str:
    """The termination message of a step in that pod."""
    outcome = {0: "succeeded", 143: "interrupted"}.get(code, "failed")
    record: dict[str, Any] = {
        "job_uid": UID,
        "pod_uid": body["metadata"]["uid"],
        "step": step,
        "time": time(),
        "outcome": outcome,
        "exit_code": code,
        "reason": "Done",
    }
    return encode_record(ResultRecord(**(record | fields)))


def succeeded(step: StepName, attempt: int = 1) -> dict[str, Any]:
    """The pod of a step that ended well, with its record."""
    body = pod(step, attempt)
    return ended(body, 0, result(body, step, **FACTS[step]))


def failed(step: StepName, code: int, reason: str, message: str, number: int = 1, **found: Any) -> dict[str, Any]:
    """The pod of a step that ended badly, with its record and results."""
    body = pod(step, 1, number)
    return ended(body, code, result(body, step, code, reason=reason, message=message, **found))


def progress(**fields: Any) -> ProgressRecord:
    """A progress record of the training pod."""
    base = {"job_uid": UID, "pod_uid": f"uid-{NAME}-train-1-pod1", "step": "train", "time": time()}
    return ProgressRecord.model_validate(base | fields)


def seen(*bodies: dict[str, Any]) -> Observed:
    """Jobs, which the QLoRAJob controls, and pods, which it does not."""
    jobs = [body for body in bodies if body["metadata"]["ownerReferences"][0]["kind"] == "QLoRAJob"]
    return observe(UID, jobs, [body for body in bodies if body not in jobs])


def facts(job: QLoRAJob, *bodies: dict[str, Any], now: datetime = NOW, **fields: Any) -> Facts:
    """Everything that a status depends on."""
    default: dict[str, Any] = {"job": job, "observed": seen(*bodies), "profiles": PROFILES, "now": now}
    return Facts(**(default | fields))


def follow(job: QLoRAJob, *bodies: dict[str, Any], **fields: Any) -> QLoRAJobStatus:
    """The status that follows from the seen objects."""
    return next_status(facts(job, *bodies, **fields)).status


def plan_of(job: QLoRAJob, status: QLoRAJobStatus, observed: Observed, now: datetime = NOW) -> Plan:
    """The plan for the job with this next status."""
    return plan(job, Decision.from_status(job, status, observed), observed, now)


def conditions_of(status: QLoRAJobStatus) -> dict[str, str]:
    """Value by type."""
    return {entry.type: entry.status for entry in status.conditions}


def present(value: T | None) -> T:
    """The value, which must be there."""
    assert value is not None
    return value


def reason_of(status: QLoRAJobStatus, kind: str = "Succeeded") -> str:
    """Reason of one condition."""
    return next(entry.reason for entry in status.conditions if entry.type == kind)


def message_of(status: QLoRAJobStatus, kind: str = "Succeeded") -> str:
    """Message of one condition."""
    return next(entry.message for entry in status.conditions if entry.type == kind)


def to_json(value: object) -> str:
    """JSON for a search in it."""
    return json.dumps(value)


def starts(*bodies: dict[str, Any], woken: list[Any] | None = None) -> Starts:
    """Count these QLoRAJobs at a fixed time. `woken` gets the keys to requeue."""

    async def pages(_namespace: str) -> AsyncIterator[list[str | None]]:
        for body in bodies:
            yield [profile_in_use(body)]

    return Starts(pages, ([] if woken is None else woken).append, lambda: 0.0)


class _Jump(selectors.SelectSelector):
    """Does not wait for time to pass, but moves the loop's clock on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits for ever")
        if not ready:
            self.now += timeout or 0
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now
