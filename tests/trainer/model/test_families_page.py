"""The page of model families, and the table beside it, say what `prepare` finds today."""

import pytest

from docs.families import NAMES, PAGE, TABLE, entry, page, table


@pytest.mark.slow
def test_each_family_is_trained_as_the_page_says() -> None:
    """Otherwise run `make families`."""
    entries = tuple(map(entry, NAMES))

    assert page(entries).splitlines() == PAGE.read_text().splitlines()
    assert table(entries) == TABLE.read_text()
