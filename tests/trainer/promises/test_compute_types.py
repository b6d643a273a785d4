"""A run computes in float32 where the processor has no bfloat16, and keeps its type on any other processor."""

import math
import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_trainer.core.context import StepContext
from qlora_trainer.core.cpu import BFLOAT16_UNITS, ENV_COMPUTE_TYPE, ComputeType, compute_type
from qlora_trainer.core.file_names import SAMPLES_FILE
from qlora_trainer.history.samples import read_samples
from qlora_trainer.steps.publish import publish
from tests.support.families import tiny_config
from tests.support.models.mxfp4 import save_gpt_oss
from tests.support.models.tiny import Recorded, save_model
from tests.support.training import adapter_bytes, history, interrupted_at, prepared, run


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are x86's")
def test_pytorch_names_the_instructions_so() -> None:
    assert torch.cpu.get_capabilities().keys() >= set(BFLOAT16_UNITS)


UNITS = {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("architecture", "units", "asked", "chosen"),
    [
        ("x86_64", UNITS, None, "float32"),
        ("x86_64", UNITS | {"avx512_bf16": True}, None, "bfloat16"),
        ("x86_64", UNITS | {"amx_bf16": True}, None, "bfloat16"),
        ("aarch64", {}, None, "bfloat16"),
        ("x86_64", UNITS, "bfloat16", "bfloat16"),
        ("x86_64", UNITS | {"amx_bf16": True}, "float32", "float32"),
    ],
    ids=["AVX2", "AVX512-BF16", "AMX", "ARM", "bfloat16 asked for", "float32 asked for"],
)
def test_the_processor_chooses_the_type_unless_the_environment_does(
    architecture: str, units: dict[str, bool], asked: str | None, chosen: ComputeType
) -> None:
    environ = {} if asked is None else {ENV_COMPUTE_TYPE: asked}
    assert compute_type(architecture, units, environ) == chosen


def test_another_type_in_the_environment_is_rejected() -> None:
    with pytest.raises(ValueError, match="QLORA_CPU_COMPUTE is 'fp16': must be bfloat16 or float32, or not set"):
        compute_type("x86_64", UNITS, {ENV_COMPUTE_TYPE: "fp16"})


Asking = Callable[[ComputeType], None]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Asking:
    """Set the type that the next new run computes in."""
    return lambda kind: monkeypatch.setenv(ENV_COMPUTE_TYPE, kind)


@pytest.mark.parametrize(
    ("spec", "begun", "other"),
    [
        ({}, "bfloat16", "float32"),
        ({}, "float32", "bfloat16"),
        ({"lora": {"dropout": 0.0, "modulesToSave": ["embed_tokens", "lm_head"]}}, "float32", "bfloat16"),
        ({"training": {"objective": "dpo"}, "lora": {"dropout": 0.0}}, "float32", "bfloat16"),
    ],
    ids=["begun in bfloat16", "with dropout", "whole modules", "pairs"],
)
def test_a_resumed_run_ends_in_the_bytes_of_one_that_was_never_interrupted(
    spec: dict[str, Any], begun: ComputeType, other: ComputeType, ask: Asking, tiny_llama: Path, tmp_path: Path
) -> None:
    pairs = "objective" in spec.get("training", {})
    whole, parts = (prepared(tmp_path / name, tiny_llama, spec, pairs=pairs) for name in ("whole", "parts"))
    ask(begun)
    record = run(whole)
    interrupted_at(parts, 2)
    ask(other)

    resumed = run(parts)

    assert resumed.compute_type == record.compute_type == begun
    assert adapter_bytes(parts) == adapter_bytes(whole)
    assert history(parts) == history(whole)


def test_pairs_begin_without_a_margin_in_float32(ask: Asking, tiny_llama: Path, tmp_path: Path) -> None:
    """The reference and the policy, which has the same weights at first, compute the same."""
    ask("float32")
    context = prepared(tmp_path, tiny_llama, {"training": {"objective": "dpo"}, "lora": {"dropout": 0.0}}, pairs=True)
    run(context)
    first = next(line for line in history(context) if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewardMargin"] == pytest.approx(0, abs=1e-6)


def both(root: Path, ask: Asking, make: Callable[[Path], StepContext]) -> list[dict[str, float]]:
    """The first step of the same run in each type."""
    steps = []
    for kind in ("bfloat16", "float32"):
        ask(kind)
        context = make(root / kind)
        assert run(context).compute_type == kind
        steps.append(next(line for line in history(context) if "loss" in line))
    return steps


@pytest.mark.parametrize(
    "spec",
    [
        {"lora": {"useDora": True, "dropout": 0.0}},
        {"lora": {"dtype": "bfloat16", "dropout": 0.0}},
        {"training": {"objective": "orpo"}},
        {"training": {"optimizer": "paged_adamw_8bit", "gradientCheckpointing": False}},
        {"quantization": {"type": "fp4", "doubleQuant": False}},
    ],
    ids=["DoRA", "adapter in 16 bit", "ORPO", "8-bit optimizer", "fp4"],
)
def test_settings_are_trained_alike_in_both_types(
    spec: dict[str, Any], ask: Asking, tiny_llama: Path, tmp_path: Path
) -> None:
    pairs = "objective" in spec.get("training", {})
    _require_alike(*both(tmp_path, ask, lambda root: prepared(root, tiny_llama, spec, pairs=pairs)))


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3_text", "gemma4_text", "bloom", "bamba", "mixtral", "gpt_oss in MXFP4"]
)
def test_families_are_trained_alike_in_both_types(family: str, ask: Asking, tmp_path: Path) -> None:
    model = (
        save_gpt_oss(tmp_path / "model") if "MXFP4" in family else save_model(tmp_path / "model", tiny_config(family))
    )
    spec = {"lora": {"dropout": 0.0}, "training": {"maxSteps": 2}}
    one_row = family == "bamba"
    _require_alike(*both(tmp_path, ask, lambda root: prepared(root, model, spec, packed=not one_row)))


class MatmulTypes(TorchDispatchMode):
    """Collects the types of the tensors in every matmul, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if re.search(r"(mm|mv|dot|linear|convolution|attention\w*)$", func._schema.name):
            tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.found |= {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "lora",
    [
        {"useDora": True, "dtype": "bfloat16"},
        {"dtype": "bfloat16", "dropout": 0.1},
        {"dtype": "bfloat16", "dropout": 0.0, "modulesToSave": ["embed_tokens", "lm_head"]},
    ],
    ids=["DoRA", "dropout", "fused, with whole modules"],
)
def test_every_matmul_of_a_run_in_float32_is_in_float32(
    lora: dict[str, Any], ask: Asking, tiny_llama: Path, tmp_path: Path
) -> None:
    """Evaluations and answers included, of an adapter that is stored in 16 bit."""
    ask("float32")
    context = prepared(tmp_path, tiny_llama, {"lora": lora, "training": {"samples": 1}})
    with MatmulTypes() as matmuls:
        run(context)

    assert matmuls.found == {torch.float32}
    tensors = load_file(context.workspace.trained / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def _require_alike(in_bfloat16: dict[str, float], in_float32: dict[str, float]) -> None:
    assert in_float32 != in_bfloat16
    assert in_float32["loss"] == pytest.approx(in_bfloat16["loss"], rel=0.01)
    assert in_float32["gradNorm"] == pytest.approx(in_bfloat16["gradNorm"], rel=0.05)


def test_a_run_in_float32_answers_and_writes_whole_modules_in_16_bit(
    ask: Asking, tiny_llama: Path, tmp_path: Path
) -> None:
    spec = {"lora": {"dropout": 0.0, "modulesToSave": ["lm_head"]}, "training": {"samples": 1}}
    ask("float32")
    context = prepared(tmp_path, tiny_llama, spec)
    run(context)
    tensors = load_file(context.workspace.trained / "adapter_model.safetensors")
    assert {name: tensor.dtype for name, tensor in tensors.items() if "lm_head" in name} == {
        "base_model.model.lm_head.weight": torch.bfloat16
    }
    samples = read_samples(context.workspace.report / SAMPLES_FILE)
    assert samples is not None
    assert len(samples.samples) == 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bamba", "bloom"])
def test_the_merged_model_is_evaluated_in_the_type_of_the_run(family: str, ask: Asking, tmp_path: Path) -> None:
    """Not in that of the processor: publish may run on another node."""
    spec = {"output": {"merged": {}}, "training": {"maxSteps": 2}}
    model = save_model(tmp_path / "model", tiny_config(family))
    ask("float32")
    context = prepared(tmp_path / "job", model, spec, packed=family != "bamba")
    run(context)
    ask("bfloat16")
    with MatmulTypes() as matmuls:
        merged = publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC)).merged

    assert matmuls.found == {torch.float32}
    assert merged is not None
    # The merged weights are rounded to 16 bit.
    assert merged.eval_loss == pytest.approx(merged.adapter_eval_loss, rel=2e-3)
