"""Messages of libraries, made short enough for a record."""

import pytest

from qlora_api.printable import first_line, shortened


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("no such file", "no such file"),
        ("\n  Tried to allocate 2.00 GiB.  \nSee the documentation", "Tried to allocate 2.00 GiB"),
        ("x" * 301, "x" * 299 + "…"),
        ("", "ValueError"),
        (" \n ", "ValueError"),
    ],
)
def test_of_an_error_the_first_line_is_shown(message: str, expected: str) -> None:
    assert first_line(ValueError(message)) == expected


@pytest.mark.parametrize(("limit", "expected"), [(5, "abcde"), (4, "abc…"), (1, "…"), (0, "")])
def test_a_text_that_is_too_long_ends_in_an_ellipsis(limit: int, expected: str) -> None:
    assert shortened("abcde", limit) == expected
