"""Lets a chat template write only what is the same each time: prepared again, the same data must be the same tokens."""

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

# What a template gets as today's date, so that the same data gives the same tokens on every day.
FROZEN_DATE = datetime(2025, 1, 1)  # noqa: DTZ001 - a printed date has no time zone
# Python writes a function, a generator or an object without a text of its own as "<… at 0x7f1234567890>". Digits that
# follow may be of what the template writes next, and those of a row may be cut off.
_ADDRESS = re.compile(r" at (0x[0-9a-f]{6})", re.IGNORECASE)
_ANY_ADDRESS = re.compile(r"0x[0-9a-f]{6}", re.IGNORECASE)
_SHOWN_CHARACTERS = 80


class UnusableText(Exception):  # noqa: N818 - it is the text that is unusable
    """What a template writes cannot be trained on; the message says why, and what to do."""


def freeze(template: Any) -> None:
    """Give a compiled template a fixed day, and nothing that draws at random."""
    template.globals["strftime_now"] = FROZEN_DATE.strftime
    template.environment.globals["lipsum"] = _forbidden("function lipsum")
    template.environment.filters["random"] = _forbidden("filter random")


def _forbidden(name: str) -> Callable[..., NoReturn]:
    def forbidden(*_arguments: object, **_options: object) -> NoReturn:
        raise UnusableText(f"uses the {name}, which draws another text each time: write the text itself")

    return forbidden


def usable(text: str, given: object) -> str:
    """The text that a template writes. `given`: all that it writes from, the template's own text included.

    Raises UnusableText if the text is not valid Unicode, or has an address in memory that is not from what was given.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnusableText(
            f"writes an unpaired surrogate (U+{ord(text[error.start]):04X}) at character {error.start}: not valid "
            "Unicode, correct the template"
        ) from error
    if "0x" in text or "0X" in text:
        _require_no_address(text, given)
    return text


def _require_no_address(text: str, given: object) -> None:
    found = list(_ADDRESS.finditer(text))
    known = {address.lower() for address in _ANY_ADDRESS.findall(repr(given))} if found else set()
    for address in found:
        if address[1].lower() not in known:
            end = address.start(1)
            start = text.rfind("<", max(0, end - _SHOWN_CHARACTERS), end)
            shown = text[start if start >= 0 else address.start() : end] + "0x…>"
            raise UnusableText(
                f"writes {shown!r} in place of a text, with an address that is another one each time: call a function "
                "with (), as in content.strip(), and give what is generated to the filter list or join"
            )
