"""Follows the channels of the mounted records, and chooses the adapter that answers a request to one."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from pydantic import TypeAdapter, ValidationError

from qlora_api.channel import Channel
from qlora_cli.channel_record import decode
from qlora_cli.verification import NotVerified
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.publishing.signing import read_public_key
from qlora_vllm.cache import Layout

_LOG = logging.getLogger("vllm.qlora")
_SEQUENCE = Gauge("qlora_channel_sequence", "Sequence of the promotion in effect.", ["channel"])
_BEHIND = Gauge(
    "qlora_channel_behind", "1 while a newer promotion is not in effect, for the reason in the log.", ["channel"]
)
SECONDS = 5.0
"""Between readings of the records. The kubelet takes up to a minute to update them."""
SECONDS_AGAIN = 60.0
"""Until a promotion that failed is tried again."""
_ACCEPTED = TypeAdapter(dict[str, Channel])


@dataclass(frozen=True)
class Problem:
    """Why a newer promotion is not in effect."""

    reason: str
    sequence: int | None
    """None for a record that cannot be read."""
    until: float = field(compare=False)
    """When the record is tried again, in seconds of the monotonic clock."""


def read_channel(file: Path, namespace: str, key_file: Path) -> Channel:
    """Read a record; if the namespace has a key for channels, a signed one.

    Raises NotVerified or ValueError, also if the record is of another channel than the file's name.
    """
    try:
        record = decode(file.read_text(), namespace, file.name)
    except ValidationError:
        raise ValueError("the record is not of a channel, or of a later release") from None
    if key_file.is_file() and not record.is_signed_by(read_public_key(key_file.read_bytes())):
        raise NotVerified(f"the key {key_file.name} has not signed the record")
    return record.channel


def choose(channel: Channel, request: Mapping[str, Any]) -> str:
    """Return the immutable name of the adapter that answers a request.

    With a share of traffic, one user or one conversation stays with one adapter: the choice follows the request's
    `user`, or else its first message or its prompt.
    """
    if channel.percent is None or not channel.previous:
        return str(channel.name_of(channel.adapter))
    messages = request.get("messages")
    first = messages[0] if isinstance(messages, list) and messages else request.get("prompt", request.get("input"))
    chooser = json.dumps([channel.full_name, request.get("user") or first], sort_keys=True)
    is_chosen = int.from_bytes(sha256(chooser.encode()).digest()[:8]) % 100 < channel.percent
    return str(channel.name_of(channel.adapter if is_chosen else channel.previous[0]))


@dataclass
class Channels:
    """The channels that the server answers to."""

    layout: Layout
    try_adapter: Callable[[str], Awaitable[str | None]]
    """Loads the adapter of the name and answers one token with it. Returns why it cannot."""
    active: dict[str, Channel] = field(default_factory=dict)
    """By the name in requests. Each was in effect here, with an answer by each of its adapters."""
    problems: dict[str, Problem] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    async def follow(self) -> None:
        """Bring what was accepted before a restart into effect, and then each newer record, for ever."""
        for channel in self._accepted().values():
            await self._accept(channel)
        while True:
            await self.update()
            await asyncio.sleep(SECONDS)

    async def update(self) -> None:
        """Bring newer records into effect; drop channels whose record is gone."""
        found = dict(self._files())
        for name in (self.active.keys() | self.problems.keys()) - found.keys():
            self.active.pop(name, None)
            self.problems.pop(name, None)
        for name, (namespace, file) in found.items():
            try:
                channel = read_channel(file, namespace, self.layout.key(f"{namespace}.channels"))
            except (NotVerified, ValueError, OSError) as error:
                self._set_problem(name, str(error))
                continue
            await self._accept(channel)

    async def _accept(self, channel: Channel) -> None:
        """Switch to the record once each of its adapters has answered. Requests that run are not touched."""
        name, problem = channel.full_name, self.problems.get(channel.full_name)
        if channel == self.active.get(name):
            self._set_problem(name, None)
            return
        if problem is not None and problem.sequence == channel.sequence and self.clock() < problem.until:
            return
        last = self.active.get(name) or self._accepted().get(name)
        if last is not None and channel.sequence <= last.sequence and channel != last:
            older = f"its sequence is {channel.sequence}, and this server has accepted {last.sequence} already"
            self._set_problem(name, older, channel.sequence)
            return
        for adapter in (channel.adapter, *(channel.previous[:1] if channel.percent is not None else ())):
            if (reason := await self.try_adapter(str(channel.name_of(adapter)))) is not None:
                self._set_problem(name, f"{channel.name_of(adapter)}: {reason}", channel.sequence)
                return
        self.active[name] = channel
        _SEQUENCE.labels(name).set(channel.sequence)
        self._set_problem(name, None)
        accepted = self._accepted() | {name: channel}
        self.layout.cache.mkdir(parents=True, exist_ok=True)
        write_atomically(self._accepted_file, _ACCEPTED.dump_json(accepted, by_alias=True))
        _LOG.info("%s leads to %s (promotion %d)", name, channel.name_of(channel.adapter), channel.sequence)

    def _files(self) -> Iterator[tuple[str, tuple[str, Path]]]:
        """Yield the name, the namespace and the file of each mounted record."""
        for file in sorted(self.layout.records.glob("*/*.channel")):
            name, _, channel = file.name.removesuffix(".channel").partition(".")
            yield f"{file.parent.name}/{name}@{channel}", (file.parent.name, file)

    @property
    def _accepted_file(self) -> Path:
        return self.layout.cache / "channels.json"

    def _accepted(self) -> dict[str, Channel]:
        """Return the records that were in effect last, by name, also those before a restart."""
        return _ACCEPTED.validate_json(self._accepted_file.read_bytes()) if self._accepted_file.is_file() else {}

    def _set_problem(self, name: str, reason: str | None, sequence: int | None = None) -> None:
        _BEHIND.labels(name).set(reason is not None)
        if reason is None:
            self.problems.pop(name, None)
            return
        problem = Problem(reason, sequence, self.clock() + SECONDS_AGAIN)
        if self.problems.get(name) != problem:
            _LOG.warning("%s: the promotion is not in effect: %s", name, reason)
        self.problems[name] = problem

    def status(self) -> Iterator[dict[str, object]]:
        """Yield each channel with the promotion in effect, and why a newer one is not."""
        for name in sorted(self.active.keys() | self.problems.keys()):
            active, problem = self.active.get(name), self.problems.get(name)
            shares = active is not None and active.percent is not None and bool(active.previous)
            yield {
                "name": name,
                "sequence": active and active.sequence,
                "adapter": active and str(active.name_of(active.adapter)),
                "percent": active and active.percent,
                "previous": str(active.name_of(active.previous[0])) if active is not None and shares else None,
                "problem": problem and {"sequence": problem.sequence, "reason": problem.reason},
            }
