"""Decides what is due after the end of a sweep: the deletion of its claim, and of the sweep."""

from collections.abc import Iterable, Mapping
from datetime import datetime

from qlora_api.profile import Profile
from qlora_api.sweep.status import QLoRASweepStatus, SweepPodStatus
from qlora_operator.decisions.expiry import effective_ttl, expires, is_held_up
from qlora_operator.decisions.retention import deletes_claim
from qlora_operator.decisions.sweeps.sweep import CellJob, QLoRASweep


def is_claim_to_be_deleted(
    sweep: QLoRASweep, status: QLoRASweepStatus, jobs: Mapping[str, CellJob], profiles: Mapping[str, Profile]
) -> bool:
    """Whether the claim of all cells is deleted now, as the sweep has succeeded."""
    template = sweep.spec.template.spec
    profile = profiles.get(template.scheduling.profile_name)
    if status.phase != "Succeeded" or status.claim_deletion_time is not None or profile is None:
        return False
    outside, default = sweep.spec.is_outside_workspace, profile.workspace.persistent_volume_claim_retention_policy
    asked = deletes_claim("when_finished", template.workspace, default, is_outside=outside)
    return asked and not any(job.retried for job in jobs.values())


def deletion_at(
    sweep: QLoRASweep, status: QLoRASweepStatus, jobs: Mapping[str, CellJob], profiles: Mapping[str, Profile]
) -> datetime | None:
    """Return when the sweep is deleted with its cells, if nothing holds it up then."""
    template = sweep.spec.template.spec
    announces = template.output.announce is not None or any(
        overrides.output is not None and overrides.output.announce is not None for overrides in sweep.spec.overrides()
    )
    profile = profiles.get(template.scheduling.profile_name)
    ttl = effective_ttl(sweep.spec.ttl_seconds_after_finished, profile, announces=announces)
    return expires(status, ttl)


def is_sweep_held_up(pods: Iterable[SweepPodStatus], jobs: Mapping[str, CellJob], due: datetime) -> bool:
    """Whether one of these pods still counts, or something is left to do for a cell, before all is deleted."""
    counts = any(entry.end is None for pod in pods if pod.usage is not None for entry in pod.usage.pods)
    return counts or any(cell.job is not None and is_held_up(cell.job, due) for cell in jobs.values())
