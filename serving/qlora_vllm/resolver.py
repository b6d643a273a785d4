"""Resolves names of adapters to verified folders, and keeps the reasons against the others."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import Counter

from qlora_api.channel import AdapterName, parse_adapter_name
from qlora_cli.verification import NotVerified
from qlora_trainer.core.failures import StepFailure

_LOG = logging.getLogger("vllm.qlora")
_RESOLVED = Counter("qlora_adapters_resolved", "Attempts to resolve the name of an adapter.", ["outcome"])
SECONDS_AGAIN = 10.0
"""Until an adapter that could not be read is tried again."""
REJECTED_SECONDS = 300.0
"""The same for one that differs from what was signed, or from what the server allows."""
MAX_SECONDS = 120.0
"""That a request waits for a download, which then continues."""
MAX_REASONS = 1000
DOWNLOADS = 4
"""At the same time."""


@dataclass(frozen=True)
class Outcome:
    """The last attempt to serve an adapter."""

    reason: str | None
    """Why it is not served; None if it is."""
    until: float
    """When it is tried again, in seconds of the monotonic clock."""


@dataclass
class Resolver:
    """Provides an adapter once for all requests that name it at the same time."""

    provide: Callable[[AdapterName], Path]
    """Returns the verified folder. Raises NotVerified, ValueError, OSError or StepFailure."""
    clock: Callable[[], float] = time.monotonic
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    """By well-formed name, the oldest first. Clients may invent them, so their number is limited."""
    _running: dict[str, "asyncio.Future[Path]"] = field(default_factory=dict)
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(DOWNLOADS, "qlora-adapters"))

    async def resolve(self, text: str, seconds: float = MAX_SECONDS) -> Path | None:
        """Return the folder of the adapter, or None if it is not served, with the reason in `outcomes`.

        `seconds`: how long to wait for a download, which then continues.
        """
        try:
            name = parse_adapter_name(text)
        except ValueError:
            # Of any length, and any client may invent it: it is counted only.
            _RESOLVED.labels("unknown").inc()
            return None
        last = self.outcomes.get(text)
        if last is not None and self.clock() < last.until:
            return None
        running = self._begin(text, name)
        try:
            folder = await asyncio.wait_for(asyncio.shield(running), seconds)
        except NotVerified as difference:
            self.record(text, "rejected", str(difference))
        except (ValueError, OSError, StepFailure) as error:
            # A TimeoutError is an OSError, also that of a server.
            if running.done():
                self.record(text, "unavailable", str(error))
            else:
                self.record(text, "waiting", "it is still being downloaded: ask again later")
        else:
            self.record(text, "served", None)
            return folder
        return None

    def _begin(self, text: str, name: AdapterName) -> "asyncio.Future[Path]":
        """Return the running download of the name, or start one."""
        if text not in self._running:
            future = asyncio.get_running_loop().run_in_executor(self._threads, self.provide, name)
            self._running[text] = future
            future.add_done_callback(lambda _: self._running.pop(text))
        return self._running[text]

    def record(self, text: str, outcome: str, reason: str | None) -> None:
        """Note the outcome of a well-formed name."""
        if reason is not None:
            _LOG.warning("adapter %.200r is not served: %s", text, reason)
        _RESOLVED.labels(outcome).inc()
        self.outcomes.pop(text, None)
        while len(self.outcomes) >= MAX_REASONS:
            del self.outcomes[next(iter(self.outcomes))]
        again = 0.0 if reason is None else REJECTED_SECONDS if outcome == "rejected" else SECONDS_AGAIN
        self.outcomes[text] = Outcome(reason, self.clock() + again)
