"""Equal rows: counted, left out on request, and named where they are in both splits."""

from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import summary
from qlora_trainer.data.examples.example import TokenizedRow
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.selection import Overlap, first_equal
from qlora_trainer.data.statistics import DataStatistics, OverlapStatistics
from qlora_trainer.data.tokenize.chunks import Chunk, TokenizedRows
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.trainer.conftest import MakeContext

ROWS = [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(20)]


def tokenized(rows: list[tuple[list[int], list[bool]]], chunk_rows: int = 3) -> TokenizedRows:
    """The rows, each as its tokens and targets, in chunks, with numbers as locations."""
    made = [TokenizedRow(numpy.array(ids, dtype=numpy.int32), numpy.array(flags, dtype=bool)) for ids, flags in rows]
    numbers = [f"line {n}" for n in range(len(rows))]
    starts = range(0, len(rows), chunk_rows)
    return TokenizedRows(
        [Chunk.from_rows(made[n : n + chunk_rows], locations=numbers[n : n + chunk_rows]) for n in starts]
    )


@given(st.lists(st.lists(st.tuples(st.integers(1, 2), st.booleans()), min_size=1, max_size=3), max_size=40))
def test_rows_are_equal_if_all_their_tokens_and_targets_are(rows: list[list[tuple[int, bool]]]) -> None:
    found = first_equal(tokenized([([i for i, _ in row], [flag for _, flag in row]) for row in rows]).digests())
    assert found.tolist() == [rows.index(row) for row in rows]


def test_a_row_keeps_its_location() -> None:
    rows = tokenized([([n + 1], [True]) for n in range(8)])
    assert [rows.location(n) for n in range(8)] == [f"line {n}" for n in range(8)]


def test_the_overlap_names_its_first_rows() -> None:
    first = numpy.array([0, 1, 0, 3, 1, 3])
    overlap = Overlap.from_rows(first, training=numpy.array([0, 1, 2, 3]), held_out=numpy.array([4, 5]))
    assert overlap.is_held_out.tolist() == [False, True, False, True]
    assert (overlap.count, overlap.first) == (2, (1, 4))
    assert Overlap.from_rows(first, numpy.array([0, 2]), numpy.array([4, 5])).first is None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty rows with two repetitions, and four held-out rows with one of these."""
    folder = tmp_path / "data"
    write_rows(folder / "train.jsonl", [*ROWS, ROWS[4], ROWS[9]])
    write_rows(folder / "eval.jsonl", [chat_row(f"Other {n}?", "nodes") for n in range(3)] + [ROWS[2]])
    return folder


EVAL: dict[str, Any] = {"eval": {"source": "pvc://data/eval.jsonl"}}


@pytest.mark.parametrize(("deduplicate", "used"), [(False, 22), (True, 20)])
@pytest.mark.usefixtures("data")
def test_duplicates_are_counted_and_left_out_on_request(
    make_context: MakeContext, records: Recorded, deduplicate: bool, used: int
) -> None:
    context = make_context({"dataset": {"deduplicate": deduplicate}})
    record = prepare(context, records)
    assert (record.dataset.rows, record.dataset.duplicate_rows, record.dataset.used_rows) == (22, 2, used)
    assert PreparedDataset.open(context.workspace.root / record.data_path, "train").rows == used


@pytest.mark.parametrize(("deduplicate", "used"), [(False, 6), (True, 4)])
def test_held_out_duplicates_are_counted_and_left_out_on_request(
    make_context: MakeContext, records: Recorded, data: Path, deduplicate: bool, used: int
) -> None:
    other = chat_row("Other 1?", "nodes")
    write_rows(data / "eval.jsonl", [other, ROWS[2], other, chat_row("Other 2?", "nodes"), ROWS[2], ROWS[5]])
    context = make_context({"dataset": {**EVAL, "deduplicate": deduplicate}})
    record = prepare(context, records)
    assert (record.dataset.duplicate_rows, record.dataset.overlap_rows, record.dataset.eval_rows) == (2, 2, used)
    folder = context.workspace.root / record.data_path
    assert len(_rows(PreparedDataset.open(folder, "eval"))) == used
    held_out = DataStatistics.read(folder).sources[1]
    assert (held_out.duplicate_rows, held_out.held_out_rows) == (2, used)


@pytest.mark.usefixtures("data")
def test_overlapping_rows_are_named_in_status_message_and_statistics(
    make_context: MakeContext, records: Recorded
) -> None:
    context = make_context({"dataset": EVAL})
    record = prepare(context, records)
    assert (record.dataset.overlap_rows, record.dataset.used_rows) == (1, 22)
    sentence = (
        "1 row for training is also held out: the first, pvc://data/train.jsonl line 3, is equal to "
        "pvc://data/eval.jsonl line 4; trained on nevertheless"
    )
    assert sentence in summary(record, "prepare")
    assert DataStatistics.read(context.workspace.root / record.data_path).overlap == OverlapStatistics(
        rows=1, left_out=False, first="pvc://data/train.jsonl line 3", held_out="pvc://data/eval.jsonl line 4"
    )


@pytest.mark.usefixtures("data")
def test_overlapping_rows_are_left_out_of_training_on_request(make_context: MakeContext, records: Recorded) -> None:
    context = make_context({"dataset": {"eval": {**EVAL["eval"], "overlap": "drop"}}})
    record = prepare(context, records)
    assert (record.dataset.overlap_rows, record.dataset.used_rows, record.dataset.eval_rows) == (1, 21, 4)
    assert "line 4; left out of training" in summary(record, "prepare")
    train, held_out = (
        {tuple(sequence) for sequence in _rows(PreparedDataset.open(context.workspace.root / record.data_path, split))}
        for split in ("train", "eval")
    )
    assert not train & held_out


def _rows(data: PreparedDataset) -> list[list[int]]:
    rows = []
    for sequence in (data[index] for index in range(len(data))):
        start = 0
        for length in sequence.row_lengths:
            rows.append(sequence.input_ids[start : start + length].tolist())
            start += length
    return rows


@pytest.mark.usefixtures("data")
def test_an_overlap_fails_the_job_on_request(make_context: MakeContext, records: Recorded) -> None:
    with pytest.raises(StepFailure) as caught:
        prepare(make_context({"dataset": {"eval": {**EVAL["eval"], "overlap": "fail"}}}), records)
    assert caught.value.exit_code is ExitCode.BAD_DATASET
    assert caught.value.message == (
        "1 row for training is also held out: the first, pvc://data/train.jsonl line 3, is equal to "
        "pvc://data/eval.jsonl line 4; spec.dataset.eval.overlap is fail: remove them from one of the two, or set it "
        "to drop to leave them out of training"
    )


def test_duplicates_split_by_a_fraction_are_reported_and_removed_on_request(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    """Each row exists twice: some held-out rows equal training rows."""
    write_rows(tmp_path / "data" / "train.jsonl", [*ROWS, *ROWS])
    record = prepare(make_context({"dataset": {"eval": {"fraction": 0.25}}}), records)
    assert (record.dataset.duplicate_rows, record.dataset.eval_rows) == (20, 10)
    assert record.dataset.overlap_rows > 3
    unique = prepare(make_context({"dataset": {"eval": {"fraction": 0.25}, "deduplicate": True}}), records)
    assert (unique.dataset.overlap_rows, unique.dataset.used_rows, unique.dataset.eval_rows) == (0, 15, 5)


def test_duplicates_and_overlaps_are_found_across_the_sources_of_a_mix(
    make_context: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data" / "a.jsonl", ROWS[:10])
    write_rows(tmp_path / "data" / "b.jsonl", ROWS[5:15])
    write_rows(tmp_path / "data" / "held.jsonl", [ROWS[12], ROWS[19]])
    mix = {
        "source": None,
        "mix": [{"source": "pvc://data/a.jsonl"}, {"source": "pvc://data/b.jsonl"}],
        "eval": {"source": "pvc://data/held.jsonl", "overlap": "drop"},
        "deduplicate": True,
    }
    context = make_context({"dataset": mix})
    record = prepare(context, records)
    assert (record.dataset.duplicate_rows, record.dataset.overlap_rows, record.dataset.used_rows) == (5, 1, 14)
    statistics = DataStatistics.read(context.workspace.root / record.data_path)
    assert [(source.duplicate_rows, source.used_rows) for source in statistics.sources] == [(0, 10), (5, 4), (0, 0)]
    assert statistics.overlap == OverlapStatistics(
        rows=1, left_out=True, first="pvc://data/b.jsonl line 8", held_out="pvc://data/held.jsonl line 1"
    )


def test_a_source_of_duplicates_alone_is_rejected(make_context: MakeContext, records: Recorded, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "a.jsonl", ROWS)
    write_rows(tmp_path / "data" / "b.jsonl", ROWS[3:6])
    sources = [{"source": "pvc://data/a.jsonl"}, {"source": "pvc://data/b.jsonl"}]
    with pytest.raises(StepFailure) as caught:
        prepare(make_context({"dataset": {"source": None, "mix": sources, "deduplicate": True}}), records)
    assert caught.value.message.startswith(
        "pvc://data/b.jsonl (spec.dataset.mix[1]) has no row left to train on, as each of its rows is a duplicate "
        "of an earlier row"
    )
