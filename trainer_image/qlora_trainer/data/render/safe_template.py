"""Bounds what a chat template may do: an untrusted program, which must end and must render the same text each time.

Prepared again, the same data must be the same tokens.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import NoReturn

from jinja2 import Template, TemplateError

from qlora_api.printable import first_line
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.protocols import FastTokenizer
from qlora_trainer.data.render.messages import TOOL_PROBE

SECONDS = 10
"""Of the processor, not of the clock: a busy machine changes nothing."""
CHARACTERS = 2**26
"""Four times the longest row. All that a template adds to one is far less."""
# A template cannot catch the exception, but what it calls may: the timer goes off again.
_AGAIN_SECONDS = 1


class LimitExceeded(Exception):  # noqa: N818 - the limit is what was exceeded
    """The template exceeds a limit. The message names it."""


@contextmanager
def limited_time() -> Iterator[None]:
    """Raise LimitExceeded in the body after SECONDS of computing. Without effect outside of the main thread.

    One operation of the interpreter itself, such as the power of a large number, is not interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _raise_exceeded)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, _AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _raise_exceeded(_signal: int, _frame: object) -> None:
    raise LimitExceeded(f"takes more than {SECONDS} seconds")


def within_characters(text: str) -> str:
    """The text. Raises LimitExceeded if it is too long."""
    if len(text) > CHARACTERS:
        raise LimitExceeded(f"writes {len(text)} characters, at most {CHARACTERS} are allowed")
    return text


# A template's date of today, so that the same data gives the same tokens on every day.
FROZEN_DATE = datetime(2025, 1, 1)  # noqa: DTZ001 - a printed date has no time zone
# Python writes a function, a generator or an object without a text as "<… at 0x7f1234567890>". Digits that
# follow may be of what the template writes next, and those of a row may be cut off.
_ADDRESS = re.compile(r" at (0x[0-9a-f]{6})", re.IGNORECASE)
_ANY_ADDRESS = re.compile(r"0x[0-9a-f]{6}", re.IGNORECASE)
_SHOWN_CHARACTERS = 80


class UnusableText(Exception):  # noqa: N818 - it is the text that is unusable
    """The template's text cannot be trained on. The message has the reason and advice."""


# A template is a program: its filters raise their errors, and compiling it raises Python's.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SyntaxError,
    LimitExceeded,
    UnusableText,
)


def freeze(template: Template) -> None:
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


def freeze_template(tokenizer: FastTokenizer, whose: str) -> None:
    """Make its text reproducible. Raises StepFailure BAD_CONFIGURATION."""
    # Functions passed to apply_chat_template never reach the template, its globals do; compiled templates are cached.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        # A model may have a separate template for conversations with tools.
        with limited_time():
            templates = [
                _compile_jinja_template(tokenizer.get_chat_template(tools=tools)) for tools in (None, TOOL_PROBE.tools)
            ]
    except TEMPLATE_ERRORS as error:
        raise bad_configuration(f"{whose} cannot be used: {first_line(error)}") from error
    except MemoryError as error:
        raise bad_configuration(f"{whose} needs more memory than there is: use another model") from error
    for template in templates:
        freeze(template)
