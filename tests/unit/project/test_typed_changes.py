"""mypy checks the fields that `replace` and `replace_known` change: crds/mypy_replace.py."""

from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).parents[3]
_CALLS = """\
from typing import TypeVar

from qlora_api.contract import ProgressRecord, ResultRecord
from qlora_api.schema import replace, replace_known

Record = TypeVar("Record", bound=ProgressRecord)


def right(record: ProgressRecord, any_record: Record, step: int | None) -> tuple[ProgressRecord, Record]:
    return replace_known(record, training_step=step), replace(any_record, training_step=3, activity="waits")


def wrong(record: ProgressRecord, any_record: Record, step: int | None, either: ProgressRecord | ResultRecord) -> None:
    replace(record, training_steps=3)  # wrong: Unexpected keyword argument "training_steps" for "replace"
    replace(any_record, training_step="3")  # wrong: incompatible type "str"; expected "int"
    replace(record, training_step=step)  # wrong: incompatible type "int | None"; expected "int"
    replace_known(record, training_step=3.5)  # wrong: incompatible type "float"; expected "int | None"
    replace(either, step="train")  # wrong: pass one model of pydantic
"""


def test_mypy_rejects_a_field_that_the_model_lacks_and_a_value_of_another_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    calls = tmp_path / "calls.py"
    calls.write_text(_CALLS)
    # The cache of `make check`: without one this takes ten seconds.
    found, errors, _ = api.run(["--cache-dir", ".mypy_cache", "--no-error-summary", "--hide-error-context", str(calls)])
    assert errors == ""
    reported = {int(line.split(":")[1]): line for line in found.splitlines() if ": error: " in line}
    wanted = {
        number: line.split("# wrong: ")[1]
        for number, line in enumerate(_CALLS.splitlines(), start=1)
        if "# wrong: " in line
    }
    assert reported.keys() == wanted.keys()
    assert all(wanted[number] in reported[number] for number in wanted)
