"""Which models can be trained is decided from config.json alone, and the answer names the family."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qlora_api.contract import ExitCode
from qlora_api.training import LoraSpec
from qlora_trainer.failures import StepFailure
from qlora_trainer.family import inspect_family
from tests.trainer.tiny import SHAPE

IDS: dict[str, Any] = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 2}
TRAINABLE = [
    transformers.LlamaConfig(**SHAPE),
    transformers.MistralConfig(**SHAPE, sliding_window=100),
    transformers.Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=1, sliding_window=50),
    transformers.Qwen3Config(**SHAPE, head_dim=32),
    transformers.GraniteConfig(**SHAPE, logits_scaling=8.0, attention_multiplier=0.1, residual_multiplier=0.3),
    transformers.Olmo2Config(**(SHAPE | IDS)),
    transformers.Olmo3Config(**(SHAPE | IDS)),
    transformers.SmolLM3Config(**(SHAPE | IDS)),
    transformers.Phi3Config(**(SHAPE | IDS)),
    transformers.Gemma2Config(**SHAPE, head_dim=16),
]


def written(folder: Path, config: PretrainedConfig, **changes: Any) -> Path:
    """A folder with nothing but config.json in it."""
    config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refusal(folder: Path, lora: LoraSpec | None = None) -> StepFailure:
    with pytest.raises(StepFailure) as caught:
        inspect_family(folder, lora or LoraSpec())
    return caught.value


@pytest.mark.parametrize("config", TRAINABLE, ids=lambda config: config.model_type)
def test_a_dense_decoder_gets_an_adapter_on_every_linear_layer_of_its_blocks(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    family = inspect_family(written(tmp_path, config), LoraSpec())

    per_block = 4 if config.model_type == "phi3" else 7  # Phi-3 has fused projections
    assert len(family.target_modules) == per_block * config.num_hidden_layers
    assert list(family.target_modules) == sorted(family.target_modules)
    assert not [name for name in family.target_modules if "lm_head" in name]
    assert family.model_type == config.model_type
    assert family.quantized_fraction > 0.98
    assert family.packing_isolated


def test_named_targets_are_resolved_to_exact_names(tmp_path: Path) -> None:
    folder = written(tmp_path, transformers.LlamaConfig(**SHAPE))

    family = inspect_family(folder, LoraSpec(target_modules=("v_proj", "model.layers.1.mlp.up_proj")))

    assert family.target_modules == (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    )


@pytest.mark.parametrize("name", ["lm_head", "proj", "embed_tokens", "w1"])
def test_a_target_that_is_no_layer_of_a_block_is_refused_with_those_that_are(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path, transformers.LlamaConfig(**SHAPE))

    failure = refusal(folder, LoraSpec(target_modules=("q_proj", name)))

    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert f"spec.lora.targetModules names {name!r}" in failure.message
    assert "all-linear and down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in failure.message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.MixtralConfig(**SHAPE), "mixture of experts"),
        (transformers.Qwen3MoeConfig(**SHAPE, head_dim=16), "mixture of experts"),
        (transformers.FalconConfig(vocab_size=64, hidden_size=64, num_attention_heads=4), "code of its own"),
        (transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2), "only 0.0% of its parameters"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "",
)
def test_a_family_that_does_not_become_4_bit_or_computes_otherwise_is_refused_by_name(
    config: PretrainedConfig, reason: str, tmp_path: Path
) -> None:
    failure = refusal(written(tmp_path, config))

    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert reason in failure.message
    assert config.model_type in failure.message


@pytest.mark.parametrize(
    ("changes", "code", "found"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, ExitCode.UNSAFE_ARTEFACT, "auto_map"),
        ({"text_config": {"auto_map": {"AutoConfig": "c.C"}}}, ExitCode.UNSAFE_ARTEFACT, "auto_map"),
        ({"_attn_implementation": "somebody/kernel"}, ExitCode.UNSAFE_ARTEFACT, "somebody/kernel"),
        ({"transformers_weights": "other.safetensors"}, ExitCode.UNSAFE_ARTEFACT, "transformers_weights"),
        ({"quantization_config": {"quant_method": "gptq"}}, ExitCode.BAD_CONFIGURATION, "already quantized"),
        ({"model_type": "not-there"}, ExitCode.BAD_CONFIGURATION, "not-there"),
        ({"model_type": None}, ExitCode.BAD_CONFIGURATION, "model_type"),
        ({"hidden_size": "64"}, ExitCode.BAD_CONFIGURATION, "hidden_size"),
        ({"num_attention_heads": 0}, ExitCode.BAD_CONFIGURATION, "config.json"),
    ],
)
def test_a_configuration_that_must_not_or_cannot_be_used_is_refused(
    changes: dict[str, Any], code: ExitCode, found: str, tmp_path: Path
) -> None:
    failure = refusal(written(tmp_path, transformers.LlamaConfig(**SHAPE), **changes))

    assert failure.exit_code is code
    assert found in failure.message


def test_a_folder_without_a_model_and_one_with_a_broken_configuration_are_told_apart(tmp_path: Path) -> None:
    assert refusal(tmp_path).exit_code is ExitCode.MODEL_UNAVAILABLE
    for broken in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        assert refusal(tmp_path).exit_code is ExitCode.BAD_CONFIGURATION


def _leaky(module: Any, query: Any, key: Any, value: Any, _mask: Any, **settings: Any) -> Any:
    settings.pop("rows", None)
    return sdpa_attention_forward(module, query, key, value, None, **settings)


def _not_causal(module: Any, query: Any, key: Any, value: Any, _mask: Any, **settings: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **(settings | {"is_causal": False}))


def test_the_leak_test_sees_a_leak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("leaky", _leaky)
    monkeypatch.setattr("qlora_trainer.probe.ATTENTION", "leaky")

    family = inspect_family(written(tmp_path, transformers.LlamaConfig(**SHAPE)), LoraSpec())

    assert not family.packing_isolated


def test_attention_that_differs_from_the_familys_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AttentionInterface.register("not_causal", _not_causal)
    monkeypatch.setattr("qlora_trainer.probe.ATTENTION", "not_causal")

    failure = refusal(written(tmp_path, transformers.LlamaConfig(**SHAPE)))

    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert "'llama' cannot be trained here: it computes attention or logits in a way" in failure.message
