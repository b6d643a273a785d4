"""Sends HTTP requests to the API server at the least cost.

Every pass of the operator pays for it. The Kubernetes client's own path turns each body into plain objects once more
and reads proxies and passwords from the environment and from files for each request: together as expensive as the rest
of a pass.
"""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlencode

import aiohttp

Query = list[tuple[str, str]]
Headers = Sequence[tuple[str, str]]
_TIMEOUT = aiohttp.ClientTimeout(total=15, connect=5)
# Shorter than the 90 seconds until the API server closes an unused connection.
_KEEPALIVE_SECONDS = 60.0
_CONNECTIONS = 100
_UNAUTHORIZED = 401


OnRequest = Callable[[str, str, int | None, float], None]
"""Called after a request with its method, its path, the status of the answer (None without one) and the seconds."""


def unobserved(_method: str, _path: str, _status: int | None, _seconds: float) -> None:
    """Observe no request."""


_ESCAPED = {character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def as_go_writes(body: object) -> bytes:
    """Encode JSON as Go's encoder does.

    The API server compares the data of a ControllerRevision byte by byte with what it encodes itself: in another
    encoding no client, and not the garbage collector either, could change its metadata.
    """
    text = json.dumps(body, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    # str.translate takes several times as long as the encoder.
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    # A pod's message may have half of a surrogate pair, which no UTF-8 has.
    return text.encode(errors="replace")


class TooLongError(Exception):
    """The content of an answer is longer than the caller wants to read."""


@dataclass(frozen=True)
class Credentials:
    """The credentials that operator and API server authenticate with."""

    authorization: str | None
    """The header's value."""
    tls: ssl.SSLContext
    """With the trusted authorities, and the operator's certificate if it has one."""


@dataclass(frozen=True)
class Endpoint:
    """Where the API server is, and how to connect to it."""

    server: str
    credentials: Callable[[], Awaitable[Credentials]]
    """Asked for with each request, because a token is replaced while it is used."""
    renew: Callable[[], Awaitable[None]]
    """Renews all credentials, with another TLS context, after one side has rejected the other's."""
    server_hostname: str | None = None
    """Name in the server's certificate, if it is not that of its address."""
    proxy: str | None = None
    """Only what the configuration names: the environment's proxies are for other servers."""
    proxy_headers: Mapping[str, str] | None = None


class Transport:
    """One session with kept connections."""

    def __init__(
        self,
        endpoint: Endpoint,
        session: aiohttp.ClientSession,
        on_request: OnRequest = unobserved,
        *,
        own_headers: Headers = (),
        token: str | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._session = session
        self._on_request = on_request
        self._own_headers = own_headers
        """Sent with each request. A name may be repeated, as Impersonate-Group is."""
        self._token = token
        """Sent instead of the endpoint's own one."""
        self._renewing = asyncio.Lock()

    def impersonating(self, headers: Headers) -> Self:
        """Return a transport of the same connections whose requests have these headers too."""
        return type(self)(self._endpoint, self._session, self._on_request, own_headers=headers)

    def with_token(self, token: str) -> Self:
        """Return a transport of the same connections whose requests have this token instead of the own one."""
        return type(self)(self._endpoint, self._session, self._on_request, token=token)

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        headers: Mapping[str, str],
        timeout: aiohttp.ClientTimeout = _TIMEOUT,  # noqa: ASYNC109 - passed on to the HTTP client
        most: int | None = None,
        turn: AbstractAsyncContextManager[Any] | None = None,
    ) -> tuple[int, bytes]:
        """Send a request and return status and content of the answer.

        `most`: bytes of content; a longer one is not read to its end, and raises TooLongError. `turn`: entered while
        the content is read, and not while the server prepares it. Raises aiohttp.ClientError, TimeoutError or OSError
        without an answer, and ValueError if the body has a number that JSON does not have (infinite, or none at all).
        """
        url = f"{self._endpoint.server}{path}{'?' + urlencode(query) if query else ''}"
        data = None if body is None else as_go_writes(body)

        async def send_with(credentials: Credentials) -> tuple[int, bytes]:
            began, answered = time.monotonic(), list[int]()
            own_turn = turn or nullcontext()
            sent = (method, url, data, headers, credentials, timeout, most)
            try:
                answer = await self._send(*sent, own_turn, answered.append)
            except Exception:
                # Not if it was canceled: its answer is unknown.
                self._on_request(method, path, next(iter(answered), None), time.monotonic() - began)
                raise
            self._on_request(method, path, answer[0], time.monotonic() - began)
            return answer

        used = await self._endpoint.credentials()
        try:
            answer = await send_with(used)
        except aiohttp.ClientConnectorCertificateError:
            # Nothing has been sent. The authority may have been replaced, as the token is: in a file.
            return await send_with(await self._renewed(used))
        # A user's token is not renewed: with each wrong one, all connections would be closed.
        if answer[0] != _UNAUTHORIZED or self._token is not None:
            return answer
        renewed = await self._renewed(used)
        return answer if renewed.authorization == used.authorization else await send_with(renewed)

    async def _send(
        self,
        method: str,
        url: str,
        data: bytes | None,
        headers: Mapping[str, str],
        credentials: Credentials,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - passed on to the HTTP client
        most: int | None,
        turn: AbstractAsyncContextManager[Any],
        on_status: Callable[[int], None],
    ) -> tuple[int, bytes]:
        """`on_status`: called once the answer has begun."""
        authorization = credentials.authorization if self._token is None else f"Bearer {self._token}"
        endpoint = self._endpoint
        async with self._session.request(
            method,
            url,
            data=data,
            headers=[
                *headers.items(),
                *self._own_headers,
                *([("Authorization", authorization)] if authorization else []),
            ],
            timeout=timeout,
            allow_redirects=False,
            ssl=credentials.tls,
            server_hostname=endpoint.server_hostname,
            proxy=endpoint.proxy,
            proxy_headers=endpoint.proxy_headers,
        ) as response:
            on_status(response.status)
            async with turn:
                content = await (response.read() if most is None else _read(response.content, most))
            return response.status, content

    async def _renewed(self, rejected: Credentials) -> Credentials:
        """Renew rejected credentials once, however many requests were rejected."""
        async with self._renewing:
            if (await self._endpoint.credentials()).tls is rejected.tls:
                await self._endpoint.renew()
            return await self._endpoint.credentials()


async def _read(content: aiohttp.StreamReader, most: int) -> bytes:
    parts: list[bytes] = []
    length = 0
    async for part in content.iter_any():
        length += len(part)
        if length > most:
            raise TooLongError(f"more than {most} bytes")
        parts.append(part)
    return b"".join(parts)


@asynccontextmanager
async def open_transport(
    endpoint: Endpoint,
    user_agent: str,
    on_request: OnRequest = unobserved,
) -> AsyncIterator[Transport]:
    """A transport whose connections end with the block."""
    connector = aiohttp.TCPConnector(limit=_CONNECTIONS, keepalive_timeout=_KEEPALIVE_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": user_agent},
    ) as session:
        yield Transport(endpoint, session, on_request)
