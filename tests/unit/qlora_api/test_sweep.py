"""Which QLoRAJobs a sweep stands for, and which manifests of a sweep are rejected."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from qlora_api.spec.job import MUTABLE_FIELDS, QLoRAJobSpec
from qlora_api.spec.training import LoraSpec, TrainingSpec
from qlora_api.sweep.cells import CHANGEABLE, FoundRun, best_job, repeated_cell
from qlora_api.sweep.grid import MAX_CELLS, Grid, Overrides
from qlora_api.sweep.spec import Cell, QLoRASweepSpec, cells, pods
from tests.support.sweeps import FULL_SWEEP, SWEEP, TASKS, TEMPLATE

CLAIM = "rates-0a1b2c3d"


def sweep(template: dict[str, Any] | None = None, **spec: Any) -> QLoRASweepSpec:
    return QLoRASweepSpec.model_validate({"template": {"spec": TEMPLATE | (template or {})}} | spec)


def test_a_grid_is_every_combination_and_the_last_field_changes_first() -> None:
    spec = sweep(grid={"learningRate": [1e-4, 2e-4], "rank": [8, 16]})
    assert [(cell.name, cell.overrides.text()) for cell in cells("rates", spec, CLAIM)] == [
        ("rates-00", "rank=8 learningRate=0.0001"),
        ("rates-01", "rank=8 learningRate=0.0002"),
        ("rates-02", "rank=16 learningRate=0.0001"),
        ("rates-03", "rank=16 learningRate=0.0002"),
    ]


def test_a_cell_is_the_template_with_its_changes_on_the_claim_of_all() -> None:
    spec = QLoRASweepSpec.model_validate(FULL_SWEEP["spec"])
    plain, changed, longer = cells("full", spec, CLAIM)
    template = spec.template.spec
    assert (plain.overrides.text(), plain.spec.training, plain.spec.lora) == (
        "template",
        template.training,
        template.lora,
    )
    assert plain.spec.workspace.claim_name == CLAIM
    assert plain.spec.output.destination == "s3://bucket/adapters/full-00"
    assert changed.spec.output.destination == "s3://bucket/adapters/full-01"
    wanted = FULL_SWEEP["spec"]["cells"][1]
    found = changed.spec.lora.dump() | changed.spec.training.dump()
    assert {name: found[name] for name in wanted} == wanted
    assert longer.spec.training.epochs == 3
    assert changed.spec.model_copy(
        update={name: getattr(plain.spec, name) for name in ("lora", "training", "output")}
    ) == (plain.spec)


def test_cells_that_are_not_compared_have_their_own_data_and_outputs() -> None:
    spec = QLoRASweepSpec.model_validate(TASKS["spec"])
    plain, other, mixed = cells("tasks", spec, CLAIM)
    assert plain.spec.dataset == spec.template.spec.dataset
    assert (other.overrides.text(), list(other.spec.dataset.addresses.values()), other.spec.training.seed) == (
        "seed=7 dataset=pvc://data/summaries.jsonl",
        ["pvc://data/summaries.jsonl"],
        7,
    )
    assert mixed.overrides.text() == "dataset=hf://org/one,hf://org/two output=oci://example.org/team/two:v1"
    assert [cell.spec.output.destination for cell in (plain, other, mixed)] == [
        "s3://bucket/adapters/tasks-00",
        "s3://bucket/adapters/tasks-01",
        "oci://example.org/team/two:v1",
    ]
    assert mixed.spec.output.merged is not None


@pytest.mark.parametrize(
    ("outputs", "place"),
    [
        ([{"destination": "pvc://a/b"}, {"destination": "pvc://a/b/"}], "pvc://a/b"),
        ([{"destination": "pvc://a/b"}, {"merged": {"destination": "pvc://a/b/c"}}], "pvc://a/b"),
        ([None, {"destination": "s3://bucket/adapters/tasks-00"}], "s3://bucket/adapters/tasks-00"),
        ([{"base": {"destination": "pvc://a/base"}}, {"base": {"destination": "pvc://a/base/"}}], None),
        ([{"destination": "pvc://a/b"}, {"destination": "pvc://a/bc"}], None),
    ],
)
def test_two_cells_that_publish_to_one_place_are_named(outputs: list[dict[str, Any] | None], place: str | None) -> None:
    changed = [{"rank": number, **({"output": output} if output else {})} for number, output in enumerate(outputs, 1)]
    spec = sweep({"output": {"destination": "s3://bucket/adapters"}}, cells=changed, select="all")
    if place is None:
        assert len(cells("tasks", spec, CLAIM)) == 2
        return
    with pytest.raises(ValueError, match=f"cells tasks-00 and tasks-01 would both publish to {place}: give each cell"):
        cells("tasks", spec, CLAIM)


def test_the_length_of_a_cell_replaces_that_of_the_template() -> None:
    (cell,) = cells("rates", sweep({"training": {"epochs": 3}}, cells=[{"maxSteps": 10}]), CLAIM)
    assert (cell.spec.training.epochs, cell.spec.training.max_steps) == (None, 10)


def test_a_cells_rate_and_accumulation_replace_the_templates_multiplier_and_batch_size() -> None:
    template = {"training": {"learningRateMultiplier": 2, "batchSize": 8}}
    changes: list[dict[str, Any]] = [{"learningRate": 1e-4}, {"gradientAccumulationSteps": 4}]
    rate, accumulation = (cell.spec.training for cell in cells("rates", sweep(template, cells=changes), CLAIM))
    assert (rate.learning_rate, rate.learning_rate_multiplier, rate.batch_size) == (1e-4, None, 8)
    assert (accumulation.gradient_accumulation_steps, accumulation.batch_size) == (4, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "set exactly one of grid and cells"),
        ({"grid": {"rank": [8]}, "cells": [{"rank": 8}]}, "set exactly one of grid and cells"),
        ({"grid": {}}, "name at least one field"),
        ({"grid": {"rank": list(range(1, 14)), "alpha": [1, 2, 3, 4, 5]}}, "more than 64 cells"),
        ({"grid": {"rank": [8], "suspend": [True]}}, "Extra inputs are not permitted"),
        ({"cells": [{"output": {"merged": {}}}]}, "set select: all, or remove dataset and output from cells"),
        ({"cells": [{"rank": 8}], "select": "all", "halving": {"minSteps": 10}}, "select: all compares no cells"),
    ],
)
def test_a_sweep_that_is_no_sweep(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sweep(**spec)


@pytest.mark.parametrize(
    "grid", [{"rank": [8, 8]}, {"dropout": [0, 0.0]}, {"targetModules": [["q_proj"], ["q_proj"]], "rank": [8, 16]}]
)
def test_a_cell_that_is_there_twice_is_named(grid: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"cell rates-0\d \(.*\) is a duplicate: a list of the grid repeats a value"):
        cells("rates", sweep(grid=grid), CLAIM)


def test_a_grid_far_too_large_is_rejected_without_a_look_at_its_cells() -> None:
    # 64 to the power of 7 combinations.
    names = ("rank", "alpha", "warmupSteps", "microBatchSize", "gradientAccumulationSteps", "maxSteps", "seed")
    lists = {name: tuple(range(1, MAX_CELLS + 1)) for name in names}
    with pytest.raises(ValidationError, match="the grid has more than 64 cells"):
        Grid.model_validate(lists)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"cells": [{}, {"alpha": 8}, {}]},
            r"spec\.cells\[2\] \(template\) is the same as spec\.cells\[0\] \(template\)",
        ),
        ({"cells": [{}, {"rank": 64}]}, r"spec\.cells\[1\] \(rank=64\) is the same as spec\.cells\[0\] \(template\)"),
        ({"cells": [{"epochs": 1}, {"rank": 8}, {"rank": 8, "seed": 0}]}, r"cells\[2\] .* as spec\.cells\[1\]"),
        (
            {"grid": {"rank": [8, 16], "targetModules": [["q_proj", "k_proj"], ["k_proj", "q_proj"]]}},
            r"cell rates-01 of spec\.grid \(rank=8 targetModules=k_proj,q_proj\) is the same as cell rates-00 of ",
        ),
    ],
)
@pytest.mark.parametrize("more", [{}, {"cellsPerPod": 2}])
def test_cells_that_would_train_the_same_adapter_are_both_named(
    spec: dict[str, Any], message: str, more: dict[str, Any]
) -> None:
    lora = {"rank": 64, "alpha": 16}
    found = sweep({"lora": lora, "output": {"destination": "s3://bucket/adapters"}}, **spec, **more)
    why = repeated_cell(found, cells("rates", found, CLAIM))
    assert why is not None
    assert re.search(message, why)


def test_cells_that_differ_in_anything_that_is_trained_are_no_repetition() -> None:
    values: dict[str, Any] = FULL_SWEEP["spec"]["cells"][1] | {"alpha": 32}
    found = sweep(cells=[{}, *({name: value} for name, value in values.items()), {"epochs": 3}, {"seed": 8}])
    assert repeated_cell(found, cells("rates", found, CLAIM)) is None
    tasks = QLoRASweepSpec.model_validate(TASKS["spec"])
    assert repeated_cell(tasks, cells("tasks", tasks, CLAIM)) is None


def test_cells_that_could_not_be_compared() -> None:
    with pytest.raises(ValidationError, match="different seeds could not be compared"):
        sweep({"dataset": {"source": "pvc://a/b.jsonl", "eval": {"fraction": 0.1}}}, cells=[{"seed": 1}, {}])


def test_cells_are_trained_so_many_in_a_pod_and_what_is_left_over_together_or_alone() -> None:
    def sizes(count: int, per_pod: int) -> list[int]:
        spec = sweep(grid={"rank": [4, 8, 16, 32, 64][:count]}, cellsPerPod=per_pod)
        return [len(pod) for pod in pods(spec, cells("rates", spec, CLAIM))]

    assert sizes(3, 1) == [1, 1, 1]
    assert sizes(4, 2) == [2, 2]
    assert sizes(5, 3) == [3, 2]
    assert sizes(3, 2) == [2, 1]


OUTPUT = {"output": {"destination": "hf://org/adapter"}}


def to_publish(template: dict[str, Any], changes: dict[str, Any], run: FoundRun | None = None) -> Cell:
    """The job that publishes the first cell, whose user has changed it since."""
    spec = sweep(OUTPUT | template, grid={"learningRate": [1e-4, 2e-4]}, publish="best")
    first = cells("rates", spec, CLAIM)[0]
    return best_job("rates", spec, first, first.spec.dump() | changes, run or FoundRun())


def test_the_job_that_publishes_the_best_has_what_was_changed_in_its_cell() -> None:
    gate = {"gate": {"maxEvalLoss": 1.0, "score": {"check": "exactMatch"}}}
    changed = {
        "gate": {"maxEvalLoss": 2.0, "score": {"check": "exactMatch"}},
        "resources": {"gpus": 1, "memory": "64Gi"},
        "retry": {"maxFailures": 7, "maxDisruptions": 9},
        "activeDeadlineSeconds": 7200,
        "progressDeadlineSeconds": 600,
        "suspend": True,
        "cleanupAfterSeconds": 5,
    }
    spec = to_publish(gate | {"resources": {"memory": "32Gi"}, "activeDeadlineSeconds": 60}, changed).spec
    assert spec.gate is not None
    assert (spec.gate.max_eval_loss, spec.resources.memory) == (2.0, "64Gi")
    assert (spec.active_deadline_seconds, spec.progress_deadline_seconds) == (7200, 600)
    assert (spec.retry.max_failures, spec.retry.max_disruptions) == (7, 9)
    assert (spec.suspend, spec.cleanup_after_seconds) == (False, None)
    gated = sweep(OUTPUT | gate, grid={"rank": [8, 16]}, publish="best")
    best = cells("rates", gated, CLAIM)[0]
    removed = {field: value for field, value in best.spec.dump().items() if field != "gate"}
    assert best_job("rates", gated, best, removed, FoundRun()).spec.gate is None
    with pytest.raises(
        ValueError, match=r"the spec of QLoRAJob rates-00: gate\.newer: unknown field; allowed are benchmarks, guards"
    ):
        to_publish({}, {"gate": {"newer": 1}})


def test_whatever_may_change_in_a_cell_is_either_taken_or_none_of_its_business() -> None:
    def stored(field: str) -> str | None:
        return QLoRAJobSpec.model_fields[field].alias

    ends = {"suspend", "cancel", "cleanupAfterSeconds", "ttlSecondsAfterFinished"}
    assert {stored(field) for field in MUTABLE_FIELDS} == {*CHANGEABLE, *ends}


def test_the_job_that_publishes_the_best_reads_what_its_cell_has_read() -> None:
    earlier = {"from": {"source": "hf://org/earlier", "secretRef": {"name": "hub"}}}
    run = FoundRun("c0ffee", "hf://org/earlier@" + "a" * 40)
    spec = to_publish({"model": {"source": "hf://org/model", "revision": "main"}, "lora": earlier}, {}, run).spec
    assert spec.model.dump() == {"source": "hf://org/model", "revision": "c0ffee"}
    assert spec.lora.dump()["from"] == {"source": "hf://org/earlier@" + "a" * 40, "secretRef": {"name": "hub"}}
    volume = to_publish({"model": {"source": "pvc://models/base"}}, {}, FoundRun("sha256:" + "a" * 64)).spec
    assert volume.model.dump() == {"source": "pvc://models/base"}
    unknown = to_publish({"model": {"source": "hf://org/model", "revision": "main"}}, {}).spec
    assert unknown.model.revision == "main"


@pytest.mark.parametrize(
    ("template", "more", "message"),
    [
        ({"lora": {"useDora": True}}, {}, "lora.useDora is not supported with cellsPerPod"),
        ({"resources": {"gpus": 2}}, {}, "resources.gpus or nodes above 1 is not supported"),
        ({"lora": {"dropout": 0.1}}, {}, "lora.dropout is not supported"),
        ({}, {"grid": {"dropout": [0.0, 0.1]}}, "remove dropout above 0 from grid and cells"),
        (
            {"training": {"evalEverySteps": 10}},
            {"halving": {"minSteps": 10}},
            "halving stops single cells, and with cellsPerPod",
        ),
    ],
)
def test_cells_that_no_pod_could_train_together(template: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        sweep(template, **({"grid": {"rank": [8, 16]}, "cellsPerPod": 2} | more))
    assert sweep({"lora": {"useDora": True}}, grid={"rank": [8, 16]}).cells_per_pod == 1
    assert sweep(grid={"dropout": [0.0], "rank": [8, 16]}, cellsPerPod=2).cells_per_pod == 2


@pytest.mark.parametrize("name", Grid.model_fields)
def test_a_value_of_a_cell_has_the_bounds_of_the_field_that_it_stands_for(name: str) -> None:
    schema = Overrides.model_json_schema(by_alias=False)["properties"][name]["anyOf"][0]
    origin = (LoraSpec if name in LoraSpec.model_fields else TrainingSpec).model_json_schema(by_alias=False)
    expected = origin["properties"][name]
    expected = expected.get("anyOf", [expected])[0]
    keys = (
        "type",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "enum",
        "items",
        "minItems",
        "maxItems",
    )
    assert {key: schema[key] for key in keys if key in schema} == {
        key: expected[key] for key in keys if key in expected
    }


def test_a_grid_has_the_fields_of_a_cell() -> None:
    assert [*Grid.model_fields, "dataset", "output"] == list(Overrides.model_fields)
    cell = Overrides.model_json_schema()["properties"]
    for name, schema in Grid.model_json_schema()["properties"].items():
        assert schema["anyOf"][0]["items"] == cell[name]["anyOf"][0]


def test_the_manifest_of_the_tests_is_read() -> None:
    assert len(QLoRASweepSpec.model_validate(SWEEP["spec"]).overrides()) == 4
