"""Rows of each format: what a model learns from them, and the message about a wrong one."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from qlora_api.contract import ExitCode
from qlora_api.spec.dataset import RowFormat
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.formats import PAIRS, RowReader, detect_format
from qlora_trainer.data.read.rows import Row
from qlora_trainer.data.render.template_source import JobTemplate
from tests.support.models.learned import learned
from tests.support.models.tiny import save_tokenizer
from tests.support.row_formats import GOOD_ROWS, WRONG_ROWS, GoodRow

WRONG = [(format_, row, message) for format_, rows in WRONG_ROWS.items() for row, message in rows]


def test_every_format_has_good_and_wrong_rows() -> None:
    assert {good.format for good in GOOD_ROWS} == set(WRONG_ROWS) == set(get_args(RowFormat))


@pytest.mark.parametrize("good", GOOD_ROWS, ids=[good.format for good in GOOD_ROWS])
def test_a_good_row_is_detected_and_its_answers_are_learned(tmp_path: Path, good: GoodRow) -> None:
    save_tokenizer(tmp_path, None)
    format_, columns = detect_format(Row("line 1", good.row, 1), None, pairs=good.format in PAIRS)
    template = None if good.template is None else JobTemplate(good.template)
    [(text, targets)] = learned(tmp_path, [dict(good.row)], format_, columns=columns, template=template)
    assert format_ == good.format
    assert text.endswith(good.ending)
    assert tuple(targets) == good.targets


@pytest.mark.parametrize(("format_", "row", "message"), WRONG, ids=[message[2:60] for *_, message in WRONG])
def test_a_wrong_row_is_named_with_its_field(format_: RowFormat, row: Mapping[str, object], message: str) -> None:
    with pytest.raises(StepFailure) as failure:
        RowReader(format_, None).read(Row("pvc://data/a.jsonl line 2", row, 1))
    assert failure.value.exit_code is ExitCode.BAD_DATASET
    assert failure.value.message.startswith(f"pvc://data/a.jsonl line 2{message}")
    assert len(failure.value.message) < 700
