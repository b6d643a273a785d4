"""Jobs of one group, as each of them is at some point of its life, for the operator's unit tests."""

from typing import Any

from qlora_api.spec.group import GroupMemberStatus, GroupStatus
from qlora_api.status import QLoRAJobStatus, StepName
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.observed.stored_job import parse_job
from tests.support.builders import NAME, UID, condition, job_body, resolved, step_status, time

CLAIM = "team-claim"
UIDS = {
    "alpha": "aaaaaaaa-0000-4000-8000-000000000000",
    NAME: UID,
    "xray": "dddddddd-0000-4000-8000-000000000000",
    "yankee": "eeeeeeee-0000-4000-8000-000000000000",
    "zulu": "ffffffff-0000-4000-8000-000000000000",
}
DOCUMENT = '{"spec":{}}'
Doing = str | None


def stored(doing: Doing, name: str = NAME, joined: GroupStatus | None = None) -> QLoRAJobStatus | None:
    """The status of a job of the group that is new, preparing, prepared, training, trained, failed or suspended."""
    if doing is None:
        return None
    fixed = resolved().model_copy(
        update={"claim_name": CLAIM, "claim_created": False, "workspace_path": f"{name}-folder", "document": DOCUMENT}
    )
    step: StepName = "prepare" if doing in ("preparing", "failed") else "publish" if doing == "trained" else "train"
    began = doing in ("preparing", "training", "trained", "failed")
    job_name = f"{name}-{step}-1"
    current = step_status(step).model_copy(update={"job_name": job_name, "job_uid": f"uid-{job_name}" if began else ""})
    if doing == "training":
        current = current.model_copy(update={"running_pod": f"uid-{job_name}-pod1", "running_pod_name": "the-pod"})
    phase = {"training": "Training", "failed": "Failed", "suspended": "Suspended"}.get(doing, "Queued")
    true = {"failed": ["Failed"], "preparing": [], "trained": ["Prepared", "Trained"]}.get(doing, ["Prepared"])
    why = condition("Succeeded", "Unknown", reason="Unschedulable") | {"message": "no node can run it"}
    return QLoRAJobStatus.model_validate(
        {
            "startTime": time(-3600),
            "phase": phase,
            "conditions": [why, *(condition(kind, "True") for kind in true)],
            "resolved": fixed.dump(),
            "step": current.dump(),
            "group": None if joined is None else joined.dump(),
        }
    )


def job(doing: Doing = "prepared", name: str = NAME, joined: GroupStatus | None = None, **spec: Any) -> QLoRAJob:
    """A job of the group `rates` of three; keywords are fields of the spec."""
    status = stored(doing, name, joined)
    whole: dict[str, Any] = {"group": {"name": "rates", "size": 3}, "workspace": {"claimName": CLAIM}} | spec
    if doing == "suspended":
        whole["suspend"] = True
    body = job_body(status.dump() if status else None, **whole)
    return parse_job(body | {"metadata": body["metadata"] | {"name": name, "uid": UIDS[name]}})


def led_by(leader: str, *members: str) -> GroupStatus:
    """What the status of a job says of its group; with members, that of the leader."""
    named = tuple(GroupMemberStatus(name=name, uid=UIDS[name]) for name in members)
    return GroupStatus(leader=leader, leader_uid=UIDS[leader], members=named or None)


ALL = led_by("alpha", "alpha", NAME, "zulu")
"""In the status of the leader."""
FOLLOWER = led_by("alpha")
"""In the status of each of the others."""


def alphas(body: dict[str, Any]) -> dict[str, Any]:
    """The same child, of the leader."""
    metadata = body["metadata"]
    owners = [owner | {"uid": owner["uid"].replace(NAME, "alpha")} for owner in metadata["ownerReferences"]]
    name, uid = (metadata[key].replace(NAME, "alpha") for key in ("name", "uid"))
    return body | {"metadata": metadata | {"name": name, "uid": uid, "ownerReferences": owners}}
