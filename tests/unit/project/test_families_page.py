"""The page of model families names every type of the transformers that is installed."""

import re

import transformers

from docs.families import NAMES, PAGE
from qlora_api.memory.one_row import ONE_ROW_MODEL_TYPES


def test_the_page_has_a_line_for_each_type_of_this_transformers() -> None:
    """Otherwise run `make families`, and see what a new release has changed."""
    text = PAGE.read_text()
    rows = re.findall(r"^\| `(\S+)` \| (packed|one row a sequence|no) \|", text, re.MULTILINE)
    assert tuple(name for name, _ in rows) == NAMES
    trained = sum(how != "no" for _, how in rows)
    packed = sum(how == "packed" for _, how in rows)
    assert (
        f"transformers {transformers.__version__} has {len(NAMES)} types of causal language models. {trained} can be "
        f"trained: {packed} with packed rows, {trained - packed} with one row in a sequence."
    ) in text
    assert trained >= 110
    assert {name for name, how in rows if how == "one row a sequence"} == ONE_ROW_MODEL_TYPES
