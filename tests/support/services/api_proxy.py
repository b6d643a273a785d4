"""A proxy between an operator and the API server, whose weather a test changes while both run.

Unlike `fault_proxy` it passes watches on as they come, and can go away and come back on the same port.
"""

import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_OF_ONE_CONNECTION = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"})


@dataclass(frozen=True)
class Request:
    """A request as it came in."""

    method: str
    path: str
    """With the query."""
    body: bytes = b""

    @property
    def watches(self) -> bool:
        return "watch=true" in self.path


@dataclass(frozen=True)
class Reply:
    """An answer to a request instead of the API server's."""

    status: int
    body: bytes = b""
    """A Status object if empty."""
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


Weather = Callable[[Request], Reply | None]
"""The reply to a request; None to pass it on."""


def fair(_request: Request) -> Reply | None:
    """Pass every request on."""
    return None


@dataclass
class ApiProxy:
    """A loopback address in front of an API server with TLS; passes credentials on."""

    upstream: str = ""
    """HOST:PORT of the API server; empty if every request has weather."""
    authority: Path = Path()
    host: str = "127.0.0.1"
    identity: tuple[Path, Path] | None = None
    """Certificate and key, if it serves TLS too, from when it rises."""
    weather: Weather = fair
    seen: list[Request] = field(default_factory=list)
    silent: threading.Event = field(default_factory=threading.Event)
    """While set, no new request is answered, and its connection stays open."""
    port: int = 0
    _connections: set[socket.socket] = field(default_factory=set)
    _streams: set[socket.socket] = field(default_factory=set)
    _frozen: set[socket.socket] = field(default_factory=set)
    _server: "ThreadingHTTPServer | None" = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.identity else ''}://{host}:{self.port}"

    @property
    def up(self) -> bool:
        return self._server is not None

    def rise(self) -> None:
        """Accept connections, always on the same port."""
        handler = type("Handler", (_Handler,), {"proxy": self})
        kind = type("Server", (_Server,), {"address_family": socket.AF_INET6 if ":" in self.host else socket.AF_INET})
        server = kind((self.host, self.port), handler)
        if self.identity is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*self.identity)
            # The handshake is for the connection's own thread.
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self.port, self._server = server.server_port, server
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def fall(self) -> None:
        """Reject connections, and end the open ones."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        self.cut()

    def cut(self) -> None:
        """End every open connection, wherever its answer is."""
        for connection in tuple(self._connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def freeze(self) -> None:
        """Let nothing more arrive on the watches that are open, which stay open."""
        self._frozen |= self._streams

    def count(self, method: str, words: str) -> int:
        """The number of requests of this method with these words in their path."""
        return sum(request.method == method and words in request.path for request in tuple(self.seen))


@contextmanager
def serve_api(proxy: ApiProxy) -> Iterator[ApiProxy]:
    """Serve until the block ends."""
    proxy.rise()
    try:
        yield proxy
    finally:
        proxy.fall()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """Nothing: this proxy exists to end connections anywhere."""


class _Handler(BaseHTTPRequestHandler):
    proxy: ApiProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing: the requests are kept."""

    def setup(self) -> None:
        super().setup()
        self.proxy._connections.add(self.connection)

    def finish(self) -> None:
        self.proxy._connections.discard(self.connection)
        self.proxy._streams.discard(self.connection)
        self.proxy._frozen.discard(self.connection)
        super().finish()

    def _handle(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, self.path, content)
        self.proxy.seen.append(request)
        if self.proxy.silent.is_set():
            self.connection.settimeout(None)
            self.rfile.read()
            self.close_connection = True
            return
        if reply := self.proxy.weather(request):
            self._reply(reply)
            return
        context = ssl.create_default_context(cafile=self.proxy.authority)
        connection = http.client.HTTPSConnection(self.proxy.upstream, timeout=60, context=context)
        try:
            connection.putrequest(self.command, self.path, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("host", "connection", "transfer-encoding", "content-length"):
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(content)))
            connection.endheaders(content)
            if request.watches:
                self.proxy._streams.add(self.connection)
            self._pass(connection.getresponse())
        finally:
            connection.close()

    def _pass(self, answer: http.client.HTTPResponse) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _OF_ONE_CONNECTION:
                self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while data := answer.read1(65536):
            if self.connection not in self.proxy._frozen:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if self.connection not in self.proxy._frozen:
            self.wfile.write(b"0\r\n\r\n")

    def _reply(self, reply: Reply) -> None:
        problem = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": reply.status}
        body = reply.body or json.dumps(problem | {"message": f"the weather is {reply.status}"}).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if reply.status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815 - names of http.server
