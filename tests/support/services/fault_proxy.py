"""A proxy on loopback that passes requests on to a real server, or answers instead."""

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from tests.support.services.serving import serving

_OF_ONE_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"})


@dataclass(frozen=True)
class Request:
    """A request as it came in."""

    method: str
    path: str
    """With the query."""
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Fault:
    """A fault of a request. Without a status the real server's answer is used."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    drop: bool = False
    """Whether the connection ends without an answer, and without the request at the real server."""
    cut: int | None = None
    """Bytes of the body that arrive before the connection ends."""
    missing: int = 0
    """Bytes at the body's end that are left out of an answer that looks whole."""
    stall: bool = False
    """Whether the connection stays open, and silent, where it is cut."""
    corrupt: bool = False
    """Whether the last byte of the body arrives changed."""
    replace: Mapping[str, str] = field(default_factory=dict)
    """Headers with which the request is passed on."""
    corrupt_request: bool = False
    """Whether the last byte of what is sent arrives changed."""


@dataclass
class FaultProxy:
    """The proxy: the requests it has seen, and its rules for them."""

    upstream: str
    """HOST:PORT of the real server; empty if every request gets an answer of the rule."""
    host: str = "127.0.0.1"
    rule: Callable[[Request], Fault | None] = lambda _request: None
    seen: list[Request] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    address: str = ""
    """HOST:PORT of the proxy."""

    def lines(self, method: str) -> list[str]:
        """Paths that were requested with this method."""
        return [request.path for request in self.seen if request.method == method]


@contextmanager
def serve_proxy(proxy: FaultProxy) -> Iterator[FaultProxy]:
    """Answer on a free port until the block ends."""
    with serving(_Handler, proxy.host, proxy=proxy) as proxy.address:
        try:
            yield proxy
        finally:
            proxy.ended.set()


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultProxy

    def _handle(self) -> None:
        request = Request(self.command, self.path, dict(self.headers.items()))
        self.proxy.seen.append(request)
        content = self._content()
        fault = self.proxy.rule(request) or Fault()
        if fault.drop:
            self.close_connection = True
            return
        if fault.status is not None:
            self._answer(fault.status, fault.headers, fault.body, fault)
            return
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        # The host stays the client's: it is signed.
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        if fault.corrupt_request and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        for name, value in {**request.headers, **fault.replace}.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "expect"):
                connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(content)))
        connection.endheaders(content)
        answer = connection.getresponse()
        self._answer(answer.status, dict(answer.getheaders()), answer.read(), fault)
        connection.close()

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault) -> None:
        body = body[: len(body) - fault.missing]
        length = str(len(body))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _OF_ONE_CONNECTION:
                self.send_header(name, value)
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault.corrupt and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.command != "HEAD":
            self.wfile.write(body[: fault.cut])
        if fault.stall:
            self.wfile.flush()
            self.proxy.ended.wait()
        if fault.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815 - names of http.server
