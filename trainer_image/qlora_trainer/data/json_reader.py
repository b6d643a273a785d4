"""Reads rows from JSON, one a line or in a list, naming the place of everything that is wrong."""

import json
from collections.abc import Iterator
from typing import NoReturn

from qlora_trainer.core.failures import StepFailure, bad_dataset
from qlora_trainer.data.files import DataFile
from qlora_trainer.data.rows import RawRow, describe
from qlora_trainer.data.text import MAX_LINE_BYTES, lines, text_blocks

_BLANKS = " \t\r\n"


def read_json_lines(file: DataFile) -> Iterator[RawRow]:
    """One row a line; blank lines are passed over. The rows are not parsed yet."""
    for number, line in lines(file):
        if line.strip():
            yield RawRow(f"{file.name} line {number}", line, len(line))


def read_json(file: DataFile) -> Iterator[RawRow]:
    """The rows of one list of objects, or of one object a line. Memory: one row, of at most 16 MiB, and a block."""
    objects = _JsonList(file)
    if objects.begins():
        yield from objects.rows()
        return
    for number, row in enumerate(read_json_lines(file)):
        if not number:
            _require_object(row, file)
        yield row


def _require_object(first: RawRow, file: DataFile) -> None:
    try:
        parse_object(str(first.content), first.place)
    except StepFailure as failure:
        raise bad_dataset(
            f"{file.name} is neither a list of objects, [{{…}}, …], nor has it one object a line ({failure.message})"
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
        """Whether the file begins with a list; the [ is taken."""
        return self._take("[")

    def rows(self) -> Iterator[RawRow]:
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

    def _object(self, number: int) -> RawRow:
        if self._peek() != "{":
            raise self._unexpected(f"as item {number}", "an object, {…}")
        while True:
            place = f"{self._file.name} line {self._line} (item {number})"
            try:
                _, end = _SCANNER.raw_decode(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > MAX_LINE_BYTES:
                    raise bad_dataset(
                        f"{place} is not valid JSON, or longer than {MAX_LINE_BYTES // 2**20} MiB ({error.msg})"
                    ) from error
                if not self._read_more():
                    line = self._line + self._text.count("\n", self._at, error.pos)
                    cut = error.pos >= len(self._text.rstrip()) or error.msg.startswith("Unterminated")
                    advice = "a .json file is one list of objects, [{…}, …]"
                    raise _not_json(f"{place}, in line {line}", error.msg, advice, cut=cut) from error
            except (ValueError, RecursionError) as error:
                raise _too_much(place, error) from error
        text = self._text[self._at : end]
        self._advance(end)
        return RawRow(place, text, len(text))

    def _advance(self, end: int) -> None:
        self._line += self._text.count("\n", self._at, end)
        self._at = end

    def _take(self, character: str) -> bool:
        found = self._peek() == character
        if found:
            self._at += 1
        return found

    def _peek(self) -> str:
        """The next character that is not blank; empty at the end."""
        while True:
            rest = self._at
            while rest < len(self._text) and self._text[rest] in _BLANKS:
                rest += 1
            self._advance(rest)
            if rest < len(self._text):
                return self._text[rest]
            if not self._read_more():
                return ""

    def _read_more(self) -> bool:
        """Read at least as much as is left over: a long object must not be scanned once a block. False at the end."""
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


# Finds where an object ends; what is in it is looked at by parse_object.
_SCANNER = json.JSONDecoder(object_pairs_hook=lambda _pairs: None)


def parse_object(text: str, place: str) -> dict[str, object]:
    """The JSON object that the text is. Raises StepFailure BAD_DATASET beginning with `place`."""
    value = parse_value(text, place, _ONE_A_LINE)
    if not isinstance(value, dict):
        raise bad_dataset(f"{place} is {describe(value)}: must be a JSON object, {{…}}")
    return value


def parse_value(text: str, place: str, advice: str = "write it as one JSON value") -> object:
    """The JSON value that the text is: numbers finite, no key twice. Raises StepFailure BAD_DATASET."""

    def refuse_number(found: str) -> NoReturn:
        raise bad_dataset(f"{place}: {found} is not a JSON value: only finite numbers are allowed")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields: dict[str, object] = {}
        for key, value in pairs:
            if key in fields:
                raise bad_dataset(f"{place}: field {key[:80]!r} appears twice: keep one")
            fields[key] = value
        return fields

    try:
        return json.loads(text, parse_constant=refuse_number, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        cut = advice == _ONE_A_LINE and not text.endswith("\n")
        raise _not_json(f"{place} column {error.pos + 1}", error.msg, advice, cut=cut) from error
    except (ValueError, RecursionError) as error:
        raise _too_much(place, error) from error


_ONE_A_LINE = "a .jsonl file has one whole JSON object a line"


def _not_json(place: str, message: str, advice: str, *, cut: bool) -> StepFailure:
    seems = "; the file seems to be cut off here" if cut else ""
    return bad_dataset(f"{place}: not valid JSON ({message}){seems}: {advice}")


def _too_much(place: str, error: Exception) -> StepFailure:
    return bad_dataset(f"{place}: not valid JSON ({error}): a number or a nesting is too long")
