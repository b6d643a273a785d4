"""Reads structures of Thrift's compact protocol, in which Parquet writes its footer and the headers of its pages.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md

What Thrift's own reader would truncate, wrap or overwrite without an error is an error here. So what is read here and
what pyarrow reads of the same bytes are the same.
"""

from typing import IO, Any

I32, I64, LIST, STRUCT = 5, 6, 9, 12
"""Types, by which fields are found."""
_BOOLEANS, _BYTE, _I16, _DOUBLE, _BINARY = (1, 2), 3, 4, 7, 8
_BITS = {_I16: 16, I32: 32, I64: 64}
_SIZES = {**dict.fromkeys(_BOOLEANS, 1), _BYTE: 1, _DOUBLE: 8}
_LONG_LIST = 15
_MAX_FIELD = 2**15 - 1
_DEEPEST = 8

Structure = dict[tuple[int, int], Any]
"""Values of a structure by number and type of their field: a field with a number but of another type is not there."""


def read_structure(file: IO[bytes], depth: int = 0) -> Structure:
    """The structure that begins where the file is: its integers, structures and lists of structures.

    Anything else is skipped. Raises ValueError for what is not a structure.
    """
    if depth > _DEEPEST:
        raise ValueError(f"the structure at byte {file.tell()} nests without end")
    found: Structure = {}
    number = 0
    while lead := _byte(file):
        step, kind = lead >> 4, lead & 15
        number = number + step if step else _integer(file, _BITS[_I16])
        if number > _MAX_FIELD or (number, kind) in found:
            raise ValueError(f"the structure at byte {file.tell()} has field {number} twice, or numbers are too large")
        # A Boolean field is in its type.
        found[number, kind] = None if kind in _BOOLEANS else _value(file, kind, depth)
    return found


def _value(file: IO[bytes], kind: int, depth: int) -> Any:
    """An integer, a structure or a list of structures; None for what is skipped."""
    if kind in _BITS:
        return _integer(file, _BITS[kind])
    if kind == STRUCT:
        return read_structure(file, depth + 1)
    if kind == LIST:
        return _list(file, depth + 1)
    if kind != _BINARY and kind not in _SIZES:
        raise ValueError(f"there is no structure at byte {file.tell()}")
    file.seek(_SIZES[kind] if kind in _SIZES else _unsigned(file, 31), 1)
    return None


def _list(file: IO[bytes], depth: int) -> list[Structure] | None:
    lead = _byte(file)
    length, kind = lead >> 4, lead & 15
    if length == _LONG_LIST:
        length = _unsigned(file, 31)
    if depth > _DEEPEST:
        raise ValueError(f"the list at byte {file.tell()} nests without end")
    # Not every writer gives the elements' type of an empty list.
    if kind == STRUCT or not length:
        return [read_structure(file, depth) for _ in range(length)]
    if kind in _SIZES:
        file.seek(length * _SIZES[kind], 1)
        return None
    for _ in range(length):
        _value(file, kind, depth)
    return None


def _integer(file: IO[bytes], bits: int) -> int:
    value = _unsigned(file, bits)
    return value >> 1 ^ -(value & 1)


def _unsigned(file: IO[bytes], bits: int) -> int:
    value = 0
    for shift in range(0, bits, 7):
        byte = _byte(file)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    else:
        raise ValueError(f"the number at byte {file.tell()} has no end")
    if value >> bits:
        raise ValueError(f"the number at byte {file.tell()} has more than {bits} bits")
    return value


def _byte(file: IO[bytes]) -> int:
    byte = file.read(1)
    if not byte:
        raise ValueError("a structure is cut off by the end of the file")
    return byte[0]
