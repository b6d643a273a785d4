"""Reads rows from JSON: one object per line, or a list of objects."""

import json
from collections.abc import Iterator

from qlora_trainer.core.failures import StepFailure, bad_dataset
from qlora_trainer.data.read.files import DataFile
from qlora_trainer.data.read.rows import Row, invalid_json, oversized_json
from qlora_trainer.data.read.text import MAX_LINE_BYTES, lines, text_blocks

_WHITESPACE = " \t\r\n"


def read_json_lines(file: DataFile) -> Iterator[Row]:
    """Read one row per line without parsing it. Skips blank lines."""
    for number, line in lines(file):
        if line.strip():
            yield Row(f"{file.name} line {number}", line, len(line))


def read_json(file: DataFile) -> Iterator[Row]:
    """The rows of a list, or of lines. Memory: a row of at most 16 MiB, and a block."""
    objects = _JsonList(file)
    if objects.begins():
        yield from objects.rows()
        return
    for number, row in enumerate(read_json_lines(file)):
        if not number:
            _require_object(row, file)
        yield row


def _require_object(first: Row, file: DataFile) -> None:
    try:
        first.values()
    except StepFailure as failure:
        raise bad_dataset(
            f"{file.name} is neither a list of objects, [{{…}}, …], nor does it have one object per line "
            f"({failure.message})"
        ) from failure


class _JsonList:
    """A list of objects that is read one object after the other."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._blocks = text_blocks(file)
        self._text, self._at, self._ended = "", 0, False
        self._line = 1
        """Line of the file at `_at`."""

    def begins(self) -> bool:
        """Whether the file begins with a list. Consumes the [."""
        return self._take("[")

    def rows(self) -> Iterator[Row]:
        """The objects of the list. Raises StepFailure BAD_DATASET for anything else in it."""
        number, ended = 0, self._take("]")
        while not ended:
            number += 1
            yield self._object(number)
            ended = not self._take(",")
            if ended and not self._take("]"):
                raise self._unexpected(f"after item {number}", "',' or ']'")
        if self._peek():
            raise self._unexpected("after the end of the list", "nothing")

    def _object(self, number: int) -> Row:
        if self._peek() != "{":
            raise self._unexpected(f"as item {number}", "an object, {…}")
        while True:
            location = f"{self._file.name} line {self._line} (item {number})"
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise bad_dataset(
                        f"{location} is not valid JSON, or longer than {MAX_LINE_BYTES // 2**20} MiB ({error.msg})"
                    ) from error
                if not self._read_more():
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    cut = error.pos >= len(self._text.rstrip()) or error.msg.startswith("Unterminated")
                    advice = "a .json file is one list of objects, [{…}, …]"
                    raise invalid_json(f"{location}, in line {line}", error.msg, advice, cut=cut) from error
            except (ValueError, RecursionError) as error:
                raise oversized_json(location, error) from error
        text = self._text[self._at : end]
        self._advance(end)
        return Row(location, text, len(text))

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        if found:
            self._at += 1
        return found

    def _peek(self) -> str:
        """The next character that is not whitespace, or an empty string at the end."""
        while True:
            rest = self._at
            while rest < len(self._text) and self._text[rest] in _WHITESPACE:
                rest += 1
            self._advance(rest)
            if rest < len(self._text):
                return self._text[rest]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        """Read at least as many bytes as are left over, to scan few twice. False at end."""
        rest = self._text[self._at :]
        read: list[str] = []
        while not self._ended and sum(map(len, read)) <= len(rest):
            block = next(self._blocks, None)
            self._ended = block is None
            read.append(block or "")
        self._text, self._at = rest + "".join(read), 0
        return len(self._text) > len(rest)

    def _unexpected(self, where: str, expected: str) -> StepFailure:
        found = self._text[self._at : self._at + 20]
        what = repr(found) if found else "the end of the file (it seems to be cut off)"
        return bad_dataset(
            f"{self._file.name} line {self._line}: found {what} {where}, expected {expected}: "
            "a .json file is one list of objects, [{…}, …]"
        )


# Finds where an object ends; Row.values parses what is in it.
_SCANNER = json.JSONDecoder(object_pairs_hook=lambda _pairs: None)
