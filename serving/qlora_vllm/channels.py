"""Follows the channels of the mounted records, and chooses the adapter that answers a request to one."""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from pydantic import ValidationError

from qlora_api.channel import Channel, ServedChannel, ServedProblem, channel_key
from qlora_api.schema import replace
from qlora_cli.verification import NotVerified
from qlora_trainer.core.filesystem import write_atomically
from qlora_vllm.layout import Layout
from qlora_vllm.records import read_channel

_LOG = logging.getLogger("vllm.qlora")
_SEQUENCE = Gauge("qlora_channel_sequence", "Sequence of the promotion in effect.", ["channel"])
_BEHIND = Gauge(
    "qlora_channel_behind", "1 while a newer promotion is not in effect, for the reason in the log.", ["channel"]
)
SECONDS = 5.0
"""Between readings of the records. The kubelet takes up to a minute to update them."""
SECONDS_AGAIN = 60.0
"""Until a promotion that failed is tried again."""
READY_SECONDS = 600.0
"""That a starting server waits for its channels, twice, before it is ready without them."""
SWITCH_SECONDS = 1800.0
"""That the download and the first answer of an adapter may take."""


@dataclass(frozen=True)
class Problem:
    """Why a newer promotion is not in effect."""

    reason: str
    sequence: int | None
    """None for a record that cannot be read."""
    until: float = field(compare=False)
    """When the record is tried again, in seconds of the monotonic clock."""


def choose(channel: Channel, request: Mapping[str, Any]) -> str:
    """Return the immutable name of the adapter that answers a request.

    With a share of traffic, one user or one conversation stays with one adapter: the choice follows the request's
    `user`, or else the first message that is not the system's, or the prompt.
    """
    if channel.percent is None or not channel.previous:
        return str(channel.name_of(channel.adapter))
    chooser = json.dumps([channel.full_name, request.get("user") or _beginning(request)], sort_keys=True)
    is_chosen = int.from_bytes(sha256(chooser.encode()).digest()[:8]) % 100 < channel.percent
    return str(channel.name_of(channel.adapter if is_chosen else channel.previous[0]))


def _beginning(request: Mapping[str, Any]) -> object:
    """Return the part of a conversation that all its requests have, and few other conversations."""
    messages = request.get("messages", request.get("input", request.get("prompt")))
    if not isinstance(messages, list):
        return messages
    return next((each for each in messages if not _is_of_system(each)), messages)


def _is_of_system(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


@dataclass
class Channels:
    """The channels that the server answers to."""

    layout: Layout
    try_adapter: Callable[[str], Awaitable[str | None]]
    """Loads the adapter of the name and answers one token with it. Returns why it cannot."""
    active: dict[str, Channel] = field(default_factory=dict)
    """By the name in requests. Each was in effect here, with an answer by each of its adapters."""
    problems: dict[str, Problem] = field(default_factory=dict)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once each channel that was there at the start is in effect, or has a problem."""
    clock: Callable[[], float] = time.monotonic
    _switching: dict[str, "asyncio.Task[None]"] = field(default_factory=dict)
    """By the name of the channel: one that is slow to load delays no other."""

    async def follow(self) -> None:
        """Bring what was accepted before a restart into effect, and then each newer record, for ever."""
        for name in self._files():
            if (accepted := self._accepted(name)) is not None:
                self._begin(name, accepted)
        await self.settled(READY_SECONDS)
        self.update()
        await self.settled(READY_SECONDS)
        self.ready.set()
        while True:
            await asyncio.sleep(SECONDS)
            self.update()

    def update(self) -> None:
        """Begin to bring newer records into effect; drop channels whose record is gone."""
        found = self._files()
        for name in (self.active.keys() | self.problems.keys()) - found.keys():
            self.active.pop(name, None)
            self.problems.pop(name, None)
            for metric in (_SEQUENCE, _BEHIND):
                with suppress(KeyError):
                    metric.remove(name)
        for name, (namespace, file) in found.items():
            try:
                self._begin(name, read_channel(file, namespace, self.layout.key(f"{namespace}.channels")))
            except (NotVerified, ValueError, OSError) as error:
                self._set_problem(name, str(error))

    async def settled(self, seconds: float) -> None:
        """Wait until the switches that have begun end, or for so many seconds."""
        if self._switching:
            await asyncio.wait(list(self._switching.values()), timeout=seconds)

    def _begin(self, name: str, channel: Channel) -> None:
        """Start to switch to the record, unless it is in effect or was tried a short time ago."""
        problem, last = self.problems.get(name), self.active.get(name) or self._accepted(name)
        if name in self._switching or (
            problem is not None and problem.sequence == channel.sequence and self.clock() < problem.until
        ):
            return
        if channel == self.active.get(name):
            self._set_problem(name, None)
        elif last is not None and channel.sequence <= last.sequence and channel != last:
            older = f"its sequence is {channel.sequence}, and this server has accepted {last.sequence} already"
            self._set_problem(name, older, channel.sequence)
        else:
            task = asyncio.create_task(self._switch(name, channel))
            self._switching[name] = task
            task.add_done_callback(partial(self._end, name, channel))

    async def _switch(self, name: str, channel: Channel) -> None:
        """Switch to the record once each of its adapters has answered. Requests that run are not touched."""
        for adapter in (channel.adapter, *(channel.previous[:1] if channel.percent is not None else ())):
            async with asyncio.timeout(SWITCH_SECONDS):
                reason = await self.try_adapter(str(channel.name_of(adapter)))
            if reason is not None:
                self._set_problem(name, f"{channel.name_of(adapter)}: {reason}", channel.sequence)
                return
        # Before the switch: without this memory, an older record could be replayed after a restart.
        write_atomically(self._accepted_file(name), channel.model_dump_json(by_alias=True).encode())
        self.active[name] = channel
        _SEQUENCE.labels(name).set(channel.sequence)
        self._set_problem(name, None)
        _LOG.info("%s leads to %s (promotion %d)", name, channel.name_of(channel.adapter), channel.sequence)

    def _end(self, name: str, channel: Channel, task: "asyncio.Task[None]") -> None:
        """Note the end of a switch, also by an error that nothing has foreseen."""
        del self._switching[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("%s: the switch has failed", name, exc_info=error)
            self._set_problem(name, f"the switch has failed: {error!r:.500}", channel.sequence)

    def _files(self) -> dict[str, tuple[str, Path]]:
        """Return the namespace and the file of each mounted record, by the channel's name in requests."""
        found = {}
        for file in sorted(self.layout.records.glob("*/*.channel")):
            name = file.name.removesuffix(".channel").replace(".", "@")
            # A user may have written another key.
            with suppress(ValueError):
                if channel_key(name) == file.name:
                    found[f"{file.parent.name}/{name}"] = (file.parent.name, file)
        return found

    def _accepted_file(self, name: str) -> Path:
        return self.layout.cache / "channels" / name

    def _accepted(self, name: str) -> Channel | None:
        """Return the record that was in effect last, also before a restart, or None."""
        try:
            return Channel.model_validate_json(self._accepted_file(name).read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError):
            _LOG.exception("%s cannot be read: an older promotion could come into effect", self._accepted_file(name))
            return None

    def _set_problem(self, name: str, reason: str | None, sequence: int | None = None) -> None:
        _BEHIND.labels(name).set(reason is not None)
        if reason is None:
            self.problems.pop(name, None)
            return
        problem = Problem(reason, sequence, self.clock() + SECONDS_AGAIN)
        if self.problems.get(name) != problem:
            _LOG.warning("%s: the promotion is not in effect: %s", name, reason)
        self.problems[name] = problem

    def status(self) -> Iterator[ServedChannel]:
        """Yield each channel with the promotion in effect, and why a newer one is not."""
        for name in sorted(self.active.keys() | self.problems.keys()):
            active, problem = self.active.get(name), self.problems.get(name)
            served = ServedChannel(
                name=name,
                problem=problem and ServedProblem(sequence=problem.sequence, reason=problem.reason),
            )
            if active is not None:
                shares = active.percent is not None and active.previous
                served = replace(
                    served,
                    sequence=active.sequence,
                    adapter=str(active.name_of(active.adapter)),
                    percent=active.percent,
                    previous=str(active.name_of(active.previous[0])) if shares else None,
                )
            yield served
