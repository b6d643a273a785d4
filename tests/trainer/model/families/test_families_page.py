"""The page of model families, and its table, match the findings of `prepare`."""

import pytest

from docs.families import MULTIMODAL_NAMES, NAMES, PAGE, TABLE, entry, page, table


@pytest.mark.slow
def test_each_family_is_trained_as_documented() -> None:
    """On failure run `make families`."""
    causal, multimodal = (tuple(map(entry, names)) for names in (NAMES, MULTIMODAL_NAMES))

    assert page(causal, multimodal).splitlines() == PAGE.read_text().splitlines()
    assert table(causal + multimodal) == TABLE.read_text()
