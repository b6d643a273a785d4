"""Decides which run a restored job resumes, or why it resumes none yet."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from qlora_api.naming import JOB_UID_LABEL, RESTORED_ANNOTATION, VELERO_LABEL
from qlora_api.schema import replace
from qlora_api.spec.job import KIND, STEP_FIELDS, QLoRAJobSpec
from qlora_api.status import Resolved
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason
from qlora_operator.decisions.observed.parsing import controller_uid, is_of_kind
from qlora_operator.decisions.observed.stored_job import uid_of_run
from qlora_operator.decisions.revision import with_data_of


@dataclass(frozen=True)
class RestoredRevision:
    """A ControllerRevision of a QLoRAJob without a controller."""

    name: str
    version: str
    """Its resourceVersion."""
    number: int
    resolved: Resolved
    spec: Object
    """The part of the job's spec that it has fixed."""


def restore_blocked(job: QLoRAJob, problem: str) -> Reason:
    """Return why a restored job does not resume its run, with the alternative."""
    instead = "remove the mark" if job.status.current_revision is None else "create the job without status and mark"
    mark = f"annotation {RESTORED_ANNOTATION}, label {VELERO_LABEL}"
    sentence = f"the job is marked as restored, and {problem}; or {instead} ({mark}), and it trains from the start"
    return Reason("RestoreBlocked", sentence)


def revision_to_adopt(job: QLoRAJob, found: Iterable[Object]) -> RestoredRevision | Reason:
    """Return the restored revision that the job adopts, or why there is none.

    `found`: the ControllerRevisions with the label of a job of that name.
    """
    revisions = [revision for body in found if (revision := _restored(job, body)) is not None]
    if not revisions:
        return restore_blocked(job, "the namespace has no ControllerRevision of it without an owner: restore that")
    fitting = [revision for revision in revisions if _has_spec_of(job, revision)]
    if not fitting:
        names = _names(revisions)
        return restore_blocked(job, f"ControllerRevision {names} is of another spec: restore the job with that spec")
    if len({uid_of_run(revision.resolved) for revision in fitting}) > 1:
        names = _names(fitting)
        return restore_blocked(job, f"ControllerRevisions {names} are of several runs: delete those of all but one")
    newest = max(fitting, key=lambda revision: (revision.number, revision.name))
    if newest.resolved.shared_path is not None:
        return restore_blocked(job, "it was a cell of a sweep, which only the sweep can train")
    return newest


def objection_to_adoption(
    job: QLoRAJob, resolved: Resolved, claim: Object | None, unfinished: Sequence[str]
) -> Reason | None:
    """Return why the run cannot be resumed now, or None if it can.

    `claim`: that of the run, None if it does not exist. `unfinished`: Jobs and pods of earlier jobs of this name.
    """
    name, uid = resolved.claim_name, uid_of_run(resolved)
    if claim is None or _is_going(claim):
        return restore_blocked(job, f"PersistentVolumeClaim {name}, which has its run, is missing: restore it")
    if resolved.claim_created and (claim["metadata"].get("labels") or {}).get(JOB_UID_LABEL) != uid:
        return restore_blocked(job, f"PersistentVolumeClaim {name} lacks the label {JOB_UID_LABEL}: set it to {uid}")
    if unfinished:
        return restore_blocked(job, f"{unfinished[0]} may still write into the folder of its run: delete it")
    return None


def _restored(job: QLoRAJob, body: Object) -> RestoredRevision | None:
    """Read the revision, None if it has a controller or cannot be read."""
    metadata = body["metadata"]
    # Admission policies select by this label who may write it.
    if controller_uid(body) or JOB_UID_LABEL not in (metadata.get("labels") or {}):
        return None
    try:
        resolved = with_data_of(job, body).status.resolved
        if resolved is None or not uid_of_run(resolved):
            return None
        spec = json.loads(resolved.document)["spec"]
    except (ValueError, KeyError):
        return None
    return RestoredRevision(metadata["name"], metadata.get("resourceVersion", ""), body["revision"], resolved, spec)


def _has_spec_of(job: QLoRAJob, revision: RestoredRevision) -> bool:
    """Whether the job has the spec that was fixed, apart from what may change.

    An earlier release may have fixed it: fields that it lacked have their defaults.
    """
    rest = {field: value for field, value in job.spec.dump().items() if field not in STEP_FIELDS}
    try:
        spec = QLoRAJobSpec.model_validate(rest | dict(revision.spec), extra="ignore")
    except ValidationError:
        return False
    claim = None if revision.resolved.claim_created else revision.resolved.claim_name
    if job.spec.resources.gpu_memory is None:
        # It may be that of the profile.
        spec = replace(spec, resources=replace(spec.resources, gpu_memory=None))
    return _immutable_part(spec) == _immutable_part(job.spec) and job.spec.workspace.claim_name == claim


def _immutable_part(spec: QLoRAJobSpec) -> tuple[dict[str, Any], Any]:
    measured = (None, (), ()) if spec.gate is None else spec.gate.measured
    return replace(spec, gate=None, resources=replace(spec.resources, memory=None)).dump(), measured


def _is_going(claim: Object) -> bool:
    """Whether the claim is deleted, or about to be with the job that had it."""
    metadata = claim["metadata"]
    owners = metadata.get("ownerReferences") or ()
    return "deletionTimestamp" in metadata or any(is_of_kind(owner, KIND) for owner in owners)


def _names(revisions: Iterable[RestoredRevision]) -> str:
    return ", ".join(revision.name for revision in revisions)
