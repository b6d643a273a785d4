"""The page of model families says what `prepare` finds today."""

import pytest

from docs.families import NAMES, PAGE, entry, page


@pytest.mark.slow
def test_each_family_is_trained_as_the_page_says() -> None:
    """Otherwise run `make families`."""
    assert page(map(entry, NAMES)).splitlines() == PAGE.read_text().splitlines()
