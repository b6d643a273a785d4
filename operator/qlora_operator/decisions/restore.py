"""Decides which run a job resumes that was restored from a backup, or why it resumes none yet."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qlora_api.naming import JOB_UID_LABEL, RESTORED_ANNOTATION, VELERO_LABEL
from qlora_api.schema import replace
from qlora_api.spec.job import STEP_FIELDS, QLoRAJobSpec
from qlora_api.status import Resolved
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason
from qlora_operator.decisions.observed.parsing import controller_uid
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, uid_of_run
from qlora_operator.decisions.revision import with_data_of


@dataclass(frozen=True)
class Orphan:
    """A ControllerRevision without a controller, as a backup tool restores it."""

    name: str
    version: str
    """Its resourceVersion."""
    number: int
    resolved: Resolved


def blocked(problem: str) -> Reason:
    """Return why a restored job does not resume its run, with the alternative."""
    return Reason(
        "RestoreBlocked",
        f"the job is marked as restored, and {problem}; or remove the mark (annotation {RESTORED_ANNOTATION}, label "
        f"{VELERO_LABEL}), and the job trains from the start",
    )


def choose(job: QLoRAJob, found: Iterable[Object]) -> Orphan | Reason:
    """Return the restored revision that the job adopts, or why there is none.

    `found`: the ControllerRevisions with the label of a job of that name.
    """
    orphans = [orphan for body in found if (orphan := _orphan(job, body)) is not None]
    if not orphans:
        return blocked("the namespace has no ControllerRevision of it without an owner: restore that")
    same = [orphan for orphan in orphans if _has_spec_of(job, orphan.resolved)]
    if not same:
        return blocked(f"ControllerRevision {_names(orphans)} is of another spec: restore the job with that spec")
    if len({uid_of_run(orphan.resolved) for orphan in same}) > 1:
        return blocked(f"ControllerRevisions {_names(same)} are of several runs: delete those of all but one")
    chosen = max(same, key=lambda orphan: (orphan.number, orphan.name))
    if chosen.resolved.shared_path is not None:
        return blocked("it was a cell of a sweep, which only the sweep can train")
    return chosen


def objection(resolved: Resolved, claim: Object | None, unfinished: Sequence[str]) -> Reason | None:
    """Return why the run cannot be resumed now, or None if it can.

    `claim`: that of the run, None if it does not exist. `unfinished`: Jobs and pods of earlier jobs of this name.
    """
    if claim is None or _goes(claim):
        return blocked(f"PersistentVolumeClaim {resolved.claim_name}, which has its run, is missing: restore it")
    if unfinished:
        return blocked(f"{unfinished[0]} may still write into the folder of its run: delete it")
    return None


def _orphan(job: QLoRAJob, body: Object) -> Orphan | None:
    """Read the revision, None if it has a controller, is none of a QLoRAJob, or cannot be read."""
    metadata = body["metadata"]
    # Admission policies select by this label who may write it.
    if controller_uid(body) or JOB_UID_LABEL not in (metadata.get("labels") or {}):
        return None
    try:
        resolved = with_data_of(job, body).status.resolved
    except UnreadableJobError:
        return None
    if resolved is None or not uid_of_run(resolved):
        return None
    return Orphan(metadata["name"], metadata.get("resourceVersion", ""), body["revision"], resolved)


def _has_spec_of(job: QLoRAJob, resolved: Resolved) -> bool:
    """Whether the job has the spec that was fixed, apart from what may change.

    An earlier release may have fixed it: fields that it lacked have their defaults.
    """
    fixed = json.loads(resolved.document)["spec"]
    rest = {field: value for field, value in job.spec.dump().items() if field not in STEP_FIELDS}
    try:
        spec = QLoRAJobSpec.model_validate(rest | fixed, extra="ignore")
    except ValidationError:
        return False
    claim = None if resolved.claim_created else resolved.claim_name
    return _lasting(spec) == _lasting(job.spec) and job.spec.workspace.claim_name == claim


def _lasting(spec: QLoRAJobSpec) -> dict[str, Any]:
    return replace(spec, gate=None, resources=replace(spec.resources, memory=None)).dump()


def _goes(claim: Object) -> bool:
    """Whether the claim is deleted, or about to be with the job that it belonged to."""
    metadata = claim["metadata"]
    return "deletionTimestamp" in metadata or bool(metadata.get("ownerReferences"))


def _names(orphans: Iterable[Orphan]) -> str:
    return ", ".join(orphan.name for orphan in orphans)
