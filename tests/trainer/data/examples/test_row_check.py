"""A row may have a check of its answer; a missing or wrong one is named by file and line."""

import json
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import Columns
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.formats import RowReader
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.read.rows import Row

READER = RowReader("prompt-completion", Columns(check="expected"))
SCHEMA = {"required": ["pods"], "properties": {"pods": {"const": "ä\u2028"}}}


def row(values: dict[str, Any], *, columnar: bool = False) -> Row:
    return Row("pvc://data/a.jsonl line 3", {"prompt": "p", "completion": "c", **values}, 10, columnar)


@pytest.mark.parametrize("value", ["^a+$", json.dumps(SCHEMA), SCHEMA, True], ids=str)
def test_a_check_is_read_and_kept_as_it_is(value: Any) -> None:
    check = READER.check(row({"expected": value}))
    assert check == RowCheck("pvc://data/a.jsonl line 3: 'expected'", value)
    assert RowCheck.load(check.dump()) == check
    assert check.text == value if isinstance(value, str) else json.loads(check.text) == value
    assert READER.reading(row({"expected": value})).columns == ("prompt", "completion", "expected")


def test_without_a_name_for_it_no_column_is_a_check() -> None:
    reader = RowReader("prompt-completion", Columns())
    assert reader.check(row({"check": "a"})) is None
    assert reader.reading(row({"check": "a"})).ignored == ("check",)


@pytest.mark.parametrize(
    ("values", "columnar", "words"),
    [
        ({}, False, "(spec.dataset.columns.check) is missing; the row has 'prompt', 'completion': each row that may"),
        ({"expected": None}, False, "(spec.dataset.columns.check) is null: each row that may be held out must have"),
        ({"expected": " "}, False, "is empty: must be text"),
        ({"expected": 7}, False, "is a number: must be a regular expression as text, or a JSON schema as text or"),
        ({"expected": ["a"]}, False, "is a list: must be a regular expression as text, or a JSON schema"),
        ({"expected": {"const": None}}, True, "has null, which Parquet also writes for a key that a row does not have"),
        ({"expected": {"const": float("nan")}}, False, "cannot be written as JSON"),
        ({"expected": "a" * 8193}, False, "has 8193 characters: at most 8192 are allowed, 1024 in a regular"),
        ({"expected": "\ud800"}, False, "has an unpaired surrogate"),
    ],
)  # fmt: skip
def test_an_invalid_check_is_rejected_with_its_row(values: dict[str, Any], columnar: bool, words: str) -> None:
    with pytest.raises(StepFailure) as failure:
        READER.check(row(values, columnar=columnar))
    assert failure.value.exit_code is ExitCode.BAD_DATASET
    assert failure.value.message.startswith("pvc://data/a.jsonl line 3: 'expected' ")
    assert words in failure.value.message
