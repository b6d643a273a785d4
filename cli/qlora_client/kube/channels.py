"""Reads the output of a command in a pod from the API server's channels (v4.channel.k8s.io)."""

import json
from collections.abc import Iterator
from typing import Any, Protocol

from qlora_client.kube.errors import ClusterError

PROTOCOL = "v4.channel.k8s.io"
_OUTPUT, _ERRORS, _RESULT = 1, 2, 3
_TEXT, _BINARY, _CLOSE = 1, 2, 8
"""Kinds of frames (RFC 6455, section 5.2)."""
_ERRORS_KEPT = 2000
"""Bytes of the end of standard error, for the message."""


class CommandError(ClusterError):
    """The command has failed in the pod; the message ends with its standard error."""


class Socket(Protocol):
    """The used part of a connection."""

    def recv_data(self, control_frame: bool) -> tuple[int, bytes]:
        """Return kind and content of the next message, control messages if asked for."""

    def settimeout(self, timeout: float) -> None:
        """Give up after so many seconds without a byte."""

    def close(self) -> None:
        """End the connection."""


def standard_output(socket: Socket) -> Iterator[bytes]:
    """The blocks of standard output as they arrive, until the command ends.

    Raises CommandError if it fails, or the connection ends before that is known, and the socket's errors.
    """
    errors, result = b"", b""
    while True:
        kind, message = socket.recv_data(True)
        if kind == _CLOSE:
            break
        if kind not in (_TEXT, _BINARY) or not message:
            continue
        channel, content = message[0], message[1:]
        if channel == _OUTPUT and content:
            yield content
        elif channel == _ERRORS:
            errors = (errors + content)[-_ERRORS_KEPT:]
        elif channel == _RESULT:
            result += content
    _require_success(result, errors.decode(errors="replace").strip())


def _require_success(result: bytes, errors: str) -> None:
    status = _parsed(result)
    if status.get("status") == "Success":
        return
    told = errors or str(status.get("message") or "the connection broke off before its end")
    raise CommandError(f"the command in the pod failed: {told}")


def _parsed(result: bytes) -> dict[str, Any]:
    try:
        status = json.loads(result)
    except (ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}
