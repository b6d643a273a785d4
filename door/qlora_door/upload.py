"""Reads an uploaded file from a multipart request, without holding more than a small one in memory."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import TypeVar

from aiohttp import BodyPartReader, MultipartReader, web

from qlora_door.content import JsonLines
from qlora_door.errors import ApiError, bad_request

T = TypeVar("T")

MAX_INLINE_BYTES = 1_000_000
"""Of a file in a ConfigMap, whose data may have 1 MiB in all."""
_CHUNK_BYTES = 2**18
_STALLED_SECONDS = 60
_MAX_FIELD_BYTES = 1024
_MAX_FIELDS = 8
_MAX_NAME_LENGTH = 255


@dataclass(frozen=True)
class Start:
    """The beginning of an uploaded file: all of a small one."""

    name: str
    content: bytes
    is_complete: bool


class Upload:
    """A file of purpose fine-tune that arrives. All calls raise ApiError."""

    def __init__(self, reader: MultipartReader, lines: JsonLines) -> None:
        self._reader, self._lines = reader, lines
        self._purpose: str | None = None
        self._part: BodyPartReader | None = None
        self._fields = 0
        self.sha256 = ""
        """Of the whole file, once it has been read."""

    @property
    def size(self) -> int:
        """Bytes read so far."""
        return self._lines.size

    async def start(self) -> Start:
        """Read fields up to the file, and the file's beginning."""
        part = await self._next_file()
        if part is None:
            raise bad_request("file: it is missing: send a JSONL file", "file")
        self._part = part
        content = bytearray()
        while len(content) <= MAX_INLINE_BYTES and (chunk := await self._chunk(part)):
            content += chunk
        is_complete = len(content) <= MAX_INLINE_BYTES
        if is_complete:
            await self._finish()
        return Start((part.filename or "data.jsonl")[:_MAX_NAME_LENGTH], bytes(content), is_complete)

    async def chunks(self, start: Start) -> AsyncIterator[bytes]:
        """Yield all of a large file."""
        yield start.content
        if self._part is None:
            raise AssertionError("start() comes first")
        while chunk := await self._chunk(self._part):
            yield chunk
        await self._finish()

    async def _finish(self) -> None:
        self.sha256 = self._lines.finish()
        # Clients may send the purpose after the file.
        if await self._next_file() is not None:
            raise bad_request("file: send one", "file")
        if self._purpose is None:
            raise bad_request("purpose: it is missing: send fine-tune", "purpose")

    async def _next_file(self) -> BodyPartReader | None:
        """Read fields up to a file, or to the end."""
        while part := await _in_time(self._reader.next()):
            if not isinstance(part, BodyPartReader):
                raise bad_request("the request has parts within parts")
            if part.name == "file":
                return part
            self._fields += 1
            if part.name != "purpose" or self._fields > _MAX_FIELDS:
                raise bad_request(f"{part.name}: unknown, or not supported: remove it", part.name, "unknown_parameter")
            value = await _in_time(part.read_chunk(_MAX_FIELD_BYTES))
            if value != b"fine-tune":
                found = value[:80].decode(errors="replace")
                raise bad_request(f"purpose: found {found!r}, must be fine-tune", "purpose")
            await _in_time(part.release())
            self._purpose = "fine-tune"
        return None

    async def _chunk(self, part: BodyPartReader) -> bytes:
        chunk = bytes(await _in_time(part.read_chunk(_CHUNK_BYTES)))
        self._lines.add(chunk)
        return chunk


async def _in_time(reading: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(_STALLED_SECONDS):
            return await reading
    except TimeoutError:
        raise ApiError(408, f"nothing has arrived for {_STALLED_SECONDS} seconds", code="timeout") from None
    except ValueError as error:
        raise bad_request(f"the upload cannot be read: {error}") from None


async def open_upload(request: web.Request, max_bytes: int) -> Upload:
    """Begin to read an upload. Raises ApiError."""
    try:
        return Upload(await request.multipart(), JsonLines(max_bytes))
    except (ValueError, AssertionError, KeyError):
        raise bad_request("the body must be multipart/form-data with purpose and file") from None
