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

# Types in transformers' default configuration, with the reason of the rejection.
OF_TYPE = {
    "jetmoe": "mixture of experts (num_local_experts 8) that does not use",
    "phimoe": "in training it computes something else than in use",
    "deepseek_v2": f"{NO_MODEL}: {NO_SMALL_RUN}: ",
    "deepseek_v4": "no small model of this type could be trained",
    "llama4": "(num_local_experts 16) that does not use",
    "llama4_text": "(num_local_experts 16) that does not use",
    "dbrx": f"{NO_MODEL}: transformers cannot build a model from this config.json: AttributeError: ",
    "blt": f"{NO_MODEL}: this trainer cannot make the small test model of this type: AttributeError: ",
    "git": f"{NO_MODEL}: this trainer does not find its decoder blocks",
    "modernbert-decoder": f"{NO_MODEL}: the small test model of this type cannot be run as in training: TypeError: ",
    "shieldgemma2": "no layer of its blocks can have an adapter",
    "kyutai_speech_to_text": (
        f"{NO_MODEL}: transformers cannot build the small test model of this type: AssertionError: "
    ),
    **dict.fromkeys(("mamba", "falcon_mamba"), "computes with the weights of mixer.dt_proj"),
    "trocr": "is the decoder of an encoder-decoder",
    "sarvam_moe": "self_attn.q_proj.weight together with others",
    "lara_mini": "linear_attn.in_proj_qkv.weight together with others",
    "ctrl": "cannot recompute its blocks",
    "rwkv": "changes its weights",
    **dict.fromkeys(("zamba", "reformer"), NO_MODEL),
    **dict.fromkeys(("zamba2", "xlstm"), f"{NO_MODEL}: {NO_SMALL_RUN}: RuntimeError: "),
    **dict.fromkeys(("bert", "roberta", "electra", "xlm-roberta", "paligemma"), "its tokens attend to later ones"),
    **dict.fromkeys(("t5", "bart", "mbart", "whisper"), "is an encoder-decoder"),
    "ernie4_5_vl_moe": "files have text_moe.experts.gate_up_proj and vision_moe.experts.gate_up_proj in one list",
    "qianfan_ocr": (
        "store model.vision_tower.layers.0.attention.q_proj.weight in another form than the model computes with"
    ),
    **dict.fromkeys(("recurrent_gemma", "cohere2_vision"), "computes attention or logits in a way"),
    "voxtral_realtime": "must specify exactly one of input_features",
    **dict.fromkeys(("vit", "wav2vec2"), "no causal language model"),
    **dict.fromkeys(("falcon", "gpt2"), "only 0.0% of its parameters"),
}
# config.json, the reason of the rejection, and the remedy.
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    **{name: ({"model_type": name}, reason, ALTERNATIVE) for name, reason in OF_TYPE.items()},
    "experts-of-odd-size": (
        {"model_type": "qwen3_moe", **SHAPE, "hidden_size": 60, "moe_intermediate_size": 40},
        "experts of 2400 weights (model.layers.0.mlp.experts.gate_up_proj), which must be a multiple of 64",
        ALTERNATIVE,
    ),
    "bidirectional": (
        {"model_type": "gemma3_text", **SHAPE, "use_bidirectional_attention": True},
        "its tokens attend to later ones",
        ALTERNATIVE,
    ),
    "bidirectional by name": (
        {"model_type": "gemma4_text", **SHAPE, "use_bidirectional_attention": "all"},
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
    "of-a-later-release": (
        {"model_type": "gemma5"},
        "of this trainer does not have: choose a model",
        "or use a release of the trainer that has it",
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
