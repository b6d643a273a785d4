"""A sweep of three cells that one pod trains, at any point of its life."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from qlora_api.contract import ProgressRecord
from qlora_api.naming import CELLS_IN_POD_ANNOTATION
from qlora_api.status import QLoRAJobStatus, Resolved, StepName
from qlora_api.sweep.status import SweepPodStatus
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.observed.parsing import observe
from qlora_operator.decisions.observed.shared_pod import SharedPod, shared_pod
from qlora_operator.decisions.sweeps.plan import next_status, table
from qlora_operator.decisions.sweeps.pods import PodFacts, PodPlan, next_pod, of_pod, pods_of
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep, parse_cell, parse_sweep
from tests.support.builders import (
    NAME,
    NOW,
    PROFILES,
    UID,
    after,
    condition,
    job_body,
    read_job,
    resolved,
    revision_of,
    time,
)
from tests.support.sweeps import TEMPLATE

SWEEP, SWEEP_UID = "rates", "99999999-0000-4000-8000-000000000000"
POD = f"{SWEEP}-p00"
NAMES = tuple(f"{SWEEP}-{number:02}" for number in range(3))
UIDS = {name: f"{number}aaaaaaa-0000-4000-8000-000000000000" for number, name in enumerate(NAMES, 1)}
OWNER = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRASweep", "name": SWEEP, "uid": SWEEP_UID, "controller": True}
Doing = str


def cell_status(doing: Doing, name: str = NAMES[0], **fields: Any) -> QLoRAJobStatus | None:
    """The status of a cell that is `doing` so; "training" is alone."""
    if doing == "new":
        return None
    document = json.dumps({"metadata": {"uid": UIDS[name]}, "spec": {}})
    fixed = resolved().model_copy(
        update={"claim_name": "team", "claim_created": False, "workspace_path": f"{name}-folder", "document": document}
    )
    fixed = Resolved.model_validate(fields.get("resolved", fixed))
    step: StepName = "prepare" if doing in ("preparing", "failed") else "publish" if doing == "trained" else "train"
    began = doing in ("preparing", "training", "trained", "failed")
    job_name = f"{name}-{step}-1"
    phase = {"training": "Training", "failed": "Failed", "suspended": "Suspended", "preparing": "Preparing"}
    true = {"failed": ["Failed"], "preparing": []}.get(doing, ["Prepared"])
    current = {"name": step, "jobName": job_name, "jobUid": f"uid-{job_name}" if began else "", "attempt": 1}
    return QLoRAJobStatus.model_validate(
        {
            "startTime": time(-3600),
            "phase": phase.get(doing, "Queued"),
            "conditions": [condition(kind, "True") for kind in true],
            "step": current,
        }
        | fields
        | {"currentRevision": revision_of(fixed), "resolved": fixed}
    )


def cell_body(doing: Doing = "prepared", name: str = NAMES[0], **more: Any) -> dict[str, Any]:
    """The stored cell; keywords are fields of its spec, `status` those of its status."""
    fields = more.pop("status", {})
    status = cell_status(doing, name, **fields)
    body = job_body(status.dump() if status else {}, workspace={"claimName": "team"}, **more)
    if doing == "suspended":
        body["spec"]["suspend"] = True
    marks = {"annotations": {CELLS_IN_POD_ANNOTATION: str(len(NAMES))}, "ownerReferences": [OWNER]}
    return body | {"metadata": body["metadata"] | {"name": name, "uid": UIDS[name]} | marks}


def of_the_pod(body: dict[str, Any]) -> dict[str, Any]:
    """The same child of a job named NAME, of the pod of the sweep."""
    text = json.dumps(body["metadata"]).replace(f"{NAME}-train", f"{POD}-train").replace(UID, SWEEP_UID)
    return body | {"metadata": json.loads(text)}


@dataclass
class Pod:
    """The pod of three cells: its stored state, its cells, and passes over it."""

    cells: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: cell_body(name=name) for name in NAMES})
    """The QLoRAJobs as stored, by name."""
    spec: dict[str, Any] = field(default_factory=dict)
    stored: SweepPodStatus | None = None
    known: dict[str, str] = field(default_factory=lambda: dict(UIDS))
    """UIDs in the sweep's table, also of cells that are gone."""

    def sweep(self) -> QLoRASweep:
        """The sweep as stored."""
        spec = {"template": {"spec": TEMPLATE}, "grid": {"rank": [8, 16, 32]}, "cellsPerPod": 3} | self.spec
        lines = [{"name": name, "overrides": "x", "uid": uid} for name, uid in self.known.items()]
        status = {"cells": lines, "pods": [self.stored.dump()] if self.stored else []}
        metadata = {"namespace": "team", "name": SWEEP, "uid": SWEEP_UID, "generation": 1, "resourceVersion": "7"}
        return parse_sweep({"metadata": metadata, "spec": spec, "status": status})

    def jobs(self) -> dict[str, CellJob]:
        """The cells as their sweep reads them."""
        found = {name: (parse_cell(body, SWEEP_UID), body) for name, body in self.cells.items()}
        return {name: replace(cell, job=read_job(body)) for name, (cell, body) in found.items() if cell is not None}

    def decide(
        self, *bodies: dict[str, Any], at: float = 0, progress: ProgressRecord | None = None, **more: Any
    ) -> PodPlan:
        """Decide a pass. `bodies`: the observed Jobs and pods, as of a job named NAME."""
        sweep, of_sweep = self.sweep(), [of_the_pod(body) for body in bodies]
        [(stored, names)] = pods_of(sweep, sweep.cells())
        jobs = [body for body in of_sweep if body["metadata"]["ownerReferences"][0]["kind"] == "QLoRAJob"]
        observed = of_pod(observe(SWEEP_UID, jobs, [body for body in of_sweep if body not in jobs]), POD)
        facts = PodFacts(observed, after(at), PROFILES, progress=progress, log_read=progress is not None, **more)
        return next_pod(sweep, stored, names, self.jobs(), facts)

    def then(self, *bodies: dict[str, Any], at: float = 0, **more: Any) -> PodPlan:
        """The same, and it is stored."""
        planned = self.decide(*bodies, at=at, **more)
        # What is stored is all that the next pass knows.
        self.stored = SweepPodStatus.model_validate(planned.status.dump())
        return planned

    def cell(self, name: str) -> QLoRAJob:
        """The cell as its own passes read it."""
        return read_job(self.cells[name])

    def shared(self, name: str) -> SharedPod | None:
        """What the cell knows of the pod."""
        return shared_pod(self.cell(name), (self.stored,) if self.stored else ())

    def store_status(self, name: str, status: QLoRAJobStatus) -> None:
        """Store the status of the cell."""
        self.cells[name] = self.cells[name] | {"status": status.dump()}

    def gpu_seconds(self) -> int:
        """Of the whole sweep, by its status."""
        sweep = self.sweep()
        lines = table(sweep, sweep.cells(), self.jobs())
        status = next_status(sweep, lines, None, None, NOW, None, (self.stored,) if self.stored else ())
        return status.usage.gpu_seconds if status.usage is not None else 0


def deleting(body: dict[str, Any]) -> dict[str, Any]:
    """The cell, whose deletion a finalizer holds up."""
    return body | {"metadata": body["metadata"] | {"deletionTimestamp": time()}}
