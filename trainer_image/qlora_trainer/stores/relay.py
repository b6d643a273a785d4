"""Passes the connections of the object stores' client on to the administrator's proxy, for listed servers only.

The client follows redirects and takes credentials with it to any host: see `Route`. A proxy between it and the
administrator's decides where it may go, and keeps the password.
"""

import socket
import threading
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from qlora_api.printable import first_line
from qlora_trainer.core.network import Proxy

_CONNECT_SECONDS = 30
_BLOCK_BYTES = 2**16


@dataclass
class Relay:
    """A running relay, and what it has met."""

    address: str = ""
    """Its own, on the loopback interface."""
    has_denied: bool = False
    """Whether the latest connection was to a server that is none of its own."""
    trouble: str = "it does not answer"
    """Why the latest connection that failed did."""


@cache
def start_relay(proxy: Proxy, servers: frozenset[str]) -> Relay:
    """Start a proxy to `servers` (HOST:PORT) only, until the process ends."""
    relay = Relay()
    handler = type("Handler", (_Handler,), {"proxy": proxy, "servers": servers, "relay": relay})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    relay.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True, name="relay").start()
    return relay


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    servers: frozenset[str]
    relay: Relay

    def log_message(self, *_: object) -> None:
        """Nothing: what fails is reported by the client."""

    def do_CONNECT(self) -> None:
        """Connect the client with the server that it names, through the proxy."""
        if self.path.lower() not in self.servers:
            self.relay.has_denied = True
            self.send_error(403)
            return
        self.relay.has_denied = False
        try:
            upstream = _tunnel(self.proxy.url, self.path)
        except OSError as error:
            self.relay.trouble = first_line(error)
            self.send_error(502)
            return
        self.send_response(200)
        self.end_headers()
        with upstream:
            back = threading.Thread(target=_copy, args=(upstream, self.connection), daemon=True)
            back.start()
            _copy(self.connection, upstream)
            back.join()
        self.close_connection = True


def _tunnel(proxy: str, server: str) -> socket.socket:
    """Connect to the server through the proxy. Raises OSError if either fails."""
    address = urlsplit(proxy)
    host, _, port = server.rpartition(":")
    connection = HTTPConnection(address.hostname or "", address.port or 80, timeout=_CONNECT_SECONDS)
    connection.set_tunnel(host, int(port), headers=_login(address.username, address.password))
    connection.connect()
    connection.sock.settimeout(None)
    return connection.sock


def _login(user: str | None, password: str | None) -> dict[str, str]:
    if user is None:
        return {}
    login = f"{unquote(user)}:{unquote(password or '')}".encode()
    return {"Proxy-Authorization": f"Basic {b64encode(login).decode()}"}


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Forward data until either side closes, and pass its end on."""
    try:
        while block := source.recv(_BLOCK_BYTES):
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # Either side has broken off: the other must not wait for it.
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
