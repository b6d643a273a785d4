"""A training step without weights: it confirms the memory estimate for large models, and for each family."""

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PretrainedConfig

from benchmarks.dry_run import DryRun, dry_run
from qlora_api.memory.estimate import estimate
from qlora_api.memory.families import FAMILIES
from qlora_api.memory.model_shape import ModelShape
from qlora_api.training import LoraSpec, QuantizationSpec, TrainingSpec
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.model.decoder import block_linears
from qlora_trainer.model.memory_fit import training_shape
from qlora_trainer.model.support import resolve_targets

LLAMAS = {
    "7B": {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "13B": {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40},
    "33B": {"num_hidden_layers": 60, "hidden_size": 6656, "intermediate_size": 17920, "num_attention_heads": 52},
    "65B": {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64},
}
# As wide as real models, with two blocks: what differs between families is what a block keeps.
BLOCKS = {
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "cohere": hf.CohereConfig,
    "cohere2": hf.Cohere2Config,
    "gemma": hf.GemmaConfig,
    "gemma2": hf.Gemma2Config,
    "gemma3_text": hf.Gemma3TextConfig,
    "glm4": hf.Glm4Config,
    "gpt_neox": hf.GPTNeoXConfig,
    "granite": hf.GraniteConfig,
    "llama": hf.LlamaConfig,
    "ministral": hf.MinistralConfig,
    "mistral": hf.MistralConfig,
    "olmo": hf.OlmoConfig,
    "olmo2": hf.Olmo2Config,
    "olmo3": hf.Olmo3Config,
    "phi": hf.PhiConfig,
    "phi3": hf.Phi3Config,
    "qwen2": hf.Qwen2Config,
    "qwen3": hf.Qwen3Config,
    "seed_oss": hf.SeedOssConfig,
    "smollm3": hf.SmolLM3Config,
}


LLAMA = hf.LlamaConfig(**BLOCKS)


@pytest.fixture(scope="module", autouse=True)
def autograd_without_a_gpu() -> None:
    """Starts autograd before a fake mode does.

    A fake mode pretends that there is a GPU. Autograd, if it starts then, starts a thread for it, and after that no
    fork of this process can train, as other tests need.
    """
    torch.ones(1, requires_grad=True).sum().backward()


def configuration(model_type: str) -> PretrainedConfig:
    # GPT-NeoX has no groups of queries, Ministral no head size of its own.
    left_out = {"num_key_value_heads"} if model_type == "gpt_neox" else set()
    extra = {"head_dim": 128} if model_type == "ministral" else {}
    return CONFIGS[model_type](**{name: value for name, value in BLOCKS.items() if name not in left_out}, **extra)


def run(config: PretrainedConfig, lora: LoraSpec, training: TrainingSpec) -> DryRun:
    return dry_run(config, lora, training, QuantizationSpec())


def job(lora: dict[str, Any], training: dict[str, Any]) -> QLoRAJobSpec:
    sources = {"model": {"source": "hf://acme/model"}, "dataset": {"source": "hf://acme/rows"}}
    return QLoRAJobSpec.model_validate({**sources, "lora": lora, "training": training})


def error(config: PretrainedConfig, spec: QLoRAJobSpec) -> float:
    """Of the estimate that prepare makes for the job, without the CUDA context, relative to the live bytes."""
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    shape = training_shape(spec, resolve_targets(spec.lora.target_modules, block_linears(model)))
    memory = estimate(ModelShape.from_config(config.to_dict()), shape)
    return (memory.expected - memory.context) / run(config, spec.lora, spec.training).peak - 1


def test_every_family_of_the_estimate_has_a_configuration_here() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("size", ["7B", *(pytest.param(size, marks=pytest.mark.slow) for size in list(LLAMAS)[1:])])
def test_the_estimate_of_a_llama_at_rank_64_is_confirmed_within_a_percent(size: str) -> None:
    config = hf.LlamaConfig(vocab_size=32000, **LLAMAS[size])
    assert abs(error(config, job({"rank": 64}, {}))) < 0.01


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_estimate_of_each_family_is_confirmed_within_four_percent(model_type: str) -> None:
    assert abs(error(configuration(model_type), job({"rank": 16}, {"maxSequenceLength": 1024}))) < 0.04


@pytest.mark.parametrize(
    ("lora", "training", "tolerance"),
    [
        ({"dropout": 0.1}, {}, 0.03),
        ({"targetModules": ["q_proj", "v_proj"]}, {}, 0.1),
        ({"dtype": "bfloat16"}, {"optimizer": "adamw"}, 0.03),
        ({}, {"gradientAccumulationSteps": 1}, 0.03),
        ({}, {"gradientCheckpointing": False}, 0.05),
        ({"modulesToSave": ["embed_tokens", "lm_head"]}, {}, 0.05),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_the_estimate_of_each_setting_is_confirmed(
    lora: dict[str, Any], training: dict[str, Any], tolerance: float
) -> None:
    spec = job({"rank": 16, **lora}, {"maxSequenceLength": 2048, **training})
    assert abs(error(LLAMA, spec)) < tolerance


def test_a_step_without_weights_leaves_no_setting_behind() -> None:
    first = run(LLAMA, LoraSpec(rank=16), TrainingSpec())
    assert run(LLAMA, LoraSpec(rank=16), TrainingSpec()) == first
    assert run(LLAMA, LoraSpec(rank=16), TrainingSpec(max_sequence_length=1024)).peak > first.peak > first.resident
