"""Decides what a promotion or a rollback writes: the next record of a channel."""

from dataclasses import dataclass
from datetime import UTC, datetime

from qlora_api.channel import MAX_PREVIOUS, Channel, ChannelAdapter
from qlora_api.schema import replace
from qlora_client.files.adapter import published_adapter
from qlora_client.jobs.job import Job
from qlora_client.kube.errors import RejectedError


@dataclass(frozen=True)
class Place:
    """A channel before its next record."""

    namespace: str
    name: str
    sequence: int = 0
    """Of the last record; 0 before the first."""
    current: Channel | None = None
    """That record; None if there is none, or its adapters are not to be trusted."""


def require_promotable(job: Job, *, needs_gate: bool) -> ChannelAdapter:
    """Return the adapter of the job. Raises ClusterError with the first condition that it does not meet."""
    name, sha256 = job.name, published_adapter(job)["sha256"]
    if job.phase != "Succeeded":
        raise RejectedError(f"{name} is {job.phase}: only the adapter of a job that has succeeded can be promoted")
    adapter, gate = job.status["adapter"], job.status.get("gate")
    if not job.spec.get("gate"):
        if needs_gate:
            raise RejectedError(
                f"{name} has no spec.gate, so nothing shows that its adapter is good enough: pass --no-gate to "
                "promote it without"
            )
    elif not gate or not gate["passed"] or gate["adapterSha256"] != sha256:
        found = f"of the adapter {gate['adapterSha256']}, passed: {gate['passed']}" if gate else "not set"
        raise RejectedError(
            f"status.gate of {name} is {found}: it must have passed with the adapter that is published, {sha256}"
        )
    if (lineage := adapter.get("lineage")) != "signed":
        raise RejectedError(
            f"status.adapter.lineage of {name} is {lineage or 'not set'}, must be signed, because servers load no "
            "other adapter: train it with a profile that has a signingKey"
        )
    return ChannelAdapter(job=name, uri=adapter["uri"], sha256=sha256)


def promoted(place: Place, adapter: ChannelAdapter, percent: int | None, now: datetime) -> Channel:
    """Return the record that leads to the adapter; the current one if it does already.

    An adapter on a share of conversations that another replaces is not kept among the previous ones: a share and a
    rollback lead to those that have answered all conversations. Raises RejectedError for a share without one.
    """
    current = place.current
    if current is not None and (current.adapter, current.percent) == (adapter, percent):
        return current
    before: tuple[ChannelAdapter, ...] = ()
    if current is not None:
        before = current.previous if current.percent is not None else (current.adapter, *current.previous)
    previous = tuple({_identity(each): each for each in before if _identity(each) != _identity(adapter)}.values())
    if percent is not None and not previous:
        raise RejectedError(f"{place.name} has no earlier adapter that answers the other conversations: drop --percent")
    return Channel(
        namespace=place.namespace,
        name=place.name,
        sequence=place.sequence + 1,
        adapter=adapter,
        percent=percent,
        previous=previous[:MAX_PREVIOUS],
        promoted_at=_timestamp(now),
    )


def rolled_back(place: Place, now: datetime) -> Channel:
    """Return the record that leads to the first previous adapter, and no longer to the current one.

    So a second rollback leads one further back. Raises RejectedError if there is none.
    """
    current = place.current
    if current is None or not current.previous:
        raise RejectedError(f"{place.name} has no earlier adapter to go back to: promote a job to it")
    adapter, *older = current.previous
    return replace(
        current,
        sequence=place.sequence + 1,
        adapter=adapter,
        percent=None,
        previous=tuple(older),
        promoted_at=_timestamp(now),
    )


def _identity(adapter: ChannelAdapter) -> tuple[str, str]:
    return adapter.job, adapter.sha256


def _timestamp(now: datetime) -> str:
    return f"{now.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
