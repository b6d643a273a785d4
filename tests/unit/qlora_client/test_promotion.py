"""Which jobs can be promoted, what a promotion and a rollback write, and what an answer of a server means."""

from datetime import UTC, datetime
from typing import Any

import pytest

from qlora_api.channel import MAX_PREVIOUS, Channel, ChannelAdapter, ServedChannel, ServedProblem
from qlora_client.channels.promotion import Place, promoted, require_promotable, rolled_back
from qlora_client.channels.servers import is_in_effect, wait_for_server
from qlora_client.jobs.job import Job
from qlora_client.kube.errors import ClusterError, RejectedError
from qlora_client.waiting import Clock

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
SHA256 = "a" * 64
PUBLISHED = {"uri": "hf://org/bot", "sha256": SHA256, "lineage": "signed"}
PASSED = {"passed": True, "adapterSha256": SHA256}


def job(phase: str = "Succeeded", *, gated: bool = True, **status: Any) -> Job:
    spec = {"gate": {"maxEvalLoss": "1"}} if gated else {}
    found = {"phase": phase, "adapter": PUBLISHED, "gate": PASSED, **status}
    return Job({"metadata": {"name": "bot"}, "spec": spec, "status": {k: v for k, v in found.items() if v}})


def adapter(name: str) -> ChannelAdapter:
    return ChannelAdapter(job=name, uri=f"hf://org/{name}", sha256=name[0] * 64)


A, B, C = adapter("a"), adapter("b"), adapter("c")


def channel(current: ChannelAdapter, *previous: ChannelAdapter, percent: int | None = None) -> Channel:
    return Channel(
        namespace="team",
        name="bot@prod",
        sequence=4,
        adapter=current,
        percent=percent,
        previous=previous,
        promoted_at="2026-01-01T00:00:00Z",
    )


def place(current: Channel | None = None) -> Place:
    return Place("team", "bot@prod", 0 if current is None else current.sequence, current)


def test_a_job_is_promoted_with_its_gate_passed_by_the_published_adapter() -> None:
    found = require_promotable(job(), needs_gate=True)
    assert (found.job, found.uri, found.sha256) == ("bot", "hf://org/bot", SHA256)


def test_a_job_without_a_gate_is_promoted_only_if_the_user_says_so() -> None:
    ungated = job(gated=False, gate=None)
    with pytest.raises(RejectedError, match=r"bot has no spec.gate.* pass --no-gate"):
        require_promotable(ungated, needs_gate=True)
    assert require_promotable(ungated, needs_gate=False).sha256 == SHA256


@pytest.mark.parametrize("needs_gate", [True, False])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (job("Publishing"), "bot is Publishing: only the adapter of a job that has succeeded"),
        (job("Training", adapter=None), "bot is Training and has published no adapter"),
        (job(gate=None), "status.gate of bot is not set: it must have passed"),
        (job(gate=PASSED | {"passed": False}), "status.gate of bot is of the adapter a+, passed: False"),
        (job(gate=PASSED | {"adapterSha256": "b" * 64}), "status.gate of bot is of the adapter b+, passed: True"),
        (job(adapter=PUBLISHED | {"lineage": "unsigned"}), "status.adapter.lineage of bot is unsigned, must be signed"),
        (job(adapter=PUBLISHED | {"lineage": None}), "status.adapter.lineage of bot is not set, must be signed"),
    ],
)
def test_no_other_job_is_promoted(wrong: Job, message: str, needs_gate: bool) -> None:
    with pytest.raises(ClusterError, match=message):
        require_promotable(wrong, needs_gate=needs_gate)


def test_the_first_promotion_begins_the_sequence() -> None:
    first = promoted(place(), A, None, NOW)
    assert (first.sequence, first.adapter, first.previous) == (1, A, ())
    assert first.promoted_at == "2026-01-02T03:04:05Z"


@pytest.mark.parametrize(
    ("current", "to", "percent", "previous"),
    [
        (channel(A), B, None, (A,)),
        (channel(A, B), C, None, (A, B)),
        (channel(B, A), A, None, (B,)),
        (channel(A), B, 10, (A,)),
        # The share grows, and becomes all: the one before stays the one before.
        (channel(B, A, percent=10), B, 50, (A,)),
        (channel(B, A, percent=10), B, None, (A,)),
        # B has never answered all, so neither a share of C nor a rollback may lead to it.
        (channel(B, A, percent=10), C, 20, (A,)),
        (channel(B, A, percent=10), C, None, (A,)),
    ],
)
def test_a_promotion_keeps_the_adapters_before(
    current: Channel, to: ChannelAdapter, percent: int | None, previous: tuple[ChannelAdapter, ...]
) -> None:
    found = promoted(place(current), to, percent, NOW)
    assert (found.sequence, found.adapter, found.percent, found.previous) == (5, to, percent, previous)


def test_previous_adapters_are_limited_in_number() -> None:
    many = tuple(ChannelAdapter(job=f"j{number}", uri="hf://o/j", sha256="d" * 64) for number in range(MAX_PREVIOUS))
    assert promoted(place(channel(A, *many)), B, None, NOW).previous == (A, *many[:-1])


def test_an_adapter_that_was_published_again_is_one_adapter() -> None:
    moved = ChannelAdapter(job=A.job, uri="hf://org/elsewhere", sha256=A.sha256)
    found = promoted(place(channel(A, B)), moved, None, NOW)
    assert (found.adapter, found.previous) == (moved, (B,))


def test_nothing_changes_where_the_channel_leads_to_the_adapter_already() -> None:
    for current in (channel(A, B), channel(A, B, percent=10)):
        assert promoted(place(current), A, current.percent, NOW) is current


@pytest.mark.parametrize("current", [None, channel(A)])
def test_a_share_needs_an_adapter_that_answers_the_others(current: Channel | None) -> None:
    with pytest.raises(RejectedError, match="bot@prod has no earlier adapter that answers the other conversations"):
        promoted(place(current), A, 10, NOW)


def test_rollbacks_lead_further_and_further_back() -> None:
    first = rolled_back(place(channel(A, B, C, percent=10)), NOW)
    assert (first.sequence, first.adapter, first.percent, first.previous) == (5, B, None, (C,))
    second = rolled_back(place(first), NOW)
    assert (second.sequence, second.adapter, second.previous) == (6, C, ())
    with pytest.raises(RejectedError, match="bot@prod has no earlier adapter to go back to"):
        rolled_back(place(second), NOW)


def served(sequence: int | None, adapter: ChannelAdapter = A, problem: ServedProblem | None = None) -> ServedChannel:
    name = f"team/{adapter.job}@sha256:{adapter.sha256}"
    return ServedChannel(name="team/bot@prod", sequence=sequence, adapter=name, problem=problem)


def test_a_server_has_switched_once_it_serves_this_record() -> None:
    wanted = channel(A)
    assert is_in_effect(served(4), wanted)
    for before in (None, served(3), served(None), served(3, problem=ServedProblem(sequence=3, reason="of old"))):
        assert not is_in_effect(before, wanted)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (served(3, problem=ServedProblem(sequence=4, reason="no signature is of this key")), "no signature is of"),
        (served(5), "promotion 5 is in effect there, to team/a@sha256:a+"),
        (served(4, B), "promotion 4 is in effect there, to team/b@sha256:b+"),
    ],
)
def test_a_server_that_will_not_switch_is_reported(found: ServedChannel, reason: str) -> None:
    with pytest.raises(RejectedError, match=reason):
        is_in_effect(found, channel(A))


def test_the_wait_for_a_server_ends_with_what_was_seen_last() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with pytest.raises(ClusterError, match=r"not within 30 s: the server cannot be reached at http://127.0.0.1:9"):
        wait_for_server("http://127.0.0.1:9", None, channel(A), 30, Clock(sleep, lambda: now))
    assert now >= 30
