"""Which models can be trained is decided from config.json alone, and the answer names the family."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.afmoe.modeling_afmoe import AfmoeTokenChoiceRouter

from qlora_api.contract import ExitCode
from qlora_api.spec.output import OutputSpec
from qlora_api.spec.training import LoraSpec, TrainingSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.model.experts import compute as experts
from qlora_trainer.model.families import admission as check
from qlora_trainer.model.families.inspection import inspect_family
from qlora_trainer.model.families.tiny_model import shrink
from qlora_trainer.model.kernels.attention import ATTENTION, RowBoundaries, register_attention, rows_attention
from qlora_trainer.model.losses.loss import LogitTransform
from tests.support.families import CASES
from tests.support.manifests import job_spec
from tests.support.models.tiny import SHAPE

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


def llama(folder: Path) -> Path:
    return written(folder, transformers.LlamaConfig(**SHAPE))


def rejection(folder: Path, lora: LoraSpec | None = None) -> StepFailure:
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
    assert not family.one_row


def test_named_targets_are_resolved_to_exact_names(tmp_path: Path) -> None:
    family = inspect_family(llama(tmp_path), LoraSpec(target_modules=("v_proj", "model.layers.1.mlp.up_proj")))

    assert family.target_modules == (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    )


@pytest.mark.parametrize("name", ["lm_head", "proj", "embed_tokens", "w1"])
def test_a_target_that_is_not_a_layer_of_a_block_is_rejected_with_those_that_are(name: str, tmp_path: Path) -> None:
    failure = rejection(llama(tmp_path), LoraSpec(target_modules=("q_proj", name)))

    assert failure.exit_code is ExitCode.BAD_CONFIGURATION
    assert f"spec.lora.targetModules names {name!r}" in failure.message
    assert "all-linear and down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in failure.message


@pytest.mark.parametrize(
    ("changes", "code", "found"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, ExitCode.UNSAFE_ARTIFACT, "auto_map"),
        ({"text_config": {"auto_map": {"AutoConfig": "c.C"}}}, ExitCode.UNSAFE_ARTIFACT, "auto_map"),
        ({"_attn_implementation": "somebody/kernel"}, ExitCode.UNSAFE_ARTIFACT, "somebody/kernel"),
        ({"transformers_weights": "other.safetensors"}, ExitCode.UNSAFE_ARTIFACT, "transformers_weights"),
        ({"quantization_config": {"quant_method": "gptq"}}, ExitCode.BAD_CONFIGURATION, "already quantized"),
        ({"model_type": "not-there"}, ExitCode.BAD_CONFIGURATION, "not-there"),
        ({"model_type": None}, ExitCode.BAD_CONFIGURATION, "model_type"),
        ({"hidden_size": "64"}, ExitCode.BAD_CONFIGURATION, "hidden_size"),
        ({"num_attention_heads": 0}, ExitCode.BAD_CONFIGURATION, "config.json"),
    ],
)
def test_an_unsafe_or_unusable_configuration_is_rejected(
    changes: dict[str, Any], code: ExitCode, found: str, tmp_path: Path
) -> None:
    failure = rejection(written(tmp_path, transformers.LlamaConfig(**SHAPE), **changes))

    assert failure.exit_code is code
    assert found in failure.message


def test_a_folder_without_a_model_and_a_broken_configuration_have_different_errors(tmp_path: Path) -> None:
    assert rejection(tmp_path).exit_code is ExitCode.MODEL_UNAVAILABLE
    for broken in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        assert rejection(tmp_path).exit_code is ExitCode.BAD_CONFIGURATION


KINDS = ["sliding_attention", "full_attention"]


def test_the_small_model_has_a_block_of_each_kind_and_effective_caps() -> None:
    gemma = transformers.Gemma2Config(num_hidden_layers=26)
    of_smol = shrink(transformers.SmolLM3Config(num_hidden_layers=36))
    of_gemma, of_llama = shrink(gemma), shrink(transformers.LlamaConfig(num_hidden_layers=32))
    small_gemma = of_gemma.config

    assert sorted(of_smol.config.no_rope_layers) == [0, 1]
    assert small_gemma.layer_types == KINDS
    assert small_gemma.sliding_window < 7
    assert small_gemma.attn_logit_softcapping == small_gemma.final_logit_softcapping == 1.0
    assert [small.config.num_hidden_layers for small in (of_smol, of_gemma, of_llama)] == [2, 2, 2]
    assert small_gemma.head_dim == gemma.head_dim
    assert of_gemma.stands_for == (0, 1) * 13
    assert of_llama.stands_for == (0,) * 32


def test_the_small_model_keeps_exceptions_of_single_blocks() -> None:
    config = transformers.Gemma4TextConfig(num_hidden_layers=12, num_kv_shared_layers=6)

    small = shrink(config)

    assert small.config.layer_types == KINDS * 2
    assert small.config.num_kv_shared_layers == 2
    assert [block.head_dim for block in small.config.per_layer_config] == [256, 512, 256, 512]
    assert small.stands_for == (0, 0, 0, 0, 0, 1, 2, 2, 2, 2, 2, 3)
    assert config.num_hidden_layers == 12


def test_the_small_model_repeats_the_models_repeated_blocks() -> None:
    small = shrink(transformers.DoryConfig(num_hidden_layers=16, n_input_layers=4, n_output_layers=4)).config

    segments = [small.n_input_layers, small.n_recurrent_layers, small.n_output_layers]
    assert segments == [2, 2, 2]
    assert small.num_hidden_layers == sum(segments)


def test_the_small_model_has_the_kinds_of_blocks_listed_by_number() -> None:
    config = transformers.BambaConfig(attn_layer_indices=[9, 18, 27])

    small = shrink(config)

    assert small.config.layers_block_type == ["linear_attention", "full_attention", "linear_attention"]
    assert small.stands_for == tuple(int(block in (9, 18, 27)) for block in range(config.num_hidden_layers))


def test_a_model_with_blocks_that_the_small_one_lacks_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_trainer.model.families.tiny_model._NUMBERS_OF_BLOCKS", ())
    config = CASES["bamba"].config()
    config.num_hidden_layers, config.attn_layer_indices = 3, [2]

    message = rejection(written(tmp_path, config)).message

    assert "the small test model of the family has other blocks than the whole one (mamba" in message


def test_routers_that_begin_at_zero_and_draw_at_random_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = AfmoeTokenChoiceRouter.forward

    def noisy(router: Any, states: Any, bias: Any) -> Any:
        return forward(router, states + 10 * torch.randn_like(states) if router.training else states, bias)

    monkeypatch.setattr(AfmoeTokenChoiceRouter, "forward", noisy)

    failure = rejection(written(tmp_path, CASES["afmoe"].config()))
    assert "in training it computes something else than in use" in failure.message


def test_missing_biases_of_experts_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projected = experts._project

    def without_bias(module: Any, *tensors: Any) -> Any:
        module.has_bias = False
        return projected(module, *tensors)

    monkeypatch.setattr(experts, "_project", without_bias)

    assert "it computes attention or logits in a way" in rejection(written(tmp_path, CASES["gpt_oss"].config())).message


Attention = Callable[..., Any]


def with_setting(name: str, change: Callable[[Any], Any]) -> Attention:
    """Our attention with another value of a setting."""
    return lambda *tensors, **settings: rows_attention(*tensors, **(settings | {name: change(settings.get(name))}))


def _leaky(module: Any, query: Any, key: Any, value: Any, _mask: Any, **settings: Any) -> Any:
    settings.pop("rows", None)
    return sdpa_attention_forward(module, query, key, value, None, **settings)


def _not_causal(module: Any, query: Any, key: Any, value: Any, _mask: Any, **settings: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value, None, **(settings | {"is_causal": False}))


@pytest.fixture
def use_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Attention], None]:
    """Has the probe use another attention as ours."""

    def use(attention: Attention) -> None:
        AttentionInterface.register("changed", attention)
        monkeypatch.setattr("qlora_trainer.model.families.probe.ATTENTION", "changed")

    return use


UseAttention = Callable[[Attention], None]


def test_the_leak_test_detects_a_leak(tmp_path: Path, use_attention: UseAttention) -> None:
    use_attention(_leaky)

    assert inspect_family(llama(tmp_path), LoraSpec()).one_row


def _without_gradient_of_queries(module: Any, query: Any, *tensors: Any, **settings: Any) -> Any:
    return rows_attention(module, query.detach(), *tensors, **settings)


def test_a_layer_that_no_gradient_reaches_gets_no_adapter(tmp_path: Path, use_attention: UseAttention) -> None:
    use_attention(_without_gradient_of_queries)
    folder = llama(tmp_path)

    family = inspect_family(folder, LoraSpec())

    assert family.without_adapter == tuple(f"model.layers.{block}.self_attn.q_proj" for block in (0, 1))
    assert len(family.target_modules) == 2 * 6
    assert not set(family.target_modules) & set(family.without_adapter)
    message = rejection(folder, LoraSpec(target_modules=("q_proj",))).message
    assert (
        "names 'q_proj', which can have no adapter in this family; allowed are all-linear and down_proj, gate"
        in message
    )


def test_a_family_that_remembers_the_sequence_before_is_rejected(tmp_path: Path, use_attention: UseAttention) -> None:
    seen: list[torch.Tensor] = []

    def remembering(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        output, _ = rows_attention(module, query, key, value, mask, **settings)
        if module.layer_idx == 0:
            seen.append(output.mean())
        return output + (1e-6 * seen[-2] if len(seen) > 1 else 0.0), None

    use_attention(remembering)

    assert "a sequence has an effect on the next one" in rejection(llama(tmp_path)).message


UNCAPPED = with_setting("softcap", lambda _: None)
WITHOUT_WINDOW = with_setting("sliding_window", lambda _: None)
WINDOW_OFF_BY_ONE = with_setting("sliding_window", lambda window: window and window + 1)
SCALED_BY_HEAD_SIZE = with_setting("scaling", lambda _: None)


@pytest.mark.parametrize(
    ("config", "broken"),
    [
        (transformers.LlamaConfig(**SHAPE), _not_causal),
        (transformers.Gemma2Config(**SHAPE, head_dim=32), UNCAPPED),
        (transformers.Gemma2Config(**SHAPE, head_dim=32, query_pre_attn_scalar=100), SCALED_BY_HEAD_SIZE),
        (transformers.GraniteConfig(**SHAPE, attention_multiplier=0.1), SCALED_BY_HEAD_SIZE),
        (transformers.MistralConfig(**SHAPE, sliding_window=100), WITHOUT_WINDOW),
        (transformers.Olmo3Config(**(SHAPE | IDS), sliding_window=100), WINDOW_OFF_BY_ONE),
    ],
)
def test_attention_that_differs_from_the_familys_own_is_not_used(
    config: PretrainedConfig, broken: Attention, tmp_path: Path, use_attention: UseAttention
) -> None:
    use_attention(broken)

    family = inspect_family(written(tmp_path, config), LoraSpec())
    assert family.attention in ("sdpa", "eager")
    assert family.one_row


@pytest.mark.parametrize(
    "config",
    [
        transformers.CohereConfig(**SHAPE, logit_scale=0.25),
        transformers.GraniteConfig(**SHAPE, logits_scaling=8.0),
        transformers.Gemma2Config(**SHAPE, head_dim=32),
    ],
    ids=["scale", "divisor", "cap"],
)
def test_logits_with_another_scale_or_cap_are_rejected(
    config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not inspect_family(written(tmp_path, config), LoraSpec()).one_row
    monkeypatch.setattr(LogitTransform, "__call__", lambda _transform, logits: logits)
    assert "it computes attention or logits in a way" in rejection(tmp_path).message


@pytest.mark.parametrize(
    ("rotation", "longest"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 512),
    ],
)
def test_rows_longer_than_the_models_positions_are_rejected(
    rotation: dict[str, Any], longest: int, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 1e4} | rotation)
    family = inspect_family(written(tmp_path, config), LoraSpec())

    family.require(TrainingSpec(max_sequence_length=longest), OutputSpec())
    with pytest.raises(StepFailure, match=f"positions for {longest} tokens") as caught:
        family.require(TrainingSpec(max_sequence_length=longest + 1), OutputSpec())

    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert family.keeps_rows_apart(longest)
    assert family.fixed_positions is None, "an answer may be longer"


@pytest.mark.parametrize(
    "config",
    [
        transformers.OPTConfig(**SHAPE | {"max_position_embeddings": 72}, ffn_dim=512, word_embed_proj_dim=64),
        transformers.GPTJConfig(vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=72, rotary_dim=16),
    ],
    ids=["learned", "table"],
)
def test_a_model_without_positions_beyond_its_last_one_is_recognized(config: Any, tmp_path: Path) -> None:
    """A row of other families may be longer: XGLM makes more of its vectors."""
    assert inspect_family(written(tmp_path, config), LoraSpec()).fixed_positions == 72
    more = transformers.XGLMConfig(
        vocab_size=512, d_model=64, ffn_dim=512, num_layers=2, attention_heads=4, max_position_embeddings=300
    )
    family = inspect_family(written(tmp_path, more), LoraSpec())
    assert (family.longest_row, family.fixed_positions) == (300, None)


def test_rows_beyond_the_change_of_longrope_do_not_share_a_sequence(tmp_path: Path) -> None:
    rotation = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
    config = transformers.Phi3Config(
        **(SHAPE | IDS), original_max_position_embeddings=64, rope_parameters=rotation, initializer_range=0.2
    )
    family = inspect_family(written(tmp_path, config), LoraSpec())
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    row = torch.arange(20)

    def behind(tokens: int) -> torch.Tensor:
        rows = RowBoundaries.from_lengths((tokens, len(row)), row.device)
        input_ids = torch.cat([torch.full((tokens,), 7), row])[None]
        with torch.no_grad():
            return model(input_ids=input_ids, position_ids=rows.position_ids(), rows=rows).logits[0, tokens:]

    assert not family.one_row
    assert [family.keeps_rows_apart(tokens) for tokens in (64, 65)] == [True, False]
    torch.testing.assert_close(behind(30), behind(64))
    with pytest.raises(AssertionError, match="not close"):  # the avoided memory
        torch.testing.assert_close(behind(30), behind(65))


class Unreadable:
    """An answer of the inspecting process."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


def test_an_inspection_whose_answer_cannot_be_read_names_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TRAINABLE[0].save_pretrained(tmp_path)
    monkeypatch.setattr(check, "_inspect", lambda *_: Unreadable())
    with pytest.raises(StepFailure, match="the inspection of the model cannot be read: ValueError: invalid literal"):
        check.check_model(tmp_path, job_spec())


def test_an_inspection_that_is_killed_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAINABLE[0].save_pretrained(tmp_path)
    monkeypatch.setattr(check, "_inspect", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(StepFailure, match="the inspection of the model was ended by signal or exit code -9") as failure:
        check.check_model(tmp_path, job_spec())
    assert failure.value.exit_code is ExitCode.INTERNAL_ERROR
