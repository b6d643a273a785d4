"""The Events of a job, which the operator writes for users."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import EVENTS


@dataclass(frozen=True)
class Event:
    """One Event."""

    time: datetime
    """When it was last seen, with its time zone."""
    kind: str
    """Normal or Warning."""
    reason: str
    message: str


def events_of(cluster: Cluster, uid: str) -> list[Event]:
    """The Events about the object with this UID, oldest first. The cluster keeps them for an hour or so."""
    found = map(_event, cluster.find(EVENTS, fields=f"involvedObject.uid={uid}"))
    return sorted(found, key=lambda event: event.time)


def _event(body: Mapping[str, Any]) -> Event:
    time = body.get("lastTimestamp") or body.get("eventTime") or body["metadata"]["creationTimestamp"]
    return Event(datetime.fromisoformat(time), body["type"], body["reason"], body.get("message", ""))
