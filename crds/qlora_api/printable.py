"""Makes text of unknown origin safe to show in a record, a status, a log or a terminal."""

import json


def printable(text: str) -> str:
    """The text with a backslash escape for each character that is not printable.

    Line ends would forge lines of a log, escape sequences control a terminal, bidirectional marks reorder what is
    read, and an unpaired surrogate cannot be encoded.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def one_line(text: str) -> str:
    """The same, with one space for each run of white space, line ends included."""
    return printable(" ".join(text.split()))


def shortened(text: str, limit: int) -> str:
    """Shorten the text to at most `limit` characters, the last an ellipsis."""
    return text if len(text) <= limit else text[: max(limit - 1, 0)] + "…" * (limit > 0)


def shortened_in_the_middle(text: str, limit: int) -> str:
    """Shorten the text around an ellipsis to `limit` characters, at least 3."""
    end = (limit - 1) // 2
    return text if len(text) <= limit else f"{text[: limit - 1 - end]}…{text[-end:]}"


def shortened_json(value: object, limit: int = 80) -> str:
    """The value as JSON, in at most `limit` characters."""
    try:
        return shortened(json.dumps(value), limit)
    except RecursionError:
        return "a value that is nested too deeply"


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of the error's message, without a final period, in at most `limit` characters.

    The name of the error's type if there is no message.
    """
    lines = str(error).strip().splitlines()
    return shortened(lines[0].strip().rstrip("."), limit) if lines else type(error).__name__
