"""A stored QLoRASweep and its cells, as typed frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from qlora_api.naming import (
    CELLS_IN_POD_ANNOTATION,
    JOB_UID_LABEL,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    RUNGS_ANNOTATION,
    STOPPED_ANNOTATION,
    SUSPENDED_ANNOTATION,
    SWEEP_LABEL,
    SWEEP_UID_LABEL,
    shared_folder,
    workspace_claim_name,
)
from qlora_api.profile import Profile
from qlora_api.spec.job import API_VERSION, KIND
from qlora_api.status import QLoRAJobStatus
from qlora_api.sweep.cells import FoundRun
from qlora_api.sweep.spec import SWEEP_KIND, Cell, QLoRASweepSpec, cells
from qlora_api.sweep.status import CellPhase, QLoRASweepStatus
from qlora_api.usage import UsageStatus
from qlora_operator.decisions.observed.conditions import condition, has_trained, is_true
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason
from qlora_operator.decisions.observed.parsing import controller_uid, is_of_kind
from qlora_operator.decisions.observed.stored_job import UnreadableJobError, explain, parse_job
from qlora_operator.decisions.retention import deletes_claim

Manifest = dict[str, Any]
_PHASES: tuple[CellPhase, ...] = get_args(CellPhase)
_QUEUE_LABELS = (QUEUE_LABEL, QUEUE_PRIORITY_LABEL)


@dataclass(frozen=True)
class QLoRASweep:
    """The sweep as stored."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    deleting: bool
    spec: QLoRASweepSpec
    status: QLoRASweepStatus
    queue_labels: Mapping[str, str]
    """Kueue's labels of the sweep, which its cells get too."""

    @property
    def claim_name(self) -> str:
        """Return the claim of all cells' workspace: the template's, or the sweep's."""
        return self.spec.template.spec.workspace.claim_name or workspace_claim_name(self.name, self.uid)

    @property
    def shared_folder(self) -> str:
        """The folder on that claim that the cells share."""
        return shared_folder(self.name, self.uid)

    def cells(self) -> tuple[Cell, ...]:
        """The cells in their order. Raises ValueError: see `qlora_api.sweep.spec.cells`."""
        return cells(self.name, self.spec, self.claim_name)

    def as_job(self) -> QLoRAJob:
        """Return the template as a QLoRAJob, never created, to check settings with."""
        return QLoRAJob(
            namespace=self.namespace,
            name=self.name,
            uid=self.uid,
            generation=self.generation,
            resource_version=self.resource_version,
            deleting=self.deleting,
            spec=self.spec.template.spec,
            status=QLoRAJobStatus(),
        )


@dataclass(frozen=True)
class StoredSweep:
    """A sweep whose spec this version cannot read, to update its status only."""

    namespace: str
    name: str
    uid: str
    generation: int
    resource_version: str
    status: QLoRASweepStatus


class UnreadableSweepError(UnreadableJobError):
    """A QLoRASweep of another schema version that this operator cannot read."""

    def __init__(self, message: str, stored: StoredSweep | None) -> None:
        """`stored`: the sweep whose status gets the message, or None if unreadable too."""
        super().__init__(message, {})
        self.stored = stored


@dataclass(frozen=True, slots=True)
class CellJob:
    """The fields read of a cell's QLoRAJob."""

    name: str
    uid: str
    phase: CellPhase
    suspend: bool
    suspended_by_sweep: bool
    """Whether its `suspend` was set by its sweep, and so is the sweep's to take back."""
    stopped_by_sweep: bool = False
    """Whether its sweep has stopped it for good; if a user resumes it, it runs on."""
    retried: bool = False
    """Whether a user has set a new retry.request: it continues with the next pass."""
    progress: str = ""
    total_steps: int = 0
    """Optimizer steps of its run; 0 if that is not known."""
    evaluations: tuple[tuple[int, float], ...] = ()
    """Steps and held-out losses at the rungs that it has reached."""
    loss: float | None = None
    eval_loss: float | None = None
    score: float | None = None
    gpu_seconds: int = 0
    lost_gpu_seconds: int = 0
    cost: str | None = None
    adapter: str = ""
    sha256: str = ""
    reason: str = ""
    continues: str = ""
    """The cell whose run it continues, to publish its adapter; empty for a cell."""
    cleanup_after_seconds: int | None = None
    started: bool = False
    """Whether it needs no other job any more."""
    waits: Reason | None = None
    """Why it has not started, if something keeps it."""
    trained: bool = False
    """Whether its run has reached its end, also if it is suspended before publish."""
    spec: Object = field(default_factory=dict)
    """As stored, with what its user has changed since it was created."""
    run: FoundRun = field(default_factory=FoundRun)
    job: QLoRAJob | None = None
    """The whole of it, if this version can read it."""
    resource_version: str = ""

    @property
    def rests(self) -> bool:
        """Whether its sweep has stopped it for good, and its GPU is free since."""
        stopped = self.stopped_by_sweep and self.suspend and not self.suspended_by_sweep
        return stopped and self.phase == "Suspended"


def parse_sweep(body: Object) -> QLoRASweep:
    """Parse the stored QLoRASweep. Raises UnreadableSweepError if that fails."""
    metadata, labels = body["metadata"], body["metadata"].get("labels") or {}
    stored = _stored(body)
    try:
        spec = QLoRASweepSpec.model_validate(body["spec"])
    except ValidationError as error:
        raise UnreadableSweepError(
            f"this version of the operator cannot read the sweep: {explain(error)}", stored
        ) from error
    return QLoRASweep(
        namespace=stored.namespace,
        name=stored.name,
        uid=stored.uid,
        generation=stored.generation,
        resource_version=stored.resource_version,
        deleting="deletionTimestamp" in metadata,
        spec=spec,
        status=stored.status,
        queue_labels={name: labels[name] for name in _QUEUE_LABELS if name in labels},
    )


def _stored(body: Object) -> StoredSweep:
    metadata = body["metadata"]
    try:
        status = QLoRASweepStatus.model_validate(body.get("status") or {})
    except ValidationError as error:
        message = f"this version of the operator cannot read the status of the sweep: {explain(error)}"
        raise UnreadableSweepError(message, None) from error
    return StoredSweep(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 0),
        resource_version=metadata.get("resourceVersion", ""),
        status=status,
    )


def parse_cell(body: Object, sweep_uid: str) -> CellJob | None:
    """Parse a QLoRAJob that the sweep controls.

    Returns None for another, despite its labels. A status that this version cannot read counts as that of a cell that
    runs.
    """
    if controller_uid(body) != sweep_uid:
        return None
    metadata = body["metadata"]
    annotations = metadata.get("annotations") or {}
    try:
        status = QLoRAJobStatus.model_validate(body.get("status") or {}, extra="ignore")
    except ValidationError:
        status = QLoRAJobStatus()
    phase = "Pending" if status.phase is None or status.phase not in _PHASES else status.phase
    spec = body.get("spec") or {}
    request = (spec.get("retry") or {}).get("request")
    progress, adapter, failed = status.progress, status.adapter, condition(status, "Failed")
    usage = status.usage or UsageStatus()
    return CellJob(
        name=metadata["name"],
        uid=metadata["uid"],
        phase=phase,
        suspend=bool(spec.get("suspend")),
        suspended_by_sweep=SUSPENDED_ANNOTATION in annotations,
        stopped_by_sweep=STOPPED_ANNOTATION in annotations,
        retried=phase == "Failed" and request not in (None, status.retry_request) and not spec.get("cancel"),
        progress=progress.summary if progress else "",
        total_steps=progress.total_steps if progress else 0,
        evaluations=tuple((found.step, found.eval_loss) for found in (progress and progress.evaluations) or ()),
        loss=progress.loss if progress else None,
        eval_loss=progress.eval_loss if progress else None,
        score=status.gate.score if status.gate else None,
        gpu_seconds=usage.gpu_seconds,
        lost_gpu_seconds=usage.lost_gpu_seconds.total,
        cost=usage.cost,
        adapter=adapter.uri if adapter else "",
        sha256=adapter.sha256 if adapter else "",
        reason=failed.reason if failed is not None and is_true(status, "Failed") else "",
        continues=str(spec.get("continues") or ""),
        cleanup_after_seconds=spec.get("cleanupAfterSeconds"),
        # Also if this version cannot read it.
        started="currentRevision" in (body.get("status") or {}),
        waits=_waits(status),
        trained=has_trained(status),
        spec=spec,
        run=_run(status),
        job=_readable_job(body),
        resource_version=metadata.get("resourceVersion", ""),
    )


def _readable_job(body: Object) -> QLoRAJob | None:
    try:
        return parse_job(body)
    except UnreadableJobError:
        return None


def _waits(status: QLoRAJobStatus) -> Reason | None:
    found = condition(status, "Succeeded")
    if found is None or status.phase != "Pending" or found.reason == "Pending":
        return None
    return Reason(found.reason, found.message)


def _run(status: QLoRAJobStatus) -> FoundRun:
    adapter = status.adapter
    if adapter is None:
        return FoundRun()
    earlier = adapter.initial_adapter
    return FoundRun(adapter.base_revision, earlier.source if earlier is not None else "")


def sweep_of(body: Object) -> str | None:
    """Return the QLoRASweep named as the QLoRAJob's controller, or None if none is."""
    owners = body["metadata"].get("ownerReferences") or ()
    names = (str(owner["name"]) for owner in owners if owner.get("controller") and is_of_kind(owner, SWEEP_KIND))
    return next(names, None)


def sweep_of_child(body: Object) -> tuple[str, str] | None:
    """Return namespace and name of the sweep that a Job, or its pod, has as labels."""
    metadata = body["metadata"]
    labels = metadata.get("labels") or {}
    of_sweep = SWEEP_LABEL in labels and labels.get(JOB_UID_LABEL) == labels.get(SWEEP_UID_LABEL)
    return (metadata["namespace"], labels[SWEEP_LABEL]) if of_sweep else None


def build_cell(sweep: QLoRASweep, cell: Cell, cells_in_pod: int = 1) -> Manifest:
    """Build the QLoRAJob of a cell.

    Of the sweep's labels it gets only Kueue's: tools would attribute others to the cell. `cells_in_pod`: number of
    cells that one pod trains together, this one among them.
    """
    halving = sweep.spec.halving
    rungs = halving.rungs(cell.spec.training.max_steps) if halving is not None else ()
    notes = {RUNGS_ANNOTATION: ",".join(map(str, rungs))} if rungs else {}
    notes |= {CELLS_IN_POD_ANNOTATION: str(cells_in_pod)} if cells_in_pod > 1 else {}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {
            "name": cell.name,
            "namespace": sweep.namespace,
            "labels": labels_of(sweep) | dict(sweep.queue_labels),
            **({"annotations": notes} if notes else {}),
            "ownerReferences": [owner_of(sweep, controller=True)],
        },
        "spec": cell.spec.dump(),
    }


def build_sweep_claim(sweep: QLoRASweep, profile: Profile) -> Manifest:
    """Build the PersistentVolumeClaim of all cells.

    It has an owner only if it is deleted with the sweep.
    """
    workspace, defaults = sweep.spec.template.spec.workspace, profile.workspace
    spec: Manifest = {
        "accessModes": list(workspace.access_modes or (defaults.access_mode,)),
        "resources": {"requests": {"storage": workspace.size or defaults.size}},
    }
    if storage_class := workspace.storage_class_name or defaults.storage_class_name:
        spec["storageClassName"] = storage_class
    metadata: Manifest = {"name": sweep.claim_name, "namespace": sweep.namespace, "labels": labels_of(sweep)}
    policy = defaults.persistent_volume_claim_retention_policy
    if deletes_claim("when_deleted", workspace, policy, is_outside=sweep.spec.is_outside_workspace):
        metadata["ownerReferences"] = [owner_of(sweep, controller=False)]
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def is_of_sweep(found: Object, sweep: QLoRASweep) -> bool:
    """Whether the object has the label of what was created for the sweep."""
    return bool((found["metadata"].get("labels") or {}).get(SWEEP_UID_LABEL) == sweep.uid)


def suspension(cell: CellJob, suspend: bool) -> Manifest:
    """Build the patch that suspends this very cell, or resumes it."""
    mark = {SUSPENDED_ANNOTATION: "true" if suspend else None}
    return {"metadata": _as_read(cell) | {"annotations": mark}, "spec": {"suspend": suspend}}


def stop(cell: CellJob, why: str) -> Manifest:
    """Build the patch that stops this very cell for good, with its checkpoint."""
    marks = {STOPPED_ANNOTATION: why, SUSPENDED_ANNOTATION: None}
    return {"metadata": _as_read(cell) | {"annotations": marks}, "spec": {"suspend": True}}


def cleanup(cell: CellJob, seconds: int) -> Manifest:
    """Build the patch that lets this very cell be cleaned up."""
    return {"metadata": _as_read(cell), "spec": {"cleanupAfterSeconds": seconds}}


def _as_read(cell: CellJob) -> Manifest:
    """Return what lets a patch fail for another cell of that name, and for one that has changed since it was read."""
    return {"uid": cell.uid, "resourceVersion": cell.resource_version}


def labels_of(sweep: QLoRASweep) -> dict[str, str]:
    """Return the labels of objects created for the sweep."""
    return {
        "app.kubernetes.io/part-of": "qlora",
        "app.kubernetes.io/managed-by": "qlora-operator",
        SWEEP_LABEL: sweep.name,
        SWEEP_UID_LABEL: sweep.uid,
    }


def owner_of(sweep: QLoRASweep, *, controller: bool) -> Manifest:
    """Build the sweep's owner reference."""
    owner = {
        "apiVersion": API_VERSION,
        "kind": SWEEP_KIND,
        "name": sweep.name,
        "uid": sweep.uid,
        "blockOwnerDeletion": False,
    }
    return owner | ({"controller": True} if controller else {})
