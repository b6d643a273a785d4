"""Decides what keeps a sweep from creating cells, as it and the administrator's settings are; pure."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from qlora_api.profile import Profile
from qlora_api.sweep.cells import repeated_cell
from qlora_api.sweep.spec import Cell, pods
from qlora_operator.decisions.observed.facts import Facts
from qlora_operator.decisions.observed.objects import Observed, Reason
from qlora_operator.decisions.resolution import objection_to_job
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep


def fault_of_cells(sweep: QLoRASweep, cells: Sequence[Cell], jobs: Mapping[str, CellJob]) -> Reason | None:
    """Why no cell of a new sweep is ever created; None if they are made.

    A sweep with a stored table, or with a cell, was admitted by an earlier release and goes on.
    """
    if sweep.status.cells or jobs:
        return None
    why = repeated_cell(sweep.spec, cells)
    return Reason("InvalidCells", why) if why is not None else None


def objection_to_sweep(sweep: QLoRASweep, profiles: Mapping[str, Profile], now: datetime) -> Reason | None:
    """Why no cell may be created, as the sweep and the administrator's settings are; None if they may."""
    job = sweep.as_job()
    if why := objection_to_job(Facts(job=job, observed=Observed(), profiles=profiles, now=now)):
        return why
    if sweep.status.cells and all(line.uid for line in sweep.status.cells):
        # What is left to create, if anything, is the one job that publishes.
        return None
    return _not_shared(sweep, profiles[job.spec.scheduling.profile])


def _largest_pod(sweep: QLoRASweep) -> int:
    return max(len(pod) for pod in pods(sweep.spec, sweep.spec.overrides()))


def _not_shared(sweep: QLoRASweep, profile: Profile) -> Reason | None:
    """Why several cells could not mount the workspace at the same time; None if they can.

    Those that one pod trains are each prepared by a pod of their own. A volume of one node brings all pods to that
    node. An existing claim is believed to be as the profile says.
    """
    template, topology = sweep.spec.template.spec, profile.workspace.topology
    parallelism, size = sweep.spec.parallelism, _largest_pod(sweep)
    if (parallelism == 1 and size == 1) or topology == "node-local":
        return None
    modes = template.workspace.access_modes or (profile.workspace.access_mode,)
    found = f"workspace.topology of profile {template.scheduling.profile!r} is {topology}, and must be shared"
    if topology == "shared":
        if template.workspace.claim_name is not None or "ReadWriteMany" in modes:
            return None
        found = f"it would be {', '.join(modes)}, and must be ReadWriteMany"
    field, value, remedy = (
        ("parallelism", parallelism, "set spec.parallelism to 1, or create the sweep again")
        if size == 1
        else ("cellsPerPod", sweep.spec.cells_per_pod, "create the sweep again without cellsPerPod, or")
    )
    return Reason(
        "WorkspaceNotShared",
        f"spec.{field} is {value}, and cells on several nodes could not mount the workspace ({found}): {remedy} with "
        "another workspace",
    )
