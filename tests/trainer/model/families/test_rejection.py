"""prepare rejects unsupported models by config.json, with their name and the reason."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.models.tiny import SHAPE, Recorded
from tests.trainer.conftest import MakeContext

NO_MODEL = "describes no model that can be trained here"
NO_SMALL_RUN = "transformers cannot run on text alone the small test model of this type"
QUANTIZED = "already quantized"
ALTERNATIVE = "choose a model of a family that is trained, such as Llama"
ORIGINAL = "name the original 16-bit model"

# config.json, the reason of the rejection, and the remedy.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "jetmoe": ({"model_type": "jetmoe"}, "mixture of experts (num_local_experts 8) that does not use", ALTERNATIVE),
    "phimoe": ({"model_type": "phimoe"}, "in training it computes something else than in use", ALTERNATIVE),
    "deepseek_v2": ({"model_type": "deepseek_v2"}, f"{NO_MODEL}: {NO_SMALL_RUN}: ", ALTERNATIVE),
    "deepseek_v4": ({"model_type": "deepseek_v4"}, "no small model of this type could be trained", ALTERNATIVE),
    "llama4": ({"model_type": "llama4"}, "(num_local_experts 16) that does not use", ALTERNATIVE),
    "llama4_text": (
        {"model_type": "llama4_text"},
        "(num_local_experts 16) that does not use",
        ALTERNATIVE,
    ),
    "dbrx": (
        {"model_type": "dbrx"},
        f"{NO_MODEL}: transformers cannot build a model from this config.json: AttributeError: ",
        ALTERNATIVE,
    ),
    "blt": (
        {"model_type": "blt"},
        f"{NO_MODEL}: this trainer cannot make the small test model of this type: AttributeError: ",
        ALTERNATIVE,
    ),
    "git": ({"model_type": "git"}, f"{NO_MODEL}: this trainer does not find its decoder blocks", ALTERNATIVE),
    "modernbert-decoder": (
        {"model_type": "modernbert-decoder"},
        f"{NO_MODEL}: the small test model of this type cannot be run as in training: TypeError: ",
        ALTERNATIVE,
    ),
    "shieldgemma2": ({"model_type": "shieldgemma2"}, "no layer of its blocks can have an adapter", ALTERNATIVE),
    "kyutai_speech_to_text": (
        {"model_type": "kyutai_speech_to_text"},
        f"{NO_MODEL}: transformers cannot build the small test model of this type: AssertionError: ",
        ALTERNATIVE,
    ),
    "experts-of-odd-size": (
        {"model_type": "qwen3_moe", **SHAPE, "hidden_size": 60, "moe_intermediate_size": 40},
        "experts of 2400 weights (model.layers.0.mlp.experts.gate_up_proj), which must be a multiple of 64",
        ALTERNATIVE,
    ),
    **{
        name: ({"model_type": name}, "computes with the weights of mixer.dt_proj", ALTERNATIVE)
        for name in ("mamba", "falcon_mamba")
    },
    "trocr": ({"model_type": "trocr"}, "is the decoder of an encoder-decoder", ALTERNATIVE),
    "sarvam_moe": ({"model_type": "sarvam_moe"}, "self_attn.q_proj.weight together with others", ALTERNATIVE),
    "lara_mini": ({"model_type": "lara_mini"}, "linear_attn.in_proj_qkv.weight together with others", ALTERNATIVE),
    "ctrl": ({"model_type": "ctrl"}, "cannot recompute its blocks", ALTERNATIVE),
    "rwkv": ({"model_type": "rwkv"}, "changes its weights", ALTERNATIVE),
    "recurrent_gemma": ({"model_type": "recurrent_gemma"}, "computes attention or logits in a way", ALTERNATIVE),
    **{name: ({"model_type": name}, NO_MODEL, ALTERNATIVE) for name in ("zamba", "reformer")},
    **{
        name: ({"model_type": name}, f"{NO_MODEL}: {NO_SMALL_RUN}: RuntimeError: ", ALTERNATIVE)
        for name in ("zamba2", "xlstm")
    },
    **{
        name: ({"model_type": name}, "its tokens attend to later ones", ALTERNATIVE)
        for name in ("bert", "roberta", "electra", "xlm-roberta")
    },
    **{
        name: ({"model_type": name}, "is an encoder-decoder", ALTERNATIVE)
        for name in ("t5", "bart", "mbart", "whisper")
    },
    "ernie4_5_vl_moe": (
        {"model_type": "ernie4_5_vl_moe"},
        "files have text_moe.experts.gate_up_proj and vision_moe.experts.gate_up_proj in one list",
        ALTERNATIVE,
    ),
    "qianfan_ocr": (
        {"model_type": "qianfan_ocr"},
        "store model.vision_tower.layers.0.attention.q_proj.weight in another form than the model computes with",
        ALTERNATIVE,
    ),
    "cohere2_vision": ({"model_type": "cohere2_vision"}, "computes attention or logits in a way", ALTERNATIVE),
    "voxtral_realtime": ({"model_type": "voxtral_realtime"}, "must specify exactly one of input_features", ALTERNATIVE),
    **{name: ({"model_type": name}, "no causal language model", ALTERNATIVE) for name in ("vit", "wav2vec2")},
    "falcon": ({"model_type": "falcon"}, "only 0.0% of its parameters", ALTERNATIVE),
    "gpt2": ({"model_type": "gpt2"}, "only 0.0% of its parameters", ALTERNATIVE),
    "bidirectional": (
        {"model_type": "gemma3_text", **SHAPE, "use_bidirectional_attention": True},
        "its tokens attend to later ones",
        ALTERNATIVE,
    ),
    **{
        method: ({"model_type": "llama", **SHAPE, "quantization_config": {"quant_method": method}}, method, ORIGINAL)
        for method in ("gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "compressed-tensors", "aqlm")
    },
    "inner-quantized": (
        {"model_type": "gemma3", "text_config": {"quantization_config": {"quant_method": "awq"}}},
        QUANTIZED,
        ORIGINAL,
    ),
    "too-short": (
        {"model_type": "llama", **SHAPE, "max_position_embeddings": 32},
        "spec.training.maxSequenceLength is 64, but the model (model_type 'llama') has positions for 32 tokens",
        "set it to 32 or less",
    ),
}


def described(folder: Path, config: dict[str, Any]) -> Path:
    """A model with a config.json only."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for never_read in ("model.safetensors", "tokenizer.json"):
        (folder / never_read).touch()
    return folder


def test_a_configuration_of_a_model_too_large_to_inspect_is_rejected(make_context: MakeContext, tmp_path: Path) -> None:
    config = {"model_type": "qwen2_moe", "num_hidden_layers": 2, "shared_expert_intermediate_size": 5_000_000}
    folder = described(tmp_path / "model", config)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss

    with pytest.raises(
        StepFailure, match=r"the inspection of the model took more than 2\.0 GiB of host memory"
    ) as caught:
        prepare(make_context(model=folder), Recorded())

    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert str(folder / "config.json") in caught.value.message
    assert ALTERNATIVE in caught.value.message
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < max(before, 4 * 2**20)


@pytest.mark.parametrize("name", REFUSED)
def test_prepare_rejects_the_family_by_name_with_reason_and_remedy(
    name: str, make_context: MakeContext, tmp_path: Path
) -> None:
    config, reason, way_out = REFUSED[name]
    folder = described(tmp_path / "model", config)

    with pytest.raises(StepFailure) as caught:
        prepare(make_context(model=folder), Recorded())

    assert caught.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert f"model_type {config['model_type']!r}" in caught.value.message
    assert reason in caught.value.message
    assert way_out in caught.value.message
    assert not (tmp_path / "workspace" / "models").exists()
