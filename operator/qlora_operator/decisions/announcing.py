"""Decides when to announce a finished job, and builds its entry."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_api.artifact_status import AdapterStatus
from qlora_api.profile import Profile
from qlora_api.schema import replace
from qlora_api.sources import HubSource, parse_source
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.output import ANNOUNCEMENTS_LABEL, entry_key
from qlora_api.status import AnnouncementStatus, QLoRAJobStatus
from qlora_operator.decisions.observed.conditions import is_true, truncate
from qlora_operator.decisions.observed.objects import Object, QLoRAJob, Reason


def is_to_be_announced(job: QLoRAJob, status: QLoRAJobStatus) -> bool:
    """Whether the entry of a job that has succeeded is not known to be written."""
    if job.problem or job.spec.output.announce is None or status.adapter is None:
        return False
    return is_true(status, "Succeeded") and not _has_entry(status)


def _has_entry(status: QLoRAJobStatus) -> bool:
    return status.announcement is not None and status.announcement.entry is not None


def config_map_name(job: QLoRAJob) -> str:
    """The ConfigMap that the job asks to be announced in."""
    wanted = job.spec.output.announce
    if wanted is None:
        raise AssertionError("only a job with output.announce is announced")
    return wanted.config_map


def entry(job: str, adapter: AdapterStatus) -> str:
    """Build the entry of a job's adapter, as JSON.

    It has the adapter's name at a server, its address, and checksums to verify. `base` is the model as servers name it,
    ORG/NAME of the hub or else its address; `digest` that of adapter_model.safetensors.
    """
    source = parse_source(adapter.base_model)
    content: dict[str, Any] = {
        "name": job,
        "uri": adapter.uri,
        "base": source.repository if isinstance(source, HubSource) else adapter.base_model,
        "baseRevision": adapter.base_revision,
        "digest": f"sha256:{adapter.sha256}",
        "rank": adapter.rank,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def build_config_map(job: QLoRAJob, adapter: AdapterStatus) -> Object:
    """Build the ConfigMap if it does not exist yet.

    It has no owner: entries of other jobs follow, and outlive this one.
    """
    labels = {"app.kubernetes.io/managed-by": "qlora-operator", ANNOUNCEMENTS_LABEL: "true"}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_map_name(job), "namespace": job.namespace, "labels": labels},
        "data": {entry_key(job.name): entry(job.name, adapter)},
    }


def build_patches(job: QLoRAJob, adapter: AdapterStatus) -> tuple[list[Object], list[Object]]:
    """Build JSON Patches (RFC 6902) of a ConfigMap with entries, and of one without.

    Both change nothing unless it has the operator's label, so that a job cannot overwrite an unrelated ConfigMap. This
    needs no right to read it, and entries of other jobs stay as they are, also of one that ends now.
    """
    key, content = entry_key(job.name), entry(job.name, adapter)
    return (
        [_OURS, _operation("add", f"/data/{key}", content)],
        [_OURS, _operation("test", "/data", None), _operation("add", "/data", {key: content})],
    )


def _operation(kind: str, path: str, value: object) -> Object:
    return {"op": kind, "path": path, "value": value}


_OURS = _operation("test", f"/metadata/labels/{ANNOUNCEMENTS_LABEL.replace('/', '~1')}", "true")


@dataclass(frozen=True, slots=True)
class Announced:
    """The entry of an announced job."""

    uid: str
    """Of the job."""
    config_map: str
    key: str
    content: str


def announced(job: QLoRAJob) -> Announced | None:
    """Return the entry that was written for the job, None without one."""
    adapter = job.status.adapter
    if job.problem or job.spec.output.announce is None or adapter is None or not _has_entry(job.status):
        return None
    return Announced(job.uid, config_map_name(job), entry_key(job.name), entry(job.name, adapter))


def build_withdrawal(found: Announced) -> list[Object]:
    """Build the JSON Patch that removes this entry, and no newer one of its name."""
    path = f"/data/{found.key}"
    return [_OURS, _operation("test", path, found.content), {"op": "remove", "path": path}]


def with_announcement(status: QLoRAJobStatus, job: QLoRAJob) -> QLoRAJobStatus:
    """The status after the entry was written."""
    entry = f"{config_map_name(job)}/{entry_key(job.name)}"
    return replace(status, announcement=AnnouncementStatus(entry=entry))


def without_announcement(status: QLoRAJobStatus, why: str) -> QLoRAJobStatus:
    """Return the status without the entry of the published adapter."""
    return replace(status, announcement=AnnouncementStatus(rejection=truncate(why)))


def rejection_of_entry(job: QLoRAJob, message: str) -> str:
    """Why there is no entry after the API server has rejected it with that message."""
    return (
        f"the API server rejects the entry in ConfigMap {config_map_name(job)}: {message}; one that exists must have "
        f'the label {ANNOUNCEMENTS_LABEL}: "true", and the administrator must have allowed it (announce.enabled of the '
        "chart); it is tried again, at last every two hours"
    )


def reserved_config_map(spec: QLoRAJobSpec, profiles: Iterable[Profile]) -> Reason | None:
    """Return why the job must not start: its ConfigMap is one of a profile's.

    A profile expects certificates there, perhaps another profile than the job's. If the ConfigMap does not exist yet,
    the job would create one without them, and every pod would wait.
    """
    wanted = spec.output.announce
    reserved = {profile.ca_config_map.name for profile in profiles if profile.ca_config_map is not None}
    if wanted is None or wanted.config_map not in reserved:
        return None
    return Reason(
        "ConfigMapNotAllowed",
        f"spec.output.announce.configMap names {wanted.config_map!r}, in which a profile expects certificates "
        "(caConfigMap): create the job again with another ConfigMap",
    )
