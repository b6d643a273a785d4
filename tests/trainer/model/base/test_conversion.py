"""The 4-bit base of prepare: libraries read it, it equals quantization at loading, and it resumes."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.model.base import artifact as base_artifact
from qlora_trainer.model.base import conversion as base_conversion
from qlora_trainer.model.base.artifact import FORMAT, read_manifest, require_sha256
from qlora_trainer.model.base.conversion import BaseConversion, require_tensors
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.base.load import load_base
from qlora_trainer.model.nf4.base_weights import BaseWeights
from qlora_trainer.model.nf4.quantization import quantize
from qlora_trainer.training.distributed.sharding import STORAGE_DTYPE
from tests.support.families import EXPERTS, FAMILIES, tiny_config
from tests.support.models.four_bit import convert, quantized, require_equal, settings
from tests.support.models.tiny import SHAPE, save_model

NF4 = QuantizationSpec()
KINDS = [QuantizationSpec(type=kind, double_quant=double) for kind in ("nf4", "fp4") for double in (True, False)]
# Tied weights and biases; a text part in a multimodal checkpoint, under other names; fused layers; another head's
# name; a linear layer that is the last one unless tied weights count; a weight that is stored in three pieces.
CHECKPOINTS = {name: FAMILIES[name][0] for name in ("llama-biased-tied", "gemma3", "phi3", "gpt_neox")} | {
    name: tiny_config(name) for name in ("gemma3n_text", "olmo_hybrid")
}


ROUTED = {name: EXPERTS[name][0] for name in ("qwen3_moe", "ernie4_5_moe")}


def in_plain_transformers(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not {kind: names for kind, names in report.items() if names}
    return model


@pytest.mark.parametrize("family", CHECKPOINTS)
def test_plain_transformers_loads_the_same_quantized_model(tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", CHECKPOINTS[family])
    convert(model, tmp_path / "base", NF4)
    require_equal(in_plain_transformers(tmp_path / "base"), load_base(model, NF4, "cpu"))
    require_equal(load_base(tmp_path / "base", NF4, "cpu"), load_base(model, NF4, "cpu"))


@pytest.mark.parametrize("storage", [torch.uint8, STORAGE_DTYPE])
@pytest.mark.parametrize("quantization", KINDS, ids=lambda kind: f"{kind.type}-{kind.double_quant}")
def test_every_kind_in_every_storage_is_of_one_sum(
    tmp_path: Path, tiny_llama: Path, quantization: QuantizationSpec, storage: torch.dtype
) -> None:
    sha256 = convert(tiny_llama, tmp_path / "base", quantization)
    found = load_base(tmp_path / "base", quantization, "cpu", storage)
    require_equal(found, load_base(tiny_llama, quantization, "cpu", storage))
    assert {layer.weight.dtype for layer in found.modules() if isinstance(layer, Linear4bit)} == {storage}
    require_sha256(tmp_path / "base", sha256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_original_of_another_type_is_rounded_as_loading_rounds_it(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype
) -> None:
    model = copied(tiny_llama, tmp_path)
    weights = {name: tensor.to(dtype) * 1.0009765625 for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    convert(model, tmp_path / "base", NF4)
    require_equal(load_base(tmp_path / "base", NF4, "cpu"), load_base(model, NF4, "cpu"))


def test_tensors_that_transformers_keeps_in_32_bit_stay_in_32_bit(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", {"norm"})
    convert(tiny_llama, tmp_path / "base", NF4)
    found = load_base(tmp_path / "base", NF4, "cpu")
    assert (found.model.norm.weight.dtype, found.lm_head.weight.dtype) == (torch.float32, torch.bfloat16)
    require_equal(found, load_base(tiny_llama, NF4, "cpu"))


@pytest.mark.parametrize("in_4_bit", [False, True])
def test_every_tensor_begins_where_its_type_can_be_read(tmp_path: Path, in_4_bit: bool) -> None:
    """An odd number of blocks, and norms whose pairs make four bytes."""
    odd = {**SHAPE, "hidden_size": 72, "intermediate_size": 127, "head_dim": 18}
    original = save_model(tmp_path / "original", LlamaConfig(**odd))
    model = quantized(original, tmp_path / "model", settings()) if in_4_bit else original
    convert(model, tmp_path / "base", NF4)
    content = (tmp_path / "base" / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    tensors = {name: entry for name, entry in json.loads(content[8 : 8 + length]).items() if name != "__metadata__"}
    assert tensors
    sizes = {"F32": 4, "BF16": 2, "U8": 1}
    for name, entry in tensors.items():
        begin = 8 + length + entry["data_offsets"][0]
        # Packed weights are read as another type too.
        assert begin % (4 if name.endswith("_proj.weight") else sizes[entry["dtype"]]) == 0, name
    require_equal(in_plain_transformers(tmp_path / "base"), load_base(original, NF4, "cpu"))


WEIGHTS = "model.safetensors"


def copied(model: Path, root: Path) -> Path:
    return Path(shutil.copytree(model, root / "copy"))


def in_files(model: Path, root: Path, count: int) -> Path:
    """A copy of a model with its weights in several files."""
    folder = copied(model, root)
    tensors = sorted(load_file(folder / WEIGHTS).items())
    (folder / WEIGHTS).unlink()
    weight_map: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number}.safetensors"
        save_file(dict(tensors[number::count]), folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys((tensor for tensor, _ in tensors[number::count]), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_each_file_of_the_original_becomes_one(tmp_path: Path, tiny_llama: Path, count: int) -> None:
    convert(in_files(tiny_llama, tmp_path, count), tmp_path / "base", NF4)
    assert len([*(tmp_path / "base").glob("*.safetensors")]) == count
    require_equal(in_plain_transformers(tmp_path / "base"), load_base(tiny_llama, NF4, "cpu"))


class Killed(BaseException):
    """The process has ended without warning."""


def test_it_resumes_with_the_file_that_was_being_converted(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layout = in_files(tiny_llama, tmp_path, 3), BaseLayout.from_folder(tiny_llama, NF4)
    whole = convert(model, tmp_path / "whole", NF4)
    calls = iter(range(10**6))

    def killed(*arguments: Any) -> Any:
        if next(calls) == 7:
            raise Killed
        return quantize(*arguments)

    monkeypatch.setattr(base_conversion, "quantize", killed)
    conversion = BaseConversion(tmp_path / "base", model, "v1", layout)
    conversion.convert(model / "model-0.safetensors", "0" * 64)
    with pytest.raises(Killed):
        conversion.convert(model / "model-1.safetensors", "1" * 64)
    assert not (tmp_path / "base").exists()

    again = BaseConversion(tmp_path / "base", model, "v1", layout)
    assert again.digests == {"model-0.safetensors": "0" * 64}
    for number in (1, 2):
        again.convert(model / f"model-{number}.safetensors", str(number) * 64)
    assert again.complete().sha256 == whole
    # A complete base is used as it is; one made of other weights is not.
    assert BaseConversion(tmp_path / "base", model, "v1", layout).complete().sha256 == whole
    assert not BaseConversion(tmp_path / "base", model, "v2", layout).digests
    assert not (tmp_path / "base").exists()


def test_partial_files_of_a_killed_attempt_are_not_in_the_base(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = BaseLayout.from_folder(tiny_llama, NF4)
    conversion = BaseConversion(tmp_path / "base", tiny_llama, "v1", layout)
    conversion.convert(tiny_llama / WEIGHTS, "0" * 64)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: os._exit(9))
        child = os.fork()
        if not child:
            conversion.complete()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [*(tmp_path / ".base.partial").glob(".base.json.*")]

    again = BaseConversion(tmp_path / "base", tiny_llama, "v1", layout).complete()

    require_sha256(tmp_path / "base", again.sha256)


def test_a_release_that_makes_other_bytes_has_another_format(tmp_path: Path) -> None:
    """Raise FORMAT with the sum, so that releases do not share a cached base."""
    model = save_model(tmp_path / "model", LlamaConfig(**SHAPE))
    weights = {
        name: (torch.arange(tensor.numel()) * 7919 % 1009 - 504).reshape(tensor.shape).to(torch.bfloat16) / 4096
        for name, tensor in load_file(model / WEIGHTS).items()
    }
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    convert(model, tmp_path / "base", NF4)
    assert (FORMAT, file_sha256(tmp_path / "base" / WEIGHTS)) == (
        1,
        "ce7d370ab7b245151040fb5c6e87d41975958462908f275bd0d806787a731296",
    )


@pytest.mark.parametrize("lost", ["config.json", WEIGHTS])
def test_a_base_that_has_lost_a_file_is_completed_again(tmp_path: Path, tiny_llama: Path, lost: str) -> None:
    sha256 = convert(tiny_llama, tmp_path / "base", NF4)
    (tmp_path / "base" / lost).unlink()
    assert convert(tiny_llama, tmp_path / "base", NF4) == sha256
    require_sha256(tmp_path / "base", sha256)


def test_it_has_the_generation_settings_of_the_original(tmp_path: Path, tiny_llama: Path) -> None:
    model = copied(tiny_llama, tmp_path)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    convert(model, tmp_path / "base", NF4)
    assert load_base(tmp_path / "base", NF4, "cpu").generation_config.eos_token_id == [1, 7]


def test_a_file_that_has_lost_bytes_is_made_again(tmp_path: Path, tiny_llama: Path) -> None:
    layout = BaseLayout.from_folder(tiny_llama, NF4)
    BaseConversion(tmp_path / "base", tiny_llama, "v1", layout).convert(tiny_llama / WEIGHTS, "0" * 64)
    (tmp_path / ".base.partial" / WEIGHTS).write_bytes(b"short")
    assert not BaseConversion(tmp_path / "base", tiny_llama, "v1", layout).digests


def without_a_layer(weights: dict[str, Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def of_another_shape(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1].clone()


def already_quantized(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)


def not_a_number(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.self_attn.q_proj.weight"][3, 5] = torch.nan


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (without_a_layer, r"1 tensors are missing, first model\.layers\.1\.mlp\.up_proj\.weight$"),
        (of_another_shape, r"model\.norm\.weight in model\.safetensors has shape \[63\], not \[64\]"),
        (
            already_quantized,
            r"model\.layers\.0\.mlp\.up_proj\.weight .* stored as I8, and must be one of F64, F32",
        ),
        (not_a_number, r"model\.layers\.0\.self_attn\.q_proj\.weight .* has values that are infinite or not a number"),
    ],
)
def test_weights_that_cannot_be_used_are_named(tmp_path: Path, tiny_llama: Path, broken: Any, message: str) -> None:
    model = copied(tiny_llama, tmp_path)
    weights = load_file(model / WEIGHTS)
    broken(weights)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StepFailure, match=message) as caught:
        convert(model, tmp_path / "base", NF4)
    assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE
    assert not (tmp_path / "base").exists()


def test_a_weight_that_is_stored_in_pieces_is_one_and_a_missing_piece_is_named(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", CHECKPOINTS["olmo_hybrid"])
    base = in_plain_transformers(model)
    name = "model.layers.0.linear_attn.conv1d.weight"
    convert(model, tmp_path / "base", NF4)
    stored = load_file(model / WEIGHTS)
    piece = "model.layers.0.linear_attn.k_conv1d.weight"

    assert piece in stored
    assert torch.equal(BaseWeights(tmp_path / "base", base)[name], base.get_parameter(name))

    del stored[piece]
    save_file(stored, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(StepFailure, match=f"1 tensors are missing, first {re.escape(name)}$") as caught:
        convert(model, tmp_path / "incomplete", NF4)
    assert caught.value.exit_code is ExitCode.MODEL_UNAVAILABLE


@pytest.mark.parametrize("family", CHECKPOINTS | ROUTED)
def test_its_tensors_are_those_of_the_layout(tmp_path: Path, family: str) -> None:
    """Of whichever form: in pieces, of experts, under older names."""
    model = save_model(tmp_path / "model", (CHECKPOINTS | ROUTED)[family])
    quantization = QuantizationSpec(type="fp4", double_quant=family == "qwen3_moe")
    convert(model, tmp_path / "base", quantization)
    layout = BaseLayout.from_folder(model, quantization)
    require_tensors(tmp_path / "base", [WEIGHTS], layout)
    weights = load_file(tmp_path / "base" / WEIGHTS)
    cut = max(name for name in weights if name.endswith(".absmax"))
    save_file(weights | {cut: weights[cut][:1].clone()}, tmp_path / "base" / WEIGHTS)
    with pytest.raises(ValueError, match=rf"{re.escape(cut)} is \w+ \[1\], and must be"):
        require_tensors(tmp_path / "base", [WEIGHTS], layout)


def test_its_size_is_computed_before_it_is_made(tmp_path: Path, tiny_llama: Path) -> None:
    convert(tiny_llama, tmp_path / "base", NF4)
    estimate = BaseLayout.from_folder(tiny_llama, NF4).bytes
    with safe_open(tmp_path / "base" / WEIGHTS, framework="pt") as opened:
        found = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    assert estimate == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest"])
def test_a_base_that_has_changed_is_not_used(tmp_path: Path, tiny_llama: Path, damage: str) -> None:
    sha256 = convert(tiny_llama, tmp_path / "base", NF4)
    weights = tmp_path / "base" / WEIGHTS
    if damage == "flipped":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    else:
        (tmp_path / "base" / "base.json").write_text("{")
        assert read_manifest(tmp_path / "base") is None
    with pytest.raises(StepFailure, match="4-bit base") as caught:
        require_sha256(tmp_path / "base", sha256)
    assert caught.value.exit_code is ExitCode.UNSAFE_ARTIFACT


@pytest.mark.parametrize("lost", ["folder", "file", "read"])
def test_an_unreadable_base_is_not_reported_as_changed(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Another job may have set it aside, or the volume failed: the step is retried."""
    sha256 = convert(tiny_llama, tmp_path / "base", NF4)

    def failing(path: Path, _on_bytes: object) -> str:
        number = errno.ENOENT if lost == "file" else errno.EIO
        raise OSError(number, os.strerror(number), str(path))

    if lost == "folder":
        (tmp_path / "base").rename(tmp_path / "aside")
    else:
        monkeypatch.setattr(base_artifact, "file_sha256", failing)
    with pytest.raises(StepFailure, match=r"the 4-bit base .* the step is retried") as caught:
        require_sha256(tmp_path / "base", sha256)
    assert caught.value.exit_code is ExitCode.UNREACHABLE
