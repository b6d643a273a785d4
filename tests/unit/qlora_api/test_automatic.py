"""The settings of a job that names only a model and data, and what follows from those that it sets."""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_api.automatic import (
    ASSUMED,
    Limits,
    ModelFacts,
    RowFacts,
    assume,
    choose,
    choose_held_out,
    choose_length,
)
from qlora_api.choice import Choice, sentence
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import HELD_OUT, ResolvedSpec, fill, open_settings, resolve
from qlora_api.steps import optimizer_steps
from tests.fuzz.inputs import BOUNDED
from tests.support.manifests import MINIMAL, merged
from tests.support.resolved import DECIDED

OF_135M, OF_8B = ModelFacts(width=576, weights_per_rank=305_280), ModelFacts(width=4096, weights_per_rank=2_621_440)

ALONE = Limits()


def job(**settings: Any) -> QLoRAJobSpec:
    return QLoRAJobSpec.model_validate(merged(MINIMAL["spec"], settings))


def facts(lengths: Sequence[int], length: int, *, held_out: bool = False) -> RowFacts:
    """Counts of rows that fill their sequences, half of whose tokens are trained on."""
    tokens = sum(tokens for tokens in lengths if tokens <= length)
    return RowFacts(len(lengths), max(1, ceil(tokens / length)), tokens // 2, held_out)


def chosen(
    spec: QLoRAJobSpec, lengths: Sequence[int], model: ModelFacts = OF_135M, limits: Limits = ALONE
) -> tuple[Choice, ...]:
    """All choices for a job with rows of these lengths, as prepare makes them."""
    held_out = choose_held_out(spec, len(lengths)) if spec.dataset.eval is None else None
    first = (choose_length(lengths, 8192), *(() if held_out is None else (held_out,)))
    filled = fill(spec, first)
    length = filled.training.max_sequence_length
    assert length is not None
    rows = facts(lengths, length, held_out=filled.dataset.holds_out)
    return (*first, *choose(filled, length, rows, model, limits))


def run(spec: QLoRAJobSpec, lengths: Sequence[int], model: ModelFacts = OF_135M) -> tuple[ResolvedSpec, int]:
    """The decided job and its optimizer steps."""
    decided = resolve(spec, chosen(spec, lengths, model))
    return decided, steps_of(decided, facts(lengths, decided.training.max_sequence_length))


def steps_of(spec: ResolvedSpec, rows: RowFacts) -> int:
    training = spec.training
    per_step = training.micro_batch_size * training.gradient_accumulation_steps
    sequences = rows.sequences if training.packing else rows.rows
    return optimizer_steps(sequences, per_step, training.epochs, training.max_steps)


def batch(spec: ResolvedSpec) -> int:
    return spec.training.micro_batch_size * spec.training.gradient_accumulation_steps


def test_few_rows_are_repeated_in_the_smallest_steps() -> None:
    """With the settings of ten thousand rows, this job would make one step."""
    decided, steps = run(job(), [30] * 20)
    training = decided.training
    assert (training.max_sequence_length, training.epochs, batch(decided)) == (128, 5, 1)
    assert (steps, training.warmup_steps, training.keep) == (100, 5, "last")
    assert decided.dataset.eval is None


def test_one_long_row_does_not_leave_the_others_few_steps() -> None:
    """In sequences as long as the longest row, the others are few: they are not packed."""
    decided, steps = run(job(), [2000] + [15] * 159)
    assert (decided.training.max_sequence_length, decided.training.packing, steps) == (2048, False, 162)
    packed, steps = run(job(training={"packing": True}), [2000] + [15] * 159)
    assert (packed.training.packing, steps) == (True, 30)


@pytest.mark.parametrize(
    ("settings", "packing"),
    [
        ({}, True),
        ({"training": {"epochs": 1}}, False),
        ({"training": {"maxSteps": 5}}, True),
        ({"training": {"gradientAccumulationSteps": 16}}, False),
        ({"resources": {"gpus": 8}}, False),
    ],
    ids=str,
)
def test_rows_are_packed_where_that_leaves_enough_steps(settings: dict[str, Any], packing: bool) -> None:
    assert run(job(**settings), [40] * 160)[0].training.packing is packing


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_a_larger_smallest_step_makes_more_epochs(gpus: int) -> None:
    decided, steps = run(job(resources={"gpus": gpus}), [120] * 100)
    assert (decided.training.epochs, steps >= 100) == ({1: 3, 2: 3, 8: 9}[gpus], True)


def test_a_hundred_and_sixty_short_rows_make_more_than_a_hundred_steps() -> None:
    decided, steps = run(job(), [40] * 160)
    assert 100 < steps < 300
    assert (decided.training.keep, decided.dataset.dump()["eval"]) == ("best", {"fraction": 0.1})
    assert 1 <= (decided.training.eval_every_steps or 0) <= steps // 3


@pytest.mark.parametrize(
    ("rows", "epochs", "sequences_per_step", "steps"),
    [(160, 3, 3, 150), (400, 3, 7, 162), (1000, 3, 16, 177), (9000, 2, 16, 1056), (20_000, 1, 16, 1172)],
)
def test_more_rows_make_larger_steps_then_more_and_then_fewer_epochs(
    rows: int, epochs: int, sequences_per_step: int, steps: int
) -> None:
    decided, found = run(job(dataset={"eval": {"fraction": 0}}), [120] * rows)
    assert (decided.training.epochs, batch(decided), found) == (epochs, sequences_per_step, steps)


def test_many_rows_are_trained_once_in_full_batches() -> None:
    decided, steps = run(job(), [120] * 52_000, OF_8B)
    assert (decided.training.epochs, batch(decided), decided.lora.rank, decided.lora.alpha) == (1, 16, 16, 32)
    assert decided.training.learning_rate == pytest.approx(2.9e-4, rel=0.05)
    assert (steps > 1000, decided.training.warmup_steps) == (True, 100)


def test_the_rate_falls_with_the_width_and_is_a_tenth_for_pairs() -> None:
    small, large = (run(job(), [40] * 160, model)[0].training.learning_rate for model in (OF_135M, OF_8B))
    pairs, _ = run(job(training={"objective": "dpo"}), [40] * 160)
    assert small > 3 * large
    assert pairs.training.learning_rate == pytest.approx(small / 10, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "follows"),
    [
        ({"training": {"epochs": 1}}, {"batch": 1, "packing": False, "warmupSteps": 8}),
        ({"training": {"maxSteps": 1}}, {"warmupSteps": 0, "keep": "last"}),
        ({"training": {"maxSteps": 5}}, {"batch": 16, "warmupSteps": 1, "evalEverySteps": 1}),
        ({"training": {"microBatchSize": 4}}, {"batch": 4, "autoMicroBatch": False}),
        ({"training": {"gradientAccumulationSteps": 16}}, {"batch": 16}),
        ({"training": {"maxSequenceLength": 1024}}, {"packing": False, "epochs": 3}),
        ({"training": {"learningRate": 1e-5}}, {"scheduler": "linear"}),
        ({"lora": {"rank": 8}}, {"alpha": 32}),
        ({"lora": {"useRslora": True}}, {"alpha": 8, "rank": 16}),
        ({"dataset": {"eval": {"fraction": 0}}}, {"keep": "last"}),
        ({"training": {"keep": "last"}}, {"evalEverySteps": 50}),
    ],
    ids=str,
)
def test_a_setting_of_the_job_is_kept_and_the_others_follow_it(
    settings: dict[str, Any], follows: dict[str, Any]
) -> None:
    decided, _ = run(job(**settings), [40] * 160)
    found = {**decided.lora.dump(), **decided.training.dump(), "batch": batch(decided)}
    assert {name: found.get(name) for name in follows} == follows
    given = merged(MINIMAL["spec"], settings)
    assert merged(decided.dump(), given) == decided.dump()


@pytest.mark.parametrize(
    ("batch_size", "length", "more", "limits", "batches"),
    [
        (16, 120, {}, ALONE, (16, 1)),
        (64, 120, {}, ALONE, (32, 2)),
        (17, 1000, {}, ALONE, (1, 17)),
        (12, 500, {}, Limits(micro_batch=3), (3, 4)),
        (12, 500, {}, Limits(group_size=4), (2, 6)),
        (12, 120, {}, Limits(one_row=True), (1, 12)),
        (16, 120, {"resources": {"gpus": 4}}, ALONE, (4, 4)),
        (12, 500, {"resources": {"gpus": 2}}, ALONE, (6, 2)),
        (6, 120, {"resources": {"gpus": 4}}, ALONE, (2, 3)),
        (1, 120, {"resources": {"gpus": 8}}, ALONE, (1, 1)),
        (16, 120, {"resources": {"gpus": 2}, "training": {"sharding": "full"}}, ALONE, (1, 16)),
        (16, 120, {"resources": {"gpus": 2}, "training": {"microBatchSize": 2}}, ALONE, (2, 8)),
    ],
)
def test_a_step_has_the_rows_that_the_job_asks_for(
    batch_size: int, length: int, more: dict[str, Any], limits: Limits, batches: tuple[int, int]
) -> None:
    spec = job(**merged(more, {"training": {"batchSize": batch_size}}))
    choices = chosen(spec, [length] * 2_000, limits=limits)
    training = resolve(spec, choices).training
    assert (training.micro_batch_size, training.gradient_accumulation_steps) == batches
    assert (training.packing, training.batch_size) == (False, batch_size)
    assert "packing false (batchSize counts rows)" in (sentence(choices) or "")


def test_a_batch_size_decides_the_epochs_and_the_warm_up() -> None:
    decided, steps = run(job(training={"batchSize": 32}), [120] * 320)
    assert (decided.training.epochs, steps, decided.training.warmup_steps) == (10, 100, 5)


@pytest.mark.parametrize(("objective", "rate"), [("supervised", 6.5e-4), ("dpo", 6.5e-5)])
def test_a_multiplier_changes_the_automatic_rate(objective: str, rate: float) -> None:
    spec = job(training={"learningRateMultiplier": 0.25, "objective": objective})
    choices = chosen(spec, [40] * 160)
    assert resolve(spec, choices).training.learning_rate == rate
    assert f"(0.25 times {4 * rate:g}, for a width of 576)" in (sentence(choices) or "")


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_each_gpu_gets_as_many_micro_batches_of_a_step(gpus: int) -> None:
    decided, _ = run(job(resources={"gpus": gpus}), [120] * 20_000)
    assert decided.training.gradient_accumulation_steps % gpus == 0
    assert batch(decided) >= 16


def test_a_micro_batch_has_one_row_where_rows_cannot_be_kept_apart() -> None:
    decided = resolve(job(), chosen(job(), [120] * 20_000, limits=Limits(one_row=True)))
    assert decided.training.packing is False
    assert (decided.training.micro_batch_size, batch(decided)) == (1, 16)


@pytest.mark.parametrize("limits", [Limits(group_size=4), Limits(one_row=True)], ids=str)
def test_a_run_that_cannot_halve_its_micro_batch_is_not_set_to(limits: Limits) -> None:
    alone, limited = (
        resolve(job(), chosen(job(), [120] * 20_000, limits=found)).training.auto_micro_batch
        for found in (ALONE, limits)
    )
    assert (alone, limited) == (True, False)


def test_the_size_of_an_earlier_adapter_is_kept() -> None:
    spec = job(lora={"from": {"source": "hf://org/adapter"}})
    decided = resolve(spec, chosen(spec, [40] * 160, limits=Limits(adapter={"rank": 48, "alpha": 7})))
    assert (decided.lora.rank, decided.lora.alpha) == (48, 7)


def test_an_adapter_has_room_for_much_data() -> None:
    few, many = (
        choose(job(), 128, RowFacts(9000, 9000, tokens, held_out=False), OF_135M)[0] for tokens in (10**6, 10**8)
    )
    assert [(each.setting, each.value) for each in (few, many)] == [("lora.rank", "16"), ("lora.rank", "256")]


@pytest.mark.parametrize(
    ("lengths", "context", "length"),
    [
        ([30], None, 128),
        ([200, 300], None, 512),
        ([512] * 9, None, 512),
        ([5000], 4096, 4096),
        ([200_000], None, 131_072),
        ([50] * 999 + [100_000], 131_072, 128),
        ([50] * 999 + [1_500], 131_072, 2048),
        ([50] * 8 + [16_000], 8192, 128),
        ([50] * 9 + [100_000], 131_072, 131_072),
    ],
    ids=[
        "short",
        "power of two",
        "exact",
        "positions",
        "the schema's most",
        "outlier",
        "few",
        "no sequence holds it",
        "too many to leave out",
    ],
)
def test_a_sequence_holds_the_rows(lengths: list[int], context: int | None, length: int) -> None:
    assert choose_length(lengths, context).parsed == length


@BOUNDED
@given(lengths=st.lists(st.integers(1, 131_072), min_size=1, max_size=400))
def test_a_chosen_length_leaves_out_at_most_half_a_percent_of_the_rows(lengths: list[int]) -> None:
    length = choose_length(lengths, None).parsed
    assert isinstance(length, int)
    assert sum(tokens > length for tokens in lengths) <= 0.005 * len(lengths)


@BOUNDED
@given(rows=st.integers(1, 10**7))
def test_ten_to_five_hundred_rows_are_held_out_of_a_hundred_or_more(rows: int) -> None:
    found = choose_held_out(job(), rows)
    if rows < 100:
        assert found is None
        return
    assert found is not None
    held_out = round(float(found.value) * rows)
    assert 10 <= held_out <= 500
    assert found.reason == f"{held_out} of {rows} rows"


@pytest.mark.parametrize("training", [{"keep": "best"}, {"earlyStopping": {"patience": 2}}, {"evalEverySteps": 5}])
def test_a_job_that_needs_held_out_rows_gets_some_of_few(training: dict[str, Any]) -> None:
    shares = [choose_held_out(job(training=training), rows) for rows in (1, 2, 40)]
    assert [None if each is None else each.reason for each in shares] == [None, "1 of 2 rows", "4 of 40 rows"]


def test_a_smaller_gpu_gets_the_same_steps_in_more_passes() -> None:
    spec = job(resources={"gpus": 2})
    choices = [chosen(spec, [60] * 20_000, limits=Limits(micro_batch=size)) for size in (None, 7, 3, 1)]
    found = [resolve(spec, each) for each in choices]
    assert [each.training.micro_batch_size for each in found] == [8, 4, 2, 1]
    assert {batch(each) for each in found} == {16}
    assert {each.training.gradient_accumulation_steps % 2 for each in found} == {0}
    assert [each.training.auto_micro_batch for each in found] == [True, True, True, False]
    assert "microBatchSize 1 (fits the GPU)" in (sentence(choices[-1]) or "")


@pytest.mark.parametrize(("room", "micro_batch"), [(None, 14), (14, 14), (13, 7), (4, 2), (1, 1)])
def test_a_micro_batch_is_divided_without_a_rest(room: int | None, micro_batch: int) -> None:
    spec = job(training={"maxSteps": 200})
    decided = resolve(spec, chosen(spec, [120] * 1_000, limits=Limits(micro_batch=room)))
    assert (decided.training.micro_batch_size, batch(decided)) == (micro_batch, 14)


def test_warm_up_and_evaluations_follow_the_steps_of_a_smaller_micro_batch() -> None:
    """The job sets the passes of a step, so that smaller ones make more steps."""
    spec = job(training={"gradientAccumulationSteps": 2})
    found = []
    for room in (None, 2):
        choices = chosen(spec, [120] * 1_000, limits=Limits(micro_batch=room))
        decided = resolve(spec, choices)
        steps = steps_of(decided, facts([120] * 1_000, 128))
        found.append(steps)
        assert f"warmupSteps {round(0.05 * steps)} (5% of {steps} steps)" in (sentence(choices) or "")
        assert decided.training.eval_every_steps == steps // 3
    assert found[1] > 3 * found[0]


@pytest.mark.parametrize("settings", [{}, {"dataset": {"eval": {"fraction": 0}}}, {"training": {"maxSteps": 1}}])
def test_a_plan_without_the_rows_assumes_many(settings: dict[str, Any]) -> None:
    spec = job(**settings)
    choices = assume(spec, OF_8B, 1024, ALONE)
    decided = resolve(spec, choices)
    assert decided.training.max_sequence_length == 1024
    reasons = {each.name: each.reason for each in choices}
    assert (reasons["learningRate"], reasons["rank"]) == ("for a width of 4096", ASSUMED)
    assert batch(decided) == 16


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "lora": st.fixed_dictionaries(
            {},
            optional={
                "rank": st.integers(1, 1024),
                "alpha": st.integers(1, 8192),
                "useRslora": st.booleans(),
            },
        ),
        "dataset": st.fixed_dictionaries({}, optional={"eval": st.sampled_from([{"fraction": 0.1}])}),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "epochs": st.integers(1, 1000),
                "microBatchSize": st.integers(1, 1024),
                "gradientAccumulationSteps": st.integers(1, 4096),
                "learningRate": st.floats(1e-9, 1),
                "scheduler": st.sampled_from(["constant", "linear", "cosine"]),
                "maxSequenceLength": st.integers(16, 131_072),
                "evalEverySteps": st.integers(1, 10_000_000),
                "keep": st.sampled_from(["last", "best"]),
                "objective": st.sampled_from(["supervised", "dpo", "orpo"]),
                "packing": st.booleans(),
            },
        )
        | st.fixed_dictionaries({"maxSteps": st.integers(1, 10_000_000)})
        | st.fixed_dictionaries(
            {"batchSize": st.integers(1, 4096)}, optional={"learningRateMultiplier": st.floats(1e-9, 1000)}
        )
        | st.just({"sharding": "full"}),
        "resources": st.fixed_dictionaries({"gpus": st.integers(2, 16)}),
    },
)
LIMITS = st.builds(
    Limits,
    one_row=st.booleans(),
    group_size=st.integers(1, 16),
    micro_batch=st.none() | st.integers(1, 64),
    adapter=st.none() | st.just({"rank": 12, "alpha": 24}),
)


@BOUNDED
@given(
    settings=SETTINGS,
    lengths=st.lists(st.integers(1, 300_000), min_size=1, max_size=300),
    rows=st.integers(1, 10**8),
    width=st.integers(1, 10**5),
    limits=LIMITS,
)
def test_choices_for_any_rows_and_settings_make_a_job_that_can_run(
    settings: dict[str, Any], lengths: list[int], rows: int, width: int, limits: Limits
) -> None:
    if "sharding" in settings.get("training", {}):
        settings["resources"] = {"gpus": 2}
    spec, model = job(**settings), ModelFacts(width, weights_per_rank=100 * width)
    choices = chosen(spec, lengths * (1 + rows % 7), model, limits)
    decided = resolve(spec, choices)
    for each in choices:
        if each.setting not in {"training.maxSequenceLength", HELD_OUT}:
            assert each.setting in open_settings(spec)
    length = decided.training.max_sequence_length
    counted = replace(facts(lengths * (1 + rows % 7), length), held_out=decided.dataset.holds_out)
    steps = steps_of(decided, counted)
    assert decided.training.warmup_steps < steps
    left_open = open_settings(spec)
    if "training.evalEverySteps" in left_open:
        assert (decided.training.eval_every_steps or 1) <= steps
    if "training.keep" in left_open:
        assert decided.training.keep == "last" or decided.training.eval_every_steps is not None
    if spec.training.batch_size is not None:
        assert (batch(decided), decided.training.packing) == (spec.training.batch_size, False)
    elif "training.gradientAccumulationSteps" in left_open:
        assert decided.training.gradient_accumulation_steps % decided.resources.gpu_count == 0


def test_a_job_that_sets_everything_gets_no_choice() -> None:
    assert choose(job(**DECIDED), 512, RowFacts(9, 9, 9, held_out=True), OF_135M) == ()


@pytest.mark.parametrize("rows", [450, 762, 3001])
def test_no_rounding_of_the_batch_costs_steps(rows: int) -> None:
    """Eight sequences of 512 fill a pass: nine are two passes of four or five, and not of eight."""
    _, steps = run(job(training={"maxSequenceLength": 512}), [512] * rows)
    assert steps >= 150
