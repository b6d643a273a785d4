"""A job's memory measured on its model's real layers: every share, for every kind of adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from qlora_api.memory.estimate import estimate
from qlora_api.memory.model_shape import ModelShape
from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import MeasuredJob, TableJob, measured_estimate
from qlora_trainer.model.memory.joint_memory import memory_together
from qlora_trainer.model.memory.measure import measure, measure_together

WIDE: dict[str, Any] = {
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def job(lora: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> QLoRAJobSpec:
    sources = {"model": {"source": "hf://acme/model"}, "dataset": {"source": "hf://acme/rows"}}
    changed = {"lora": {"rank": 16} | (lora or {}), "training": {"maxSequenceLength": 1024} | (training or {})}
    return QLoRAJobSpec.model_validate(sources | changed)


def measured(folder: Path, spec: QLoRAJobSpec, config: PretrainedConfig | None = None) -> MeasuredMemory:
    """The job's own micro batch."""
    (config or LlamaConfig(**WIDE)).save_pretrained(folder)
    training = spec.training
    size = StepSize(training.micro_batch_size, training.max_sequence_length, training.gradient_checkpointing)
    return measure(folder / "config.json", spec, [size], "")


def test_what_a_llama_consists_of_is_counted(tmp_path: Path) -> None:
    found = measured(tmp_path, job())
    shape = ModelShape.from_config(WIDE | {"model_type": "llama"})
    table = estimate(shape, training_shape(job(), ("all-linear",)))
    memory = measured_estimate(found, training_shape(job(), ()))
    assert (found.blocks, found.quantized_parameters) == (2, shape.linear_parameters)
    norms = 2 * 1024 * 5
    assert found.unquantized_bytes == 2 * shape.embedding_parameters + norms
    assert (memory.adapters, memory.optimizer) == (table.adapters, table.optimizer)
    assert memory.pageable_optimizer == table.pageable_optimizer
    assert memory.expected == pytest.approx(table.expected, rel=0.05)
    answering = replace(training_shape(job(), ("all-linear",)), answer_tokens=(128, 256))
    assert measured_estimate(found, answering).answers == estimate(shape, answering).answers > 0


def test_dropout_keeps_a_masked_input_of_each_layer(tmp_path: Path) -> None:
    without, with_dropout = (measured(tmp_path, job({"dropout": dropout})).steps[0] for dropout in (0.0, 0.1))
    assert with_dropout.work > without.work * 1.2
    assert with_dropout.kept == without.kept


def test_without_checkpointing_more_is_kept(tmp_path: Path) -> None:
    recomputed, kept = (
        measured(tmp_path, job(training={"gradientCheckpointing": way})).steps[0].kept for way in (True, False)
    )
    assert kept > 5 * recomputed


def test_magnitudes_of_dora_are_part_of_the_adapter(tmp_path: Path) -> None:
    plain, dora = (measured(tmp_path, job({"useDora": way})) for way in (False, True))
    outputs = 1024 + 2 * 512 + 1024 + 2 * 4096 + 1024
    assert dora.adapter_parameters - plain.adapter_parameters == 2 * outputs
    assert dora.steps[0].work > plain.steps[0].work


def test_modules_that_are_trained_whole_are_counted_beside_their_frozen_originals(tmp_path: Path) -> None:
    plain, whole = (measured(tmp_path, job({"modulesToSave": modules})) for modules in (None, ["lm_head"]))
    assert (plain.whole_parameters, whole.whole_parameters) == (0, 4096 * 1024)
    assert whole.unquantized_bytes == plain.unquantized_bytes
    assert whole.adapter_parameters == plain.adapter_parameters


def test_only_the_layers_that_are_asked_for_get_an_adapter(tmp_path: Path) -> None:
    both, one = (
        measured(tmp_path, job({"targetModules": ["q_proj"], "layersToTransform": blocks})) for blocks in (None, [1])
    )
    assert both.adapter_parameters == 2 * one.adapter_parameters == 2 * 16 * 2048


def test_a_target_that_the_model_does_not_have_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match=r"spec\.lora\.targetModules names 'c_attn'"):
        measured(tmp_path, job({"targetModules": ["c_attn"]}))


def test_a_model_that_is_not_trained_is_rejected_if_nobody_has_checked_it(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(StepFailure, match="t5"):
        measure(tmp_path / "config.json", job(), [StepSize(1, 1024, True)], "")


def test_heads_that_are_too_large_for_flash_attention_take_memory_in_proportion_to_the_tokens(tmp_path: Path) -> None:
    """With grouped queries: no GPU builds all scores, which would take 2 GiB for so many tokens."""
    config = LlamaConfig(**WIDE | {"head_dim": 512})
    short, long = (
        measured(tmp_path, job(training={"maxSequenceLength": tokens}), config).steps[0].work for tokens in (2048, 8192)
    )
    assert long < 4.5 * short


JOBS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": ({"rank": 8, "targetModules": ["q_proj", "v_proj"]}, {"maxSequenceLength": 512}),
    "large": ({"rank": 64}, {"microBatchSize": 2}),
    "unaccumulated": ({"dtype": "bfloat16"}, {"gradientAccumulationSteps": 1, "optimizer": "adamw"}),
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("large",), marks=pytest.mark.slow),
        pytest.param(("small", "large"), marks=pytest.mark.slow),
        ("large", "small", "unaccumulated"),
    ],
)
def test_the_table_has_a_joint_pass_within_five_percent(names: tuple[str, ...], tmp_path: Path) -> None:
    LlamaConfig(**WIDE).save_pretrained(tmp_path)
    config, specs = tmp_path / "config.json", [job(*JOBS[name]) for name in names]
    trainings = [training_shape(spec, spec.lora.target_modules) for spec in specs]
    shape = ModelShape.from_config(WIDE | {"model_type": "llama"})
    table = memory_together(config, specs, [TableJob(shape, training) for training in trainings])
    measured = memory_together(
        config,
        specs,
        [
            MeasuredJob.of(config, spec, training, measure=measure)
            for spec, training in zip(specs, trainings, strict=True)
        ],
        measure_together,
    )
    assert table.base_weights == measured.base_weights
    assert (table.adapters, table.optimizer) == (measured.adapters, measured.optimizer)
    assert table.expected - table.context == pytest.approx(measured.expected - measured.context, rel=0.05)
