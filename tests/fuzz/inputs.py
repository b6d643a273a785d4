"""Inputs for hypothesis: any bytes, and those that are taken with one part made unusual."""

import copy
import functools
import json
import operator
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

BOUNDED = settings(derandomize=True, database=None, deadline=None, max_examples=150)
"""The same examples in every run, so that a change is not blamed for what another one has broken."""

_FRAGMENTS = (
    b"",
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"9" * 400,
    b"9" * 5000,
    b"[]",
    b"[" * 3000,
    b'{"a":' * 3000,
    b'"\\ud800"',
    b'"\\u0000\\u001b[31m\\u202e"',
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\x1b[31m\x00",
    b"\xe2\x80\xa8",
    b"\n",
    b" *a",
    b" &a [*a]",
    b"<<: *a",
    b"!!bool x",
    b"!!timestamp x",
    b"? [a]\n",
    b"../",
    b"/dev/zero",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x" * 3000,
    "\ud800",
    "\x00\x1b[31m\u202e\n",
    "../../x",
    "/dev/zero",
    [],
    [[]] * 3,
    {},
    {"": {}},
)
_STRINGS = (
    "",
    "9" * 5000,
    "\u00b2",
    "\ud800",
    "x" * 3000,
    "2026-02-30T00:00:00Z",
    "10000-01-01T00:00:00Z",
    "9999-12-31T23:59:59-14:00",
    "0001-01-01T00:00:00+14:00",
    "1734-01-01T00:00:00Z",
)
_NUMBERS = (-(2**63), -1, 0, 2**31 - 1, 200_000_000_000, 2**63 - 1)


@st.composite
def inputs(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Any bytes; or a seed with some bytes, or a value of its JSON, replaced."""
    kind = draw(st.sampled_from(("bytes", "part", "value", "value")))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    seed = draw(st.sampled_from(seeds))
    document = _parsed(seed) if kind == "value" else None
    if document is None:
        start = draw(st.integers(0, len(seed)))
        end = draw(st.integers(start, min(len(seed), start + 40)))
        return seed[:start] + draw(st.sampled_from(_FRAGMENTS) | st.binary(max_size=8)) + seed[end:]
    place = draw(st.sampled_from(list(_places(document))))
    return json.dumps(_replaced(document, place, draw(st.sampled_from(_VALUES)))).encode()


@st.composite
def changed(draw: st.DrawFn, document: Any, places: Callable[[tuple[Any, ...]], bool], *, typed: bool) -> Any:
    """The document with one or two replaced values; `typed`: by values of the same type."""
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from([place for place in _places(document) if places(place)]))
        document = _replaced(document, place, draw(st.sampled_from(_unusual(_at(document, place), typed))))
    return document


def _unusual(value: Any, typed: bool) -> tuple[Any, ...]:
    if not typed:
        return (*_VALUES, *_STRINGS)
    if isinstance(value, bool | dict | list):
        return ({bool: not value, dict: {}, list: []}[type(value)],)
    return _STRINGS if isinstance(value, str) else _NUMBERS


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    return functools.reduce(operator.getitem, place, document)


def _parsed(seed: bytes) -> Any:
    try:
        return json.loads(seed)
    except ValueError:
        return None


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of the value and of every one inside it."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*here, key))


def _replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(document)
    parent = changed
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return changed
