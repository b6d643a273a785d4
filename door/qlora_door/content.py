"""Checks the rows of a file while it arrives."""

import hashlib
import json

from qlora_door.errors import ApiError, bad_request

MAX_LINE_BYTES = 2**20


class JsonLines:
    """The lines of a JSONL file, each a JSON object."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._digest = hashlib.sha256()
        self._rest = bytearray()
        self._lines = self._rows = 0
        self.size = 0

    def add(self, chunk: bytes) -> None:
        """Check the next part of the file. Raises ApiError."""
        self.size += len(chunk)
        if self.size > self._max_bytes:
            raise ApiError(413, f"file: it has more than the {self._max_bytes} bytes that are allowed", param="file")
        self._digest.update(chunk)
        *lines, rest = chunk.split(b"\n")
        for line in lines:
            self._check(bytes(self._rest) + line)
            self._rest.clear()
        self._rest += rest
        if len(self._rest) > MAX_LINE_BYTES:
            raise self._too_long()

    def finish(self) -> str:
        """Check the last line, and return the SHA-256. Raises ApiError."""
        self._check(bytes(self._rest))
        if not self._rows:
            raise _invalid("file: it has no rows")
        return self._digest.hexdigest()

    def _check(self, line: bytes) -> None:
        self._lines += 1
        if not line.strip():
            return
        if len(line) > MAX_LINE_BYTES:
            raise self._too_long()
        self._rows += 1
        try:
            # As the trainer reads it: a mark of the byte order is no part of the first row.
            row = json.loads(line.decode("utf-8-sig" if self._lines == 1 else "utf-8"))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _invalid(f"file: line {self._lines} is not a JSON object in UTF-8")

    def _too_long(self) -> ApiError:
        return _invalid(f"file: line {self._lines} has more than {MAX_LINE_BYTES} bytes")


def _invalid(message: str) -> ApiError:
    return bad_request(message, "file", "invalid_jsonl")
