"""Inputs for hypothesis: any bytes, and those that are taken with one part made unusual."""

import copy
import functools
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from hypothesis import settings
from hypothesis import strategies as st

Place: TypeAlias = tuple[Any, ...]
"""Keys and indices that lead to a value in a document."""
BOUNDED = settings(derandomize=True, database=None, deadline=None, max_examples=150)
"""The same examples in every run, so that a change is not blamed for what another one has broken."""

# Parts of JSON, then bytes that are no text or no line, then parts of YAML, then paths.
_FRAGMENTS = (
    *b'null -1 1e999 NaN [] "\\ud800" "\\u0000\\u001b[31m\\u202e"'.split(b" "),
    *(b"", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000),
    *(b"\xff\xfe", b"\xed\xa0\x80", b"\x1b[31m\x00", b"\xe2\x80\xa8", b"\n"),
    *(b" *a", b" &a [*a]", b"<<: *a", b"!!bool x", b"!!timestamp x", b"? [a]\n"),
    *(b"../", b"/dev/zero"),
)
_STRINGS = (
    *("", "9" * 5000, "\u00b2", "\ud800", "x" * 3000, "\x00\x1b[31m\u202e\n", "../../x", "/dev/zero"),
    *("2026-02-30T00:00:00Z", "10000-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"),
    "1734-01-01T00:00:00Z",
)
_NUMBERS = (-(2**63), -1, 0, 2**31 - 1, 200_000_000_000, 2**63 - 1)
_VALUES: tuple[Any, ...] = (
    *(None, True, 2**63, 10**400, 1e308, float("inf"), float("nan"), [], [[]] * 3, {}, {"": {}}),
    *_NUMBERS[:3],
    *_STRINGS,
)


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
def changed(draw: st.DrawFn, document: Any, places: Callable[[Place], bool], *, typed: bool) -> Any:
    """Replace one or two values of the document, if `typed` by values of their type."""
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from([place for place in _places(document) if places(place)]))
        document = _replaced(document, place, draw(st.sampled_from(_unusual(_at(document, place), typed))))
    return document


def _unusual(value: Any, typed: bool) -> Sequence[Any]:
    if not typed:
        return _VALUES
    if isinstance(value, bool | dict | list):
        return (not value if isinstance(value, bool) else type(value)(),)
    return _STRINGS if isinstance(value, str) else _NUMBERS


def _at(document: Any, place: Place) -> Any:
    return functools.reduce(operator.getitem, place, document)


def _parsed(seed: bytes) -> Any:
    try:
        return json.loads(seed)
    except ValueError:
        return None


def _places(value: Any, here: Place = ()) -> Iterator[Place]:
    """The path of the value and of every one inside it."""
    yield here
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*here, key))


def _replaced(document: Any, place: Place, value: Any) -> Any:
    if not place:
        return value
    changed = copy.deepcopy(document)
    operator.setitem(_at(changed, place[:-1]), place[-1], value)
    return changed
