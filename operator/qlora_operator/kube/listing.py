"""Extracts versions or parsed values from the objects of a list.

An object itself is never kept: tenants choose how large it is.

Kept whole, 500 jobs with 250 kB of annotations each took the operator from 83 to 685 MiB. Pages of 500 objects, as
kubectl asks for, took 20 of the 36 MiB of a thousand new jobs. Pages of 25 take twenty times the requests and nearly
the same CPU time.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from qlora_api.naming import (
    CELLS_IN_POD_ANNOTATION,
    JOB_LABEL,
    JOB_UID_LABEL,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    RESTORED_ANNOTATION,
    RUNGS_ANNOTATION,
    SWEEP_UID_LABEL,
    VELERO_LABEL,
)
from qlora_operator.decisions.observed.objects import ORPHANED, ChildJob, Object, Pod
from qlora_operator.decisions.observed.parsing import controller_uid, parse_child, parse_pod
from qlora_operator.keys import Key

Kind = Literal["qlorajobs", "jobs", "pods"]
KINDS: tuple[Kind, ...] = ("qlorajobs", "jobs", "pods")
ChildKind = Literal["jobs", "pods"]

# Parsed, a Job or pod takes about 40 KiB, and 40 MiB if a tenant wants that.
OBJECTS_PER_PAGE = 25
# Of their versions alone: the rest is never built.
VERSIONS_PER_PAGE = 500

# All that is read of a QLoRAJob's metadata. The rest may have a megabyte: of annotations, labels, or notes of managers.
_READ_METADATA = ("namespace", "name", "uid", "resourceVersion", "generation", "deletionTimestamp")
_READ_LABELS = (QUEUE_LABEL, QUEUE_PRIORITY_LABEL, VELERO_LABEL)
_READ_ANNOTATIONS = (RUNGS_ANNOTATION, CELLS_IN_POD_ANNOTATION, RESTORED_ANNOTATION)
_LONGEST_ANNOTATION = 128


class ObjectVersion(NamedTuple):
    """The identity and version of an existing object."""

    namespace: str
    name: str
    uid: str
    version: str
    job_uid: str
    """UID of the QLoRAJob that it is, or whose label it has."""
    job_name: str

    @property
    def key(self) -> Key:
        """The QLoRAJob that it is, or whose label it has."""
        return self.namespace, self.job_name


class _Metadata(BaseModel):
    name: str
    uid: str
    resourceVersion: str  # noqa: N815 - as in the API
    namespace: str = ""
    labels: dict[str, str] = {}


class _Item(BaseModel):
    metadata: _Metadata


class _Versions(BaseModel):
    metadata: dict[str, Any]
    items: list[_Item] = []


def parse_versions(data: bytes) -> Any:
    """Parse a list of metadata, but not the notes of managers, which take ten times the rest.

    Raises ValueError if it is not JSON. The caller reports any other answer.
    """
    try:
        return _Versions.model_validate_json(data).model_dump(exclude_unset=True)
    except ValidationError:
        return json.loads(data)


@dataclass(frozen=True, slots=True)
class ChildView:
    """A Job or a pod as it was in one version."""

    namespace: str
    uid: str
    version: str
    job_uid: str
    """UID of the QLoRAJob whose label it has; empty if it has none."""
    job_name: str
    """By the label too, which any user can set who may change the object."""
    value: ChildJob | Pod | None
    """None for a Job that has the label of a QLoRAJob that does not control it."""


class ChildList(NamedTuple):
    """All Jobs, or all pods, with the label of one QLoRAJob, and the list's version."""

    items: Sequence[ChildView]
    version: str


def version_number(version: str) -> int:
    """Parse a resourceVersion, which grows with each write, or -1 if it is no number."""
    return int(version) if version.isdecimal() else -1


def object_version(kind: Kind, body: Object) -> ObjectVersion:
    """Return the object's location and version."""
    metadata = body["metadata"]
    name, uid = metadata["name"], metadata["uid"]
    labels = metadata.get("labels") or {}
    job = (uid, name) if kind == "qlorajobs" else (labels.get(JOB_UID_LABEL, ""), _job_name(labels))
    return ObjectVersion(metadata["namespace"], name, uid, metadata["resourceVersion"], *job)


def _job_name(labels: Object) -> str:
    """Return the QLoRAJob in the labels, empty for Jobs and pods of a sweep."""
    return "" if labels.get(SWEEP_UID_LABEL) == labels.get(JOB_UID_LABEL, "") else labels.get(JOB_LABEL, "")


def child_view(kind: ChildKind, body: Object) -> ChildView:
    """Parse a Job or a pod. Raises nothing, see `ChildJob.unreadable`."""
    metadata = body["metadata"]
    labels = metadata.get("labels") or {}
    job_uid = labels.get(JOB_UID_LABEL, "")
    value: ChildJob | Pod | None = None
    if kind == "pods":
        value = parse_pod(body)
    elif controller_uid(body) == job_uid:
        value = parse_child(body)
    version = str(metadata.get("resourceVersion", ""))
    return ChildView(metadata["namespace"], metadata["uid"], version, job_uid, _job_name(labels), value)


def compact(job: Object) -> dict[str, Any]:
    """Drop a QLoRAJob's unused metadata: half of it, or more if a tenant adds some.

    The schema bounds the rest.
    """
    metadata = job["metadata"]
    kept = {name: metadata[name] for name in _READ_METADATA if name in metadata}
    labels = metadata.get("labels") or {}
    if read := {name: labels[name] for name in _READ_LABELS if name in labels}:
        kept["labels"] = read
    found = metadata.get("annotations") or {}
    if noted := {key: found[key] for key in _READ_ANNOTATIONS if 0 < len(found.get(key, "")) <= _LONGEST_ANNOTATION}:
        kept["annotations"] = noted
    if (owner := _controller(metadata)) is not None:
        kept["ownerReferences"] = [owner]
    if ORPHANED in (metadata.get("finalizers") or ()):
        kept["finalizers"] = [ORPHANED]
    return {**job, "metadata": kept}


def as_revision(body: Object) -> dict[str, Any]:
    """Drop unused metadata of a ControllerRevision."""
    metadata = body["metadata"]
    kept = {field: metadata[field] for field in ("name", "resourceVersion") if field in metadata}
    if (uid := (metadata.get("labels") or {}).get(JOB_UID_LABEL)) is not None:
        kept["labels"] = {JOB_UID_LABEL: uid}
    if (owner := _controller(metadata)) is not None:
        kept["ownerReferences"] = [owner]
    return {"metadata": kept, "revision": body["revision"], "data": body.get("data")}


def unfinished_of_earlier(kind: ChildKind, job_name: str, uid: str, body: Object) -> str | None:
    """Name the Job or pod if it has not ended and is of a QLoRAJob of that name and another UID."""
    labels = body["metadata"].get("labels") or {}
    if _job_name(labels) != job_name or labels.get(JOB_UID_LABEL) == uid:
        return None
    has_ended = parse_pod(body).ended if kind == "pods" else parse_child(body).finished
    return None if has_ended else f"{'pod' if kind == 'pods' else 'Job'} {body['metadata']['name']}"


def _controller(metadata: Object) -> dict[str, Any] | None:
    """Return the reference to the object's controller, or None if it has none."""
    return next((owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")), None)
