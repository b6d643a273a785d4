"""Answers the probes and the scrapes, over IPv4 and IPv6."""

import errno
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from aiohttp import web

logger = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""The problem; None without one."""


@dataclass(frozen=True)
class Answer:
    """Body, type and status of an answer."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = HTTPStatus.OK


@dataclass
class Health:
    """Whether the process is alive, and whether it can do its work.

    Only a problem that a new process would cure makes it not live. A problem that an administrator or the API server
    has to cure makes it not ready: it waits for that, and a rollout waits with it.
    """

    live: dict[str, Check] = field(default_factory=dict)
    ready: dict[str, Check] = field(default_factory=dict)
    note: Check = lambda: None
    """A note although the operator is ready; None without one."""

    def liveness(self) -> Answer:
        """The answer to /healthz."""
        return _judge(self.live)

    def readiness(self) -> Answer:
        """The answer to /readyz."""
        return _judge(self.ready, self.note())


def _judge(checks: Mapping[str, Check], note: str | None = None) -> Answer:
    problems = [problem for check in checks.values() if (problem := check())]
    if problems:
        return Answer("\n".join((*problems, "")).encode(), status=HTTPStatus.SERVICE_UNAVAILABLE)
    return Answer(f"ok{f': {note}' if note else ''}\n".encode())


class PortError(Exception):
    """A port cannot be opened."""


@asynccontextmanager
async def serving(ports: Mapping[int, Mapping[str, Callable[[], Answer]]]) -> AsyncIterator[None]:
    """Answer GET requests for the paths on each port, until the block ends.

    Raises PortError.
    """
    runners: list[web.AppRunner] = []
    try:
        for port, paths in ports.items():
            application = web.Application()
            application.add_routes([web.get(path, _handler(answer)) for path, answer in paths.items()])
            runner = web.AppRunner(application, handle_signals=False, access_log=None, shutdown_timeout=1)
            await runner.setup()
            runners.append(runner)
            await web.SockSite(runner, listen(port)).start()
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def _handler(answer: Callable[[], Answer]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_request: web.Request) -> web.Response:
        given = answer()
        return web.Response(body=given.body, status=given.status, headers={"Content-Type": given.content_type})

    return handle


def listen(port: int) -> socket.socket:
    """Open a socket for IPv6 and IPv4, or IPv4 alone without IPv6 in the kernel.

    Raises PortError.
    """
    try:
        try:
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            return socket.create_server(("0.0.0.0", port), backlog=128)  # noqa: S104 - the kubelet's address varies
    except OSError as error:
        raise PortError(f"port {port} cannot be opened: {error.strerror}") from error
