"""Names, builds and reads the ControllerRevision of a job: what was fixed before its first pod.

No client can change its data, and a change, by a retry, makes another one: what a name in a status stands for stays.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from qlora_api.schema import replace
from qlora_api.status import QLoRAJobStatus, Resolved, WorkspaceStatus
from qlora_operator.decisions.manifests.objects import Manifest, labels_of, owner_of
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.observed.parsing import controller_uid
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, explain, with_resolved

_NUMBER = re.compile(r".*-([0-9]{1,9})-[0-9a-f]{10}")


def with_revision(status: QLoRAJobStatus, job: QLoRAJob) -> QLoRAJobStatus:
    """Name the revision of what was resolved, and show what users read of it."""
    resolved, before = status.resolved, job.status
    if resolved is None:
        return status
    workspace = WorkspaceStatus(
        claim_name=resolved.claim_name,
        path=resolved.workspace_path,
        retention_policy=resolved.profile.workspace.persistent_volume_claim_retention_policy,
    )
    known = job.revision or before.current_revision
    name = job.revision if resolved == before.resolved else _name(job, resolved, _number(known) + 1)
    return replace(
        status,
        current_revision=name,
        image=resolved.profile.image,
        workspace=workspace,
        gpu_hours_limit=resolved.gpu_hours,
        queue_name=resolved.queue_name,
    )


def build_revision(job: QLoRAJob, name: str, resolved: Resolved) -> Manifest:
    """Build the ControllerRevision of that name."""
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": name,
            "namespace": job.namespace,
            "labels": labels_of(job),
            "ownerReferences": [owner_of(job, controller=True)],
        },
        "revision": _number(name),
        "data": _as_go_sorts(resolved.dump()),
    }


def newest(job: QLoRAJob, found: Iterable[Object]) -> Object | None:
    """Return the latest of the job's own revisions, None without one."""
    own = (body for body in found if is_of_job(job, body))
    return max(own, key=lambda body: (body["revision"], body["metadata"]["name"]), default=None)


def is_of_job(job: QLoRAJob, body: Object) -> bool:
    """Whether the job controls the revision: any user can give labels."""
    return controller_uid(body) == job.uid


def with_data_of(job: QLoRAJob, body: Object) -> QLoRAJob:
    """Return the job with what its revision has fixed. Raises UnreadableJobError."""
    name = body["metadata"]["name"]
    try:
        # After a downgrade the profile may have fields that this version lacks: the job continues.
        resolved = Resolved.model_validate(body["data"], extra="ignore")
    except ValidationError as error:
        problem = f"this version of the operator cannot read ControllerRevision {name}: {explain(error)}"
        raise UnreadableJobError(problem, {"namespace": job.namespace, "name": job.name, "uid": job.uid}) from error
    return with_resolved(job, name, resolved)


def _as_go_sorts(value: Any) -> Any:
    """Sort keys, and write whole numbers without a point, as the API server does."""
    if isinstance(value, dict):
        return {key: _as_go_sorts(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_as_go_sorts(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _name(job: QLoRAJob, resolved: Resolved, number: int) -> str:
    """Name a revision by its content, so that the same one is not created twice."""
    content = json.dumps([job.uid, resolved.dump()], sort_keys=True)
    return f"{job.name}-{number}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def _number(name: str | None) -> int:
    """Return the number in the name of a revision, 0 without one."""
    found = _NUMBER.fullmatch(name or "")
    return 0 if found is None else int(found[1])
