"""Replaces the name of a channel in a request by that of the adapter that it leads to."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from qlora_vllm.channels import Channels, choose

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class ChannelNames:
    """ASGI middleware. The answer's `model` is the adapter's immutable name, for audits."""

    def __init__(self, app: Application, channels: Channels) -> None:
        self._app, self._channels = app, channels

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self._app(scope, receive, send)
            return
        body, rest = await _read(receive)
        if (replaced := self._replaced(body)) is not None:
            body = replaced
            headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        pending = [{"type": "http.request", "body": body, "more_body": bool(rest)}, *rest]

        async def replay() -> Message:
            return pending.pop(0) if pending else await receive()

        await self._app(scope, replay, send)

    def _replaced(self, body: bytes) -> bytes | None:
        """Return the body with the adapter's name, or None unless it names a channel."""
        if b"@" not in body:
            return None
        try:
            request = json.loads(body)
            channel = self._channels.active.get(request["model"])
        except (ValueError, KeyError, TypeError, RecursionError):
            # vLLM reports what is wrong with it.
            return None
        return None if channel is None else json.dumps(request | {"model": choose(channel, request)}).encode()


def _is_json(scope: Message) -> bool:
    types = (value.lower() for name, value in scope["headers"] if name == b"content-type")
    return any(value.startswith(b"application/json") for value in types)


async def _read(receive: Receive) -> tuple[bytes, list[Message]]:
    """Read the whole body. Returns it, with the message of a client that has gone away before its end."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts), [message]
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts), []
