"""Runs a request handler of the standard library on this machine."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from devcluster.addresses import LOOPBACK


@contextmanager
def serving(
    handler: type[BaseHTTPRequestHandler],
    host: str = LOOPBACK,
    *,
    tls: tuple[Path, Path] | None = None,
    **attributes: object,
) -> Iterator[str]:
    """Answer with the handler, given these attributes, until the block ends; its HOST:PORT.

    `tls`: the server's certificate and its key, in PEM.
    """
    # Header and body are two writes, and a client that waits before it acknowledges the first costs 40 ms.
    fixed = {"protocol_version": "HTTP/1.1", "disable_nagle_algorithm": True, "log_message": lambda *_: None}
    with ThreadingHTTPServer((host, 0), type("Handler", (handler,), fixed | attributes)) as server:
        server.daemon_threads = True
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"{host}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
