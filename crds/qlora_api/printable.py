"""Makes text of unknown origin fit to be shown: in a record, a status, a log or a terminal."""


def printable(text: str) -> str:
    """The text with a backslash escape for each character that cannot be seen, other than the blank.

    Line ends would forge lines of a log, escape sequences steer a terminal, marks of direction turn what is read
    around, and half of a surrogate pair cannot be encoded.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def one_line(text: str) -> str:
    """The same, with one blank for each line end and each run of white space."""
    return printable(" ".join(text.split()))
