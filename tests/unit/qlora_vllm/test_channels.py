"""A channel moves once its new adapter has answered, and to no promotion that is older or forged."""

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from qlora_api.channel import Channel, ChannelAdapter, ChannelStatement, ServedProblem, channel_key
from qlora_trainer.publishing.signing import sign
from qlora_vllm.channels import SECONDS_AGAIN, Channels, choose
from qlora_vllm.layout import Layout
from qlora_vllm.middleware import ChannelNames
from qlora_vllm.records import find_address
from tests.support.signed_adapter import KEY, public_pem

PROD = "team/bot@prod"
OLD, NEW = (ChannelAdapter(job=job, uri=f"pvc://adapters/{job}", sha256=job[0] * 64) for job in ("a", "b"))


def name(adapter: ChannelAdapter) -> str:
    return f"team/{adapter.job}@sha256:{adapter.sha256}"


def record(sequence: int, adapter: ChannelAdapter = OLD, **fields: Any) -> Channel:
    promoted = {"promoted_at": "2026-12-03T00:00:00Z"}
    return Channel(namespace="team", name="bot@prod", sequence=sequence, adapter=adapter, **promoted | fields)


class Server:
    """The channels of a server whose engine loads adapters, but those in `broken`."""

    def __init__(self, root: Path) -> None:
        self.layout, self.now = Layout(root), 0.0
        self.broken: dict[str, str] = {}
        self.tried: list[str] = []
        self.failing: Callable[[str], None] | None = None
        self.restart()

    def restart(self) -> None:
        self.channels = Channels(self.layout, self.try_adapter, clock=lambda: self.now)

    async def try_adapter(self, adapter: str) -> str | None:
        self.tried.append(adapter)
        if self.failing is not None:
            self.failing(adapter)
        return self.broken.get(adapter)

    def promote(self, channel: Channel, key: Ed25519PrivateKey | None = None, file: str | None = None) -> None:
        self.write(channel, key, file)
        self.update()

    def write(self, channel: Channel, key: Ed25519PrivateKey | None = None, file: str | None = None) -> None:
        folder = self.layout.records / "team"
        folder.mkdir(parents=True, exist_ok=True)
        content = ChannelStatement(subject=(), predicate=channel).model_dump_json(by_alias=True).encode()
        (folder / (file or channel_key(channel.name))).write_bytes(content if key is None else sign(content, key))

    def update(self) -> None:
        asyncio.run(self._update())

    async def _update(self) -> None:
        self.channels.update()
        await self.channels.settled(60)

    @property
    def adapter(self) -> str | None:
        active = self.channels.active.get(PROD)
        return None if active is None else choose(active, {})

    @property
    def reason(self) -> str:
        return self.channels.problems[PROD].reason


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_a_channel_moves_forward_and_back_by_newer_promotions(server: Server) -> None:
    for sequence, adapter, previous in ((1, OLD, ()), (2, NEW, (OLD,)), (3, OLD, (NEW, OLD))):
        server.promote(record(sequence, adapter, previous=previous))
        assert (server.adapter, server.channels.problems) == (name(adapter), {})
    assert server.tried == [name(OLD), name(NEW), name(OLD)]
    server.update()
    assert len(server.tried) == 3, "one first request for each promotion"


def test_a_channel_stays_while_its_new_adapter_cannot_answer(server: Server) -> None:
    server.promote(record(1))
    server.broken[name(NEW)] = "no signature is of this key"
    server.promote(record(2, NEW, previous=(OLD,)))
    assert server.adapter == name(OLD)
    (shown,) = server.channels.status()
    reason = f"{name(NEW)}: no signature is of this key"
    assert (shown.sequence, shown.problem) == (1, ServedProblem(sequence=2, reason=reason))
    server.broken.clear()
    server.update()
    assert server.adapter == name(OLD), "a download that fails is not repeated at once"
    server.now += SECONDS_AGAIN
    server.update()
    assert (server.adapter, server.channels.problems) == (name(NEW), {})


def test_an_older_promotion_is_not_replayed_not_even_after_a_restart(server: Server) -> None:
    server.promote(record(1))
    server.promote(record(2, NEW, previous=(OLD,)))
    for _ in range(2):
        server.promote(record(1))
        assert server.reason == "its sequence is 1, and this server has accepted 2 already"
        server.promote(record(2, OLD))
        assert server.reason == "its sequence is 2, and this server has accepted 2 already"
        server.restart()


def test_a_restarted_server_answers_as_before_while_the_newest_promotion_fails(server: Server) -> None:
    server.promote(record(1))
    server.broken[name(NEW)] = "the hub has no answer"
    server.promote(record(2, NEW))
    server.restart()

    async def start() -> None:
        following = asyncio.create_task(server.channels.follow())
        await server.channels.ready.wait()
        following.cancel()

    asyncio.run(start())
    assert (server.adapter, server.reason) == (name(OLD), f"{name(NEW)}: the hub has no answer")


def test_a_namespace_with_a_key_for_channels_follows_signed_promotions_only(server: Server) -> None:
    key_file = server.layout.key("team.channels")
    key_file.parent.mkdir()
    key_file.write_bytes(public_pem())
    server.promote(record(1), KEY)
    for key in (None, Ed25519PrivateKey.generate()):
        server.promote(record(2, NEW), key)
        assert (server.adapter, "the key team.channels.pub has not signed" in server.reason) == (name(OLD), True)
    server.promote(record(2, NEW), KEY)
    assert server.adapter == name(NEW)


def test_a_promotion_of_another_channel_or_namespace_is_not_followed(server: Server) -> None:
    server.promote(record(1).model_copy(update={"namespace": "other"}))
    assert server.reason == "it is of other/bot@prod"
    server.promote(record(1).model_copy(update={"name": "bot@canary"}), file="bot.prod.channel")
    assert server.reason == "it is of team/bot@canary"
    (server.layout.records / "team" / "bot.prod.channel").write_text("{}")
    server.update()
    assert "the record is not of a channel" in server.reason
    assert server.adapter is None


def test_a_channel_without_a_record_ends(server: Server) -> None:
    server.promote(record(1))
    (server.layout.records / "team" / "bot.prod.channel").unlink()
    server.update()
    assert server.adapter is None


def test_a_share_answers_its_conversations_and_each_stays_with_one_adapter(server: Server) -> None:
    server.promote(record(1, NEW, previous=(OLD,), percent=20))
    assert server.tried == [name(NEW), name(OLD)], "both answer"
    channel = server.channels.active[PROD]
    users = [choose(channel, {"user": f"user-{number}"}) for number in range(500)]
    assert users.count(name(NEW)) == pytest.approx(100, abs=30)
    chosen = []
    for number in range(500):
        begun = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {number}"}]
        longer = [*begun, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}]
        for field in ("messages", "input"):
            assert choose(channel, {field: begun}) == choose(channel, {field: longer})
        chosen.append(choose(channel, {"messages": begun}))
    assert chosen.count(name(NEW)) == pytest.approx(100, abs=30)


def test_a_memory_that_cannot_be_read_or_written_ends_no_other_channel(server: Server) -> None:
    server.promote(record(1).model_copy(update={"name": "bot@canary"}))
    accepted = server.layout.cache / "channels" / PROD
    accepted.mkdir(parents=True)
    server.promote(record(1))
    assert "the switch has failed" in server.reason
    assert server.channels.active.keys() == {"team/bot@canary"}
    accepted.rmdir()
    server.now += SECONDS_AGAIN
    server.update()
    assert server.adapter == name(OLD)


def test_an_unforeseen_error_ends_no_other_channel(server: Server) -> None:
    def fail(_: str) -> None:
        raise RuntimeError("the engine is dead")

    server.promote(record(1))
    server.failing = fail
    other = record(1, NEW).model_copy(update={"name": "bot@canary"})
    server.promote(other)
    assert "the engine is dead" in server.channels.problems["team/bot@canary"].reason
    assert server.adapter == name(OLD)
    server.now += SECONDS_AGAIN
    server.failing = None
    server.update()
    assert server.channels.active["team/bot@canary"] == other


def test_a_slow_adapter_delays_no_other_channel(server: Server) -> None:
    async def both() -> None:
        slow = asyncio.Event()

        async def try_adapter(adapter: str) -> str | None:
            if adapter == name(NEW):
                await slow.wait()
            return None

        server.channels.try_adapter = try_adapter
        server.write(record(1))
        server.write(record(1, NEW).model_copy(update={"name": "bot@canary"}))
        server.channels.update()
        await server.channels.settled(0.01)
        assert server.channels.active.keys() == {PROD}
        slow.set()
        await server.channels.settled(60)
        assert server.channels.active.keys() == {PROD, "team/bot@canary"}

    asyncio.run(both())


def test_an_adapter_of_a_channel_needs_no_announcement(server: Server) -> None:
    server.promote(record(1, NEW, previous=(OLD,)), KEY)
    channel = server.channels.active[PROD]
    for adapter in (NEW, OLD):
        no_key = server.layout.key("team.channels")
        assert find_address(server.layout.records, channel.name_of(adapter), no_key) == adapter.uri


def test_an_entry_hides_no_address_of_a_channel(server: Server) -> None:
    server.promote(record(1, NEW), KEY)
    entry = {"uri": "pvc://elsewhere/bot", "digest": f"sha256:{NEW.sha256}"}
    (server.layout.records / "team" / f"{NEW.job}.json").write_text(json.dumps(entry))
    found = find_address(server.layout.records, record(1).name_of(NEW), server.layout.key("team.channels"))
    assert found == NEW.uri


def answered(server: Server, body: bytes, parts: int = 1) -> dict[str, Any]:
    """Send a request through the middleware; what the server behind it receives."""
    received: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        received.update(body=message["body"], length=dict(scope["headers"]).get(b"content-length"))

    cuts = [round(len(body) * part / parts) for part in range(parts + 1)]
    pieces = [body[begin:end] for begin, end in pairwise(cuts)]
    messages = [{"type": "http.request", "body": piece, "more_body": piece is not pieces[-1]} for piece in pieces]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        raise AssertionError("the server behind it answers")

    headers = [(b"content-type", b"Application/JSON; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "headers": headers}
    asyncio.run(ChannelNames(app, server.channels)(scope, receive, send))
    return received


def test_a_request_to_a_channel_reaches_its_adapter(server: Server) -> None:
    server.promote(record(1))
    asked = {"model": PROD, "messages": [{"role": "user", "content": "ünd"}], "stream": True}
    for parts in (1, 3):
        received = answered(server, json.dumps(asked).encode(), parts)
        assert json.loads(received["body"]) == asked | {"model": name(OLD)}
        assert received["length"] == str(len(received["body"])).encode()


@pytest.mark.parametrize(
    "body", [b'{"model": "llama"}', b'{"model": "team/bot@canary"}', b"@", b'["@"]', b'{"a": "@"}']
)
def test_any_other_request_is_passed_as_it_is(server: Server, body: bytes) -> None:
    server.promote(record(1))
    assert answered(server, body) == {"body": body, "length": str(len(body)).encode()}
