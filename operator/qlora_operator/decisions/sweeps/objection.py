"""Decides whether the sweep or the administrator's settings block its cells."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qlora_api.profile import Profile
from qlora_api.sweep.cells import repeated_cell
from qlora_api.sweep.spec import Cell, pods
from qlora_operator.decisions.observed.objects import QLoRAJob, Reason
from qlora_operator.decisions.resolution import objection_to_job
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep


def fault_of_cells(sweep: QLoRASweep, cells: Sequence[Cell], jobs: Mapping[str, CellJob]) -> Reason | None:
    """Return why no cell of a new sweep is ever created, or None if they can be.

    A sweep with a stored table, or with a cell, was admitted by an earlier release and continues.
    """
    if sweep.status.cells or jobs:
        return None
    why = repeated_cell(sweep.spec, cells)
    return Reason("InvalidCells", why) if why is not None else None


def objection_to_sweep(sweep: QLoRASweep, cells: Sequence[Cell], profiles: Mapping[str, Profile]) -> Reason | None:
    """Return why the sweep or the settings block its cells, or None if they do not.

    A cell that could not start would hold its place among those that run at the same time.
    """
    job = sweep.as_job()
    if why := objection_to_job(job, profiles):
        return why
    created = {line.name for line in sweep.status.cells if line.uid}
    missing = [cell for cell in cells if cell.name not in created]
    if not missing:
        # At most the one job that publishes is left to create.
        return None
    profile = profiles[job.spec.scheduling.profile_name]
    return _too_few_jobs(sweep, profile) or _not_shared(sweep, profile) or _of_cells(job, missing, profiles)


def _of_cells(template: QLoRAJob, cells: Sequence[Cell], profiles: Mapping[str, Profile]) -> Reason | None:
    for cell in cells:
        if why := objection_to_job(replace(template, name=cell.name, spec=cell.spec), profiles):
            return Reason(why.word, f"cell {cell.name} ({cell.overrides.text()}) could not start: {why.sentence}")
    return None


def _largest_pod(sweep: QLoRASweep) -> int:
    return max(len(pod) for pod in pods(sweep.spec, sweep.spec.overrides()))


def _too_few_jobs(sweep: QLoRASweep, profile: Profile) -> Reason | None:
    """Return why the cells of a pod cannot all start, as each of them is a job."""
    size, limit = _largest_pod(sweep), profile.limits.jobs if profile.limits is not None else None
    if limit is None or size <= limit:
        return None
    return Reason(
        "LimitExceeded",
        f"spec.cellsPerPod is {sweep.spec.cells_per_pod}, and profile "
        f"{sweep.spec.template.spec.scheduling.profile_name!r} allows {limit} jobs at a time: create the "
        f"sweep again with cellsPerPod of at most {limit}, or with another profile",
    )


def _not_shared(sweep: QLoRASweep, profile: Profile) -> Reason | None:
    """Return why cells cannot mount the workspace at the same time.

    Returns None if they can, or need not. Each cell has a separate prepare pod, also if one pod trains several: those
    of a zonal volume go to one node, and with one pod at a time none of them waits with a GPU. A volume of one node
    brings all pods to that node. The profile's access mode is assumed for an existing claim.
    """
    template, topology = sweep.spec.template.spec, profile.workspace.topology
    parallelism, size = sweep.spec.parallelism, _largest_pod(sweep)
    if topology == "node-local" or (parallelism == 1 and (size == 1 or topology == "zonal")):
        return None
    modes = template.workspace.access_modes or (profile.workspace.access_mode,)
    found = f"workspace.topology of profile {template.scheduling.profile_name!r} is {topology}, and must be shared"
    if topology == "shared":
        if template.workspace.claim_name is not None or "ReadWriteMany" in modes:
            return None
        found = f"it would be {', '.join(modes)}, and must be ReadWriteMany"
    field, value, remedy = (
        ("parallelism", parallelism, "set spec.parallelism to 1, or create the sweep again")
        if size == 1 or topology == "zonal"
        else ("cellsPerPod", sweep.spec.cells_per_pod, "create the sweep again without cellsPerPod, or")
    )
    return Reason(
        "WorkspaceNotShared",
        f"spec.{field} is {value}, and cells on several nodes could not mount the workspace ({found}): {remedy} with "
        "another workspace",
    )
