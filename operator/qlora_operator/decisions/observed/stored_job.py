"""Parses a stored QLoRAJob, as far as possible also of another release."""

import dataclasses
import json
import logging
import re
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qlora_api.contract import CONTRACT_VERSION, needed_contract
from qlora_api.joinable import MAX_TOGETHER
from qlora_api.kubernetes_values import DNS_LABEL
from qlora_api.naming import (
    CELLS_IN_POD_ANNOTATION,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    RESTORED_ANNOTATION,
    RUNGS_ANNOTATION,
    VELERO_LABEL,
    shared_folder,
    workspace_folder,
)
from qlora_api.schema import replace
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import QLoRAJobStatus, Resolved
from qlora_api.status_types import MAX_RUNGS
from qlora_api.sweep.spec import MAX_SWEEP_NAME_LENGTH, SWEEP_KIND
from qlora_operator.decisions.observed.objects import ORPHANED, Object, QLoRAJob
from qlora_operator.decisions.observed.parsing import is_of_kind

logger = logging.getLogger(__name__)

_RUNGS = re.compile(rf"[0-9]{{1,8}}(,[0-9]{{1,8}}){{0,{MAX_RUNGS - 1}}}")
_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class UnreadableJobError(ValueError):
    """A QLoRAJob of another schema version that this operator cannot read."""

    def __init__(self, message: str, metadata: Object) -> None:
        super().__init__(message)
        self.metadata = metadata


def parse_job(body: Object) -> QLoRAJob:
    """The stored QLoRAJob. Raises UnreadableJobError if its status cannot be read.

    A spec that another release has admitted is read as far as possible, so that a running job can still be stopped.
    """
    metadata, labels = body["metadata"], body["metadata"].get("labels") or {}
    try:
        status = QLoRAJobStatus.model_validate(body.get("status") or {}, extra="ignore")
    except ValidationError as error:
        problem = f"this version of the operator cannot read the status: {explain(error)}"
        raise UnreadableJobError(problem, metadata) from error
    spec, problem = _parse_spec(body["spec"], started=status.current_revision is not None)
    sweep = _sweep(metadata)
    return QLoRAJob(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata.get("resourceVersion", ""),
        deleting="deletionTimestamp" in metadata,
        spec=spec,
        status=status,
        began_as=status.run_uid if status.run_uid and _UID.fullmatch(status.run_uid) else "",
        is_restored=_is_restored(metadata, status),
        queue_name=spec.scheduling.queue_name or labels.get(QUEUE_LABEL),
        queue_priority_class_name=spec.scheduling.queue_priority_class_name or labels.get(QUEUE_PRIORITY_LABEL),
        shares=None if sweep is None else shared_folder(*sweep),
        sweep="" if sweep is None else sweep[0],
        cells_in_pod=_cells_in_pod(metadata),
        rungs=_rungs(metadata),
        orphans=ORPHANED in (metadata.get("finalizers") or ()),
        problem=problem,
    )


def with_resolved(job: QLoRAJob, name: str, resolved: Resolved) -> QLoRAJob:
    """Return the job with what its revision of that name has fixed."""
    spec = _with_fixed_nodes(job.spec, resolved)
    status, problem = replace(job.status, resolved=resolved), job.problem or _unknown_contract(resolved)
    began_as = uid if (uid := uid_of_run(resolved)) != job.uid else ""
    return dataclasses.replace(job, spec=spec, status=status, revision=name, began_as=began_as, problem=problem)


def uid_of_run(resolved: Resolved) -> str:
    """Return the UID in the document that the pods of the run read, empty without one."""
    return str(json.loads(resolved.document).get("metadata", {}).get("uid", ""))


def _is_restored(metadata: Object, status: QLoRAJobStatus) -> bool:
    """Whether a user or Velero marks the job as restored, and its status has no run of its own."""
    annotations, labels = metadata.get("annotations") or {}, metadata.get("labels") or {}
    own = workspace_folder(metadata["name"], metadata["uid"])
    if status.workspace is not None and status.workspace.path == own:
        return False
    return annotations.get(RESTORED_ANNOTATION) == "true" or bool(labels.get(VELERO_LABEL))


def _sweep(metadata: Object) -> tuple[str, str] | None:
    """Return name and UID of the sweep that controls the job, or None if none does.

    The job's creator writes its owner, and the API server does not check it: an owner with an invalid name or UID,
    which could lead out of the claim, is no sweep.
    """
    owners = metadata.get("ownerReferences") or ()
    owner: Object = next((owner for owner in owners if owner.get("controller")), {})
    name, uid = str(owner.get("name")), str(owner.get("uid"))
    if not is_of_kind(owner, SWEEP_KIND):
        return None
    if len(name) > MAX_SWEEP_NAME_LENGTH or not re.fullmatch(DNS_LABEL, name) or not _UID.fullmatch(uid):
        return None
    return name, uid


def _cells_in_pod(metadata: Object) -> int:
    """Read the sweep's number of cells in the pod, 1 if a user wrote an invalid one."""
    found = str((metadata.get("annotations") or {}).get(CELLS_IN_POD_ANNOTATION, ""))
    return int(found) if re.fullmatch("[0-9]{1,2}", found) and 1 <= int(found) <= MAX_TOGETHER else 1


def _rungs(metadata: Object) -> str:
    """Read the sweep's list of rungs, empty if invalid, as users may write it."""
    found = str((metadata.get("annotations") or {}).get(RUNGS_ANNOTATION, ""))
    return found if _RUNGS.fullmatch(found) else ""


def _parse_spec(content: Object, *, started: bool) -> tuple[QLoRAJobSpec, str]:
    """Parse the spec and return why the job must not continue, empty if it can."""
    try:
        return QLoRAJobSpec.model_validate(content), ""
    except ValidationError as error:
        problem = f"this version of the operator cannot read the spec: {explain(error)}"
    if started:
        try:
            # An operator with these fields has fixed what the pods read.
            return QLoRAJobSpec.model_validate(content, extra="ignore"), ""
        except ValidationError:
            logger.debug("not even without its unknown fields", exc_info=True)
    return QLoRAJobSpec.model_construct(**_readable_fields(content)), problem


def _with_fixed_nodes(spec: QLoRAJobSpec, resolved: Resolved) -> QLoRAJobSpec:
    """Return the spec with the pods that the job has started with.

    The pods read that number, and an older definition drops the field.
    """
    if resolved.contract_version < needed_contract(2):
        return spec
    nodes = json.loads(resolved.document)["spec"]["resources"].get("nodes")
    return replace(spec, resources=replace(spec.resources, nodes=nodes))


def _readable_fields(content: Object) -> dict[str, Any]:
    """Return the spec's readable fields by name, and defaults of the others."""
    found: dict[str, Any] = {}
    for name, declared in QLoRAJobSpec.model_fields.items():
        reader: TypeAdapter[Any] = TypeAdapter(declared.rebuild_annotation())
        try:
            found[name] = reader.validate_python(content[declared.alias or name], extra="ignore")
        except (ValidationError, KeyError):
            if not declared.is_required():
                found[name] = declared.get_default(call_default_factory=True)
    return found


def _unknown_contract(resolved: Resolved) -> str:
    if resolved.contract_version <= CONTRACT_VERSION:
        return ""
    return (
        f"a newer operator has started the job (contract version {resolved.contract_version}, this one knows "
        f"{CONTRACT_VERSION}): what runs goes on; upgrade the operator for the next step"
    )


def explain(error: ValidationError) -> str:
    """The first problems, each with its field."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
        for problem in error.errors(include_url=False)[:3]
    )
