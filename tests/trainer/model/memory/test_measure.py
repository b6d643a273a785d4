"""A job's memory measured on its model's real layers: every share, for every kind of adapter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3NextConfig

from qlora_api.gpus import GPUS
from qlora_api.memory.advice import verdict
from qlora_api.memory.estimate import GIB
from qlora_api.memory.families import FAMILIES
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import Recomputation
from qlora_api.memory.weights import count_weights
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.adapter.attach import adapter_parameters, recompute_activations
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.memory.device import fake_batch, fake_cuda, on_fake_cuda
from qlora_trainer.model.memory.dry_run import StepSize, measure_within_limits
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import MeasuredJob, measured_estimate, memory_together
from qlora_trainer.model.memory.measure import measure, measure_together
from qlora_trainer.model.memory.skeleton import adapted_skeleton
from qlora_trainer.model.memory.step import full_batch, step_bytes
from qlora_trainer.model.source.hub_config import packaged_config
from tests.support.models.model_configs import PUBLISHED_PARAMETERS
from tests.support.resolved import resolved_spec

ROOT = Path(__file__).parents[4]
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


def job(lora: dict[str, Any] | None = None, training: dict[str, Any] | None = None) -> ResolvedSpec:
    sources = {"model": {"source": "hf://acme/model"}, "dataset": {"source": "hf://acme/rows"}}
    changed = {"lora": {"rank": 16} | (lora or {}), "training": {"maxSequenceLength": 1024} | (training or {})}
    return resolved_spec(QLoRAJobSpec.model_validate(sources | changed))


def own_step(folder: Path, spec: ResolvedSpec, **changes: Any) -> MeasuredMemory:
    """A dry run of the job's own micro batch."""
    LlamaConfig(**WIDE | changes).save_pretrained(folder)
    training = spec.training
    size = StepSize(training.micro_batch_size, training.max_sequence_length, training.gradient_checkpointing)
    return measure(folder / "config.json", spec, [size], "")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> MeasuredMemory:
    """The job without changes."""
    return own_step(tmp_path_factory.mktemp("plain"), job())


def test_every_part_of_a_llama_is_counted(plain: MeasuredMemory) -> None:
    shape = ModelShape.from_config(WIDE | {"model_type": "llama"})
    memory = measured_estimate(plain, training_shape(job(), ()))
    assert (plain.blocks, plain.quantized_parameters) == (2, shape.linear_parameters)
    norms = 2 * 1024 * 5
    assert plain.unquantized_bytes == 2 * shape.embedding_parameters + norms
    assert plain.vocabulary_bytes == 2 * shape.embedding_parameters
    adapter = 2 * 16 * (4 * 1024 + 2 * (1024 + 512) + 3 * (1024 + 4096))
    assert (memory.adapters, memory.optimizer) == (4 * adapter, 8 * adapter)
    answering = replace(training_shape(job(), ("all-linear",)), answer_tokens=(128, 256))
    # Keys and values of 512 numbers each in 2 blocks, of 2 bytes; scores of 8 heads, of 8 bytes.
    assert measured_estimate(plain, answering).answers == 256 * 2 * 2 * 512 * 2 + 128**2 * 8 * 8


def wide(model_type: str) -> PretrainedConfig:
    # GPT-NeoX has no groups of queries, Ministral no separate head size.
    left_out = {"num_key_value_heads"} if model_type == "gpt_neox" else set()
    sizes = {name: size for name, size in WIDE.items() if name not in left_out}
    extra: dict[str, Any] = {"head_dim": 128} if model_type == "ministral" else {}
    return AutoConfig.for_model(model_type, pad_token_id=2, **sizes, **extra)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_the_dry_run_of_each_listed_family_counts_the_same_weights(model_type: str, tmp_path: Path) -> None:
    config = wide(model_type)
    config.save_pretrained(tmp_path)
    spec = job(training={"maxSequenceLength": 16})
    found = measure(tmp_path / "config.json", spec, [StepSize(1, 16, True)], "")
    counted = count_weights(ModelShape.from_config(config.to_dict()), training_shape(spec, ("all-linear",)))
    for field in (
        "blocks",
        "quantized_parameters",
        "adapter_parameters",
        "pageable_parameters",
        "whole_parameters",
        "vocabulary_bytes",
    ):
        assert getattr(found, field) == getattr(counted, field), field
    assert found.unquantized_bytes == pytest.approx(counted.unquantized_bytes, rel=0.01)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_each_listed_family_has_the_weights_that_are_counted_from_its_config(model_type: str) -> None:
    config = wide(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = count_weights(ModelShape.from_config(config.to_dict()), training_shape(job(), ("all-linear",)))
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    quantized = sum(layer.weight.numel() for layer in layers)
    assert (counted.blocks, counted.quantized_parameters, counted.whole_parameters) == (2, quantized, 0)
    assert counted.adapter_parameters == 16 * sum(layer.in_features + layer.out_features for layer in layers)
    # Norms and biases are not counted.
    assert 2 * (model.num_parameters() - quantized) == pytest.approx(counted.unquantized_bytes, rel=0.01)


def test_dropout_keeps_a_masked_input_of_each_layer(tmp_path: Path, plain: MeasuredMemory) -> None:
    [without], [with_dropout] = plain.steps, own_step(tmp_path, job({"dropout": 0.1})).steps
    assert with_dropout.work > without.work * 1.2
    assert with_dropout.kept == without.kept


def test_without_checkpointing_more_is_kept(tmp_path: Path, plain: MeasuredMemory) -> None:
    [kept] = own_step(tmp_path, job(training={"gradientCheckpointing": False})).steps
    assert kept.kept > 5 * plain.steps[0].kept


LLAMA_OF_4 = LlamaConfig(**WIDE | {"num_hidden_layers": 4})
# Its blocks of linear attention keep much more than the last one.
HYBRID_OF_4 = Qwen3NextConfig(
    **WIDE | {"num_hidden_layers": 4, "head_dim": 128, "num_experts": 4, "num_experts_per_tok": 2},
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)


@pytest.mark.parametrize("config", [LLAMA_OF_4, HYBRID_OF_4], ids=["llama", "hybrid"])
def test_each_recomputed_block_frees_what_it_keeps_besides_its_input(config: PretrainedConfig, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    spec, tokens = job(training={"gradientCheckpointing": False, "maxSequenceLength": 256}), 256
    family = inspect_family(tmp_path, spec.lora)
    both = [StepSize(1, tokens, way) for way in (False, True)]
    found = measure(tmp_path / "config.json", spec, both, "", family)
    batch = full_batch(1, tokens)
    for blocks in (1, 2, 3, None):
        recomputation = Recomputation(blocks, offloads=blocks is None)
        model = adapted_skeleton(config, family, spec.lora, spec.training, spec.quantization)
        recompute_activations(model, recomputation)
        with fake_cuda():
            on_fake_cuda(model)
            for parameter in adapter_parameters(model).values():
                parameter.grad = torch.empty_like(parameter)
            taken = step_bytes(model, fake_batch(batch))
        memory = measured_estimate(
            found, replace(training_shape(spec, ()), recomputed_blocks=blocks, offloads_inputs=blocks is None)
        )
        assert (memory.checkpoints == 0) is (blocks is not None)
        assert memory.checkpoints + memory.layer_working_set == pytest.approx(taken.kept + taken.work, rel=0.02), blocks


def test_magnitudes_of_dora_are_part_of_the_adapter(tmp_path: Path, plain: MeasuredMemory) -> None:
    dora = own_step(tmp_path, job({"useDora": True}))
    outputs = 1024 + 2 * 512 + 1024 + 2 * 4096 + 1024
    assert dora.adapter_parameters - plain.adapter_parameters == 2 * outputs
    assert dora.steps[0].work > plain.steps[0].work


def test_modules_trained_whole_are_counted_with_their_frozen_originals(tmp_path: Path, plain: MeasuredMemory) -> None:
    whole = own_step(tmp_path, job({"modulesToSave": ["lm_head"]}))
    assert (plain.whole_parameters, whole.whole_parameters) == (0, 4096 * 1024)
    assert whole.unquantized_bytes == plain.unquantized_bytes
    assert (plain.vocabulary_bytes, whole.vocabulary_bytes) == (2 * 2 * 4096 * 1024, 2 * 4096 * 1024)
    assert whole.adapter_parameters == plain.adapter_parameters


def test_only_the_requested_layers_get_an_adapter(tmp_path: Path) -> None:
    one = own_step(tmp_path, job({"targetModules": ["q_proj"], "layersToTransform": [1]}))
    assert one.adapter_parameters == 16 * 2048


def test_a_target_that_the_model_does_not_have_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StepFailure, match=r"spec\.lora\.targetModules names 'c_attn'"):
        own_step(tmp_path, job({"targetModules": ["c_attn"]}))


def test_an_unchecked_model_is_rejected(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(StepFailure, match="t5"):
        measure(tmp_path / "config.json", job(), [StepSize(1, 1024, True)], "")


def test_heads_too_large_for_flash_attention_take_memory_linear_in_tokens(tmp_path: Path) -> None:
    """With grouped queries: no GPU builds all scores, which would take 128 MiB here."""
    short, long = (
        own_step(tmp_path, job(training={"maxSequenceLength": tokens}), head_dim=512, num_hidden_layers=1).steps[0].work
        for tokens in (512, 2048)
    )
    assert long < 4.5 * short


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_the_page_on_choosing_a_model_has_the_memory_of_a_dry_run(name: str) -> None:
    config, lengths = packaged_config(name), (512, 2048, 8192)
    assert config is not None
    found = measure_within_limits(config, job(), [StepSize(1, tokens, True) for tokens in lengths], "")
    cells = []
    for tokens in lengths:
        memory = measured_estimate(found, replace(training_shape(job(), ()), sequence_length=tokens))
        able = (gpu for gpu in GPUS.values() if gpu.has_bfloat16 and verdict(memory, gpu.gib) == "fits")
        cells.append(f"{memory.expected / GIB:.1f}, {next(able).label}")
    base = memory.base_weights + memory.unquantized_weights
    # Published in 16 bit, but for experts in MXFP4: 4 bits each, and a byte for 32.
    download = 2 * PUBLISHED_PARAMETERS[name] - found.mxfp4_parameters * (2 - 17 / 32)
    cells += [f"{size / 1e9:.1f}" for size in (download, base, found.adapter_parameters * (2 * 12 + 2 * 4))]
    assert f"| {' | '.join([f'`{name}`', *cells])} |" in (ROOT / "docs" / "how-to" / "choose-a-model.md").read_text()


LARGE = job({"rank": 64}, {"microBatchSize": 2})
SMALL = job(
    {"rank": 8, "targetModules": ["q_proj", "v_proj"], "dtype": "bfloat16"},
    {"maxSequenceLength": 512, "gradientAccumulationSteps": 1, "optimizer": "adamw"},
)


def test_jobs_that_are_trained_together_share_the_base_and_take_more_for_each(tmp_path: Path) -> None:
    LlamaConfig(**WIDE | {"num_hidden_layers": 1}).save_pretrained(tmp_path)
    config, specs = tmp_path / "config.json", [LARGE, SMALL]
    alone = [
        MeasuredJob.from_config(config, spec, training_shape(spec, spec.lora.target_modules), measure=measure)
        for spec in specs
    ]
    estimates = [one.estimate(one.training) for one in alone]
    together = memory_together(config, specs, alone, measure_together)
    assert {memory.base_weights for memory in (*estimates, together)} == {together.base_weights}
    assert together.adapters == sum(memory.adapters for memory in estimates)
    assert together.optimizer == sum(memory.optimizer for memory in estimates)
    base = together.context + together.base_weights + together.unquantized_weights
    assert max(memory.expected for memory in estimates) < together.expected
    assert together.expected - base < 1.05 * sum(memory.expected - base for memory in estimates)
