"""A mix: each source gives its share to each epoch, in a new draw."""

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from qlora_api.contract import ExitCode
from qlora_api.spec.resolved import ResolvedTraining
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.outcome import summary
from qlora_trainer.data import epochs
from qlora_trainer.data.epochs import EpochArrangements, Mix
from qlora_trainer.data.packing import one_row_each
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.statistics import DataStatistics
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.training.schedule import Schedule
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.resolved import TRAINING, resolved_training
from tests.support.training import adapter_bytes, history, interrupted_at, run
from tests.trainer.conftest import MakeContext

SIZES = {"pods": 24, "nodes": 9, "jobs": 3}
MIX = [{"source": f"pvc://data/{name}.jsonl", "weight": weight} for name, weight in zip(SIZES, (6, 3, 3), strict=True)]
SHARES = {"pods": 18, "nodes": 9, "jobs": 9}
"""Of the 36 rows of an epoch: a part of the pods, every node once, every job three times."""


@pytest.fixture(autouse=True)
def sources(tmp_path: Path) -> None:
    """A file for each source, without equal rows."""
    for name, size in SIZES.items():
        rows = [chat_row(f"{name} {n}?", f"{name} " * (n % 4 + 1)) for n in range(size)]
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)


@pytest.fixture
def make_mixed(make_context: MakeContext) -> MakeContext:
    """Makes the context of a job with the mix."""

    def make(spec: dict[str, Any] | None = None, mix: list[dict[str, Any]] = MIX) -> StepContext:
        dataset = {"source": None, "mix": mix, **((spec or {}).get("dataset") or {})}
        return make_context({"training": {"maxSteps": 12}, **(spec or {}), "dataset": dataset})

    return make


def opened(context: StepContext, record: PrepareRecord, split: Any = "train") -> PreparedDataset:
    return PreparedDataset.open(context.workspace.root / record.data_path, split)


def epochs_of(data: PreparedDataset, tokenizer: Any, steps: range, schedule: Schedule) -> dict[int, list[str]]:
    """The questions that the steps train on, by epoch."""
    epochs: dict[int, list[str]] = {}
    for step in steps:
        for index in (index for micro_batch in schedule.micro_batches(step) for index in micro_batch):
            sequence, start = data[index], 0
            for length in sequence.row_lengths:
                text = tokenizer.decode(sequence.input_ids[start : start + length].tolist())
                question = text.split("user\n")[1].split("?")[0]
                epochs.setdefault(schedule.position(step)[0], []).append(question)
                start += length
            assert start == len(sequence.input_ids) <= 64
    return epochs


def failure(context: StepContext) -> str:
    """Prepare's message about data that it rejects."""
    with pytest.raises(StepFailure) as caught:
        prepare(context, Recorded())
    assert caught.value.exit_code is ExitCode.BAD_DATASET
    return caught.value.message


@given(
    st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.001, 1000)), min_size=1, max_size=16),
)
def test_shares_follow_the_weights_and_add_up_to_all_rows(sources: list[tuple[int, float]]) -> None:
    sizes, weights = zip(*sources, strict=True)
    mix = Mix.from_sizes(sizes, weights)
    assert sum(mix.shares) == sum(sizes)
    for share, weight in zip(mix.shares, weights, strict=True):
        assert abs(share - sum(sizes) * weight / sum(weights)) < 1 + 1e-6


def test_an_epoch_has_no_row_twice_before_it_has_all_rows_of_the_source() -> None:
    mix = Mix.from_sizes((10, 4), (1.0, 1.0))
    epochs = [rows.tolist() for rows in islice(mix.epochs(seed=0), 20)]
    for rows in epochs:
        counts = Counter(rows)
        assert len(rows) == 14
        assert [counts[row] for row in range(10)].count(1) == 7
        assert sorted(counts[row] for row in range(10, 14)) == [1, 2, 2, 2]
    assert len({tuple(rows) for rows in epochs}) == 20
    assert {row for rows in epochs for row in rows} == set(range(14)), "over the epochs every row has its turn"
    assert [rows.tolist() for rows in islice(mix.epochs(seed=0), 20)] == epochs
    assert next(mix.epochs(seed=1)).tolist() != epochs[0]


def test_the_rows_of_an_epoch_are_drawn_evenly() -> None:
    """Each of 100 rows is drawn in half of 2000 epochs, within five deviations."""
    mix = Mix.from_sizes((100, 100), (1.0, 3.0))
    counts = numpy.bincount(numpy.concatenate(list(islice(mix.epochs(seed=3), 2000))), minlength=200)
    deviations = numpy.abs(counts[:100] - 1000) / numpy.sqrt(2000 * 0.25)
    assert numpy.mean(deviations < 1.15) > 0.6
    assert deviations.max() < 5


@pytest.mark.parametrize("packing", [True, False])
def test_every_epoch_has_the_shares_of_all_sources_in_a_new_draw(
    make_mixed: MakeContext, records: Recorded, tiny_llama: Path, packing: bool
) -> None:
    context = make_mixed({"training": {"maxSteps": None, "epochs": 4, "packing": packing}})
    record = prepare(context, records)
    data = opened(context, record)
    schedule = Schedule.from_training(len(data), record.resolve(context.spec).training, data.epoch_offsets)
    assert data.rows == 36, "each row is stored once, however many epochs draw it"
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    epochs = epochs_of(data, tokenizer, range(schedule.total_steps), schedule)
    assert list(epochs) == [0, 1, 2, 3]
    for rows in epochs.values():
        counts = Counter(rows)
        assert Counter(question.split()[0] for question in rows) == SHARES
        assert max(counts[f"pods {n}"] for n in range(24)) == 1
        assert {counts[f"nodes {n}"] for n in range(9)} == {1}
        assert {counts[f"jobs {n}"] for n in range(3)} == {3}
    drawn = [frozenset(row for row in rows if row.startswith("pods")) for rows in epochs.values()]
    assert len(set(drawn)) == 4
    assert len(frozenset.union(*drawn)) > 20
    assert schedule.epoch(schedule.total_steps) == 4


def test_the_counts_of_each_source_are_in_the_status_and_in_the_statistics(
    make_mixed: MakeContext, records: Recorded
) -> None:
    context = make_mixed({"dataset": {"eval": {"fraction": 0.34}}})
    record = prepare(context, records)
    status, statistics = record.dataset, DataStatistics.read(context.workspace.root / record.data_path)
    assert status.sources is not None
    assert [(found.source, found.rows, found.used_rows, found.epoch_rows) for found in status.sources] == [
        ("pvc://data/pods.jsonl", 24, 16, 12),
        ("pvc://data/nodes.jsonl", 9, 6, 6),
        ("pvc://data/jobs.jsonl", 3, 2, 6),
    ]
    assert (status.rows, status.used_rows, status.eval_rows) == (36, 24, 12)
    assert status.tokens == sum(found.tokens for found in status.sources)
    assert [(found.weight, found.held_out_rows, found.used_rows, found.epoch_rows) for found in statistics.sources] == [
        (6, 8, 16, 12),
        (3, 3, 6, 6),
        (3, 1, 2, 6),
    ]
    assert statistics.train.rows == 24
    assert abs(statistics.train.tokens - status.tokens) < 0.2 * status.tokens
    assert status.overlap_rows == status.duplicate_rows == 0
    assert opened(context, record, "eval").rows == 12


def test_without_weights_each_row_is_in_each_epoch_once(
    make_mixed: MakeContext, records: Recorded, tiny_llama: Path
) -> None:
    mix = [{"source": entry["source"]} for entry in MIX]
    context = make_mixed({"training": {"maxSteps": None, "epochs": 2}}, mix)
    record = prepare(context, records)
    data = opened(context, record)
    schedule = Schedule.from_training(len(data), record.resolve(context.spec).training, data.epoch_offsets)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    epochs = epochs_of(data, tokenizer, range(schedule.total_steps), schedule)
    assert [set(Counter(rows).values()) for rows in epochs.values()] == [{1}, {1}]
    assert [len(rows) for rows in epochs.values()] == [36, 36]
    assert epochs[0] != epochs[1]


def test_as_many_epochs_are_drawn_as_the_steps_need(make_mixed: MakeContext, records: Recorded) -> None:
    record = prepare(make_mixed({"training": {"maxSteps": 31}}), records)
    data = opened(make_mixed(), record)
    spec = make_mixed({"training": {"maxSteps": 31}}).spec
    schedule = Schedule.from_training(len(data), record.resolve(spec).training, data.epoch_offsets)
    assert schedule.total_steps == 31
    drawn = len(data.epoch_offsets) - 1
    assert schedule.first_step(drawn - 1) < 31 <= schedule.first_step(drawn)
    assert any(record["activity"] == f"drawing the rows of epoch {drawn}" for record in records.written)
    longer = make_mixed({"training": {"maxSteps": 1000}})
    assert prepare(longer, records).fingerprint != record.fingerprint, "more rows are to be drawn"


def test_the_train_step_rejects_rows_that_were_drawn_for_fewer_steps() -> None:
    with pytest.raises(
        StepFailure, match="the rows of 2 epochs are drawn, but the job trains on more: run the prepare"
    ):
        Schedule.from_training(9, resolved_training(epochs=3), (0, 4, 9))


def test_each_source_has_its_own_format(make_mixed: MakeContext, records: Recorded, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "plain.jsonl", [{"q": f"Which pod is number {n}?", "a": f"n{n}"} for n in range(4)])
    columns = {"prompt": "q", "completion": "a"}
    plain = {"source": "pvc://data/plain.jsonl", "weight": 1, "format": "prompt-completion", "columns": columns}
    record = prepare(make_mixed({}, [*MIX, plain]), records)
    assert record.dataset.format == "chat, prompt-completion"
    assert "rows of format chat, prompt-completion" in summary(record, "prepare")


def test_changed_data_of_any_source_is_prepared_again(
    make_mixed: MakeContext, records: Recorded, tmp_path: Path
) -> None:
    first = prepare(make_mixed(), records)
    assert prepare(make_mixed(), records) == first
    write_rows(tmp_path / "data" / "jobs.jsonl", [chat_row("jobs 0?", "done"), chat_row("jobs 1?", "failed")])
    assert prepare(make_mixed(), records).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1e-6}, "pvc://data/jobs.jsonl (spec.dataset.mix[2]) gives none of the 36 rows of an epoch: raise"),
        ({"sha256": "0" * 64}, "but spec.dataset.mix[2].sha256 is 000"),
        (
            {"format": "text"},
            "name it in spec.dataset.mix[2].columns.text or choose another spec.dataset.mix[2].format",
        ),
        ({"columns": {"messages": "m"}}, "set spec.dataset.mix[2].format, and spec.dataset.mix[2].columns where names"),
        ({"source": "pvc://data/none.jsonl"}, "pvc://data/none.jsonl does not exist; its folder has"),
    ],
)
def test_a_message_names_the_source(make_mixed: MakeContext, change: dict[str, Any], message: str) -> None:
    assert message in failure(make_mixed({}, [*MIX[:2], {**MIX[2], **change}]))


def test_each_source_must_have_rows_to_hold_out(make_mixed: MakeContext, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "jobs.jsonl", [chat_row("jobs 0?", "done")])
    message = failure(make_mixed({"dataset": {"eval": {"fraction": 0.5}}}))
    assert message.startswith("pvc://data/jobs.jsonl (spec.dataset.mix[2]) has 1 usable row: to hold out a fraction")


def drawn(sizes: tuple[int, ...], folder: Path, **training: Any) -> int:
    """Return how many epochs a run draws in steps of 12 rows, up to a rejection."""
    epochs: list[int] = []

    def arranged() -> EpochArrangements:
        return EpochArrangements.from_epochs(
            Mix.from_sizes(sizes, [None] * len(sizes)).epochs(seed=0),
            one_row_each,
            ResolvedTraining.model_validate({**TRAINING, "gradientAccumulationSteps": 12, **training}),
            folder,
            epochs.append,
        )

    try:
        assert len(arranged().epoch_offsets) == len(epochs) + 1
    except StepFailure:
        assert len(epochs) == 1
        raise
    return len(epochs)


def test_a_run_of_more_epochs_than_can_be_drawn_is_rejected_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StepFailure) as caught:
        drawn((24, 9, 3), tmp_path, maxSteps=5_000_000)
    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert caught.value.message == (
        "spec.training.maxSteps is 5000000: with spec.dataset.mix that is about 1666667 epochs of 36 rows, which "
        "prepare would have to draw one by one, and it draws at most 100000 epochs and 1000000000 rows: set maxSteps "
        "to at most about 300000, or mix larger sources"
    )
    # Large sources are bounded by their rows.
    monkeypatch.setattr(epochs, "MAX_DRAWN_ROWS", 36 * 4)
    with pytest.raises(StepFailure, match=r"spec\.training\.epochs is 5: .* set epochs to at most about 4"):
        drawn((24, 9, 3), tmp_path, epochs=5)
    assert drawn((24, 9, 3), tmp_path, epochs=4) == 4
    assert drawn((24, 9, 3), tmp_path, maxSteps=12) == 4


@pytest.mark.slow
def test_prepare_rejects_a_run_of_more_epochs_than_can_be_drawn(make_mixed: MakeContext) -> None:
    context, records = make_mixed({"training": {"maxSteps": 5_000_000}}), Recorded()
    with pytest.raises(StepFailure, match=r"spec\.training\.maxSteps is 5000000: with spec\.dataset\.mix"):
        prepare(context, records)
    assert [said for said in [record["activity"] for record in records.written] if said.startswith("drawing")] == [
        "drawing the rows of epoch 1"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_pairs_repeated_in_a_step_are_resumed_to_the_same_bytes(
    packing: bool, make_mixed: MakeContext, tmp_path: Path
) -> None:
    """Of a small source with a large weight: the base's part is computed once a pair."""
    for name, size in (("many", 12), ("few", 4)):
        pairs = [{"prompt": f"{name} {n}?", "chosen": f"get {name} {n}", "rejected": "delete"} for n in range(size)]
        write_rows(tmp_path / "data" / f"{name}.jsonl", pairs)
    mix = [{"source": "pvc://data/many.jsonl", "weight": 1}, {"source": "pvc://data/few.jsonl", "weight": 3}]
    training = {"objective": "dpo", "packing": packing, "maxSteps": 6, "microBatchSize": 2, "saveEverySteps": 2}
    spec = {
        "dataset": {"eval": {"fraction": 0.25}},
        "training": {**training, "gradientAccumulationSteps": 4, "maxSequenceLength": 128, "evalEverySteps": 2},
    }
    context = make_mixed(spec, mix)
    assert prepare(context, Recorded()).dataset.format == "preference"
    run(context)
    undisturbed = adapter_bytes(context), history(context)
    for folder in (context.workspace.checkpoints, context.workspace.trained, context.workspace.report):
        shutil.rmtree(folder)
    context.workspace.completion("train").unlink()

    interrupted_at(context, 1)
    interrupted_at(context, 3)
    run(context)

    assert (adapter_bytes(context), history(context)) == undisturbed
