"""Durations for people: one format, wherever a duration is shown."""

import pytest

from qlora_api.duration import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.9, "59s"),
        (60, "1m0s"),
        (725, "12m5s"),
        (3599, "59m59s"),
        (3600, "1h0m"),
        (4320, "1h12m"),
        (11_220, "3h7m"),
        (86_399, "23h59m"),
        (86_400, "1d0h"),
        (183_600, "2d3h"),
        (187_200, "2d4h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
