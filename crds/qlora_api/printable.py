"""Makes text of unknown origin safe to show in a record, a status, a log or a terminal."""


def printable(text: str) -> str:
    """The text with a backslash escape for each character that is not printable.

    Line ends would forge lines of a log, escape sequences control a terminal, bidirectional marks reorder what is
    read, and an unpaired surrogate cannot be encoded.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def one_line(text: str) -> str:
    """The same, with one space for each run of white space, line ends included."""
    return printable(" ".join(text.split()))
