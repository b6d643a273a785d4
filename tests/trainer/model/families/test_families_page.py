"""The page of model families, and its table, match the findings of `prepare`."""

import re

import pytest
import transformers

from docs.families import MULTIMODAL_NAMES, NAMES, PAGE, TABLE, entry, page, table
from qlora_api.memory.one_row import ONE_ROW_MODEL_TYPES

CAUSAL, MULTIMODAL = PAGE.read_text().split("## Multimodal models")


def rows(text: str) -> tuple[tuple[str, ...], str]:
    """The types in the table of a part, and its expected statements about them."""
    found = re.findall(r"^\| `(\S+)` \| (packed|one row a sequence|no) \|", text, re.MULTILINE)
    packed, one_row = (sum(how == way for _, how in found) for way in ("packed", "one row a sequence"))
    said = f"{packed + one_row} can be trained: {packed} with packed rows, {one_row} with one row in a sequence."
    return tuple(name for name, _ in found), said


def test_the_page_has_a_line_for_each_type_of_this_transformers() -> None:
    """On failure run `make families`, and read the changes of the new release."""
    names, said = rows(CAUSAL)
    assert names == NAMES
    assert f"transformers {transformers.__version__} has {len(NAMES)} types of causal language models. {said}" in CAUSAL
    assert int(said.partition(" ")[0]) >= 110


def test_the_page_has_a_line_for_each_further_type_that_takes_more_than_text() -> None:
    """On failure run `make families`."""
    names, said = rows(MULTIMODAL)
    assert names == MULTIMODAL_NAMES
    assert f"It has {len(MULTIMODAL_NAMES)} more types of models" in MULTIMODAL
    assert said in MULTIMODAL


def test_plan_has_the_types_with_one_row_in_a_sequence() -> None:
    """On failure run `make families`."""
    assert (
        set(re.findall(r"^\| `(\S+)` \| one row a sequence \|", PAGE.read_text(), re.MULTILINE)) == ONE_ROW_MODEL_TYPES
    )


@pytest.mark.slow
def test_each_family_is_trained_as_documented() -> None:
    """On failure run `make families`."""
    causal, multimodal = (tuple(map(entry, names)) for names in (NAMES, MULTIMODAL_NAMES))

    assert page(causal, multimodal).splitlines() == PAGE.read_text().splitlines()
    assert table(causal + multimodal) == TABLE.read_text()
