"""Checks a trained adapter before anybody may use it: the right file, every tensor, every number."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.contract import ExitCode
from qlora_api.training import LoraSpec
from qlora_trainer.disk import file_sha256
from qlora_trainer.failures import StepFailure, bad_configuration, unsafe_artefact

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_B_SUFFIX = ".lora_B.weight"

Shapes = Mapping[str, tuple[int, int]]


def expected_shapes(model_folder: Path, target_modules: tuple[str, ...], rank: int) -> Shapes:
    """Name and shape of each tensor that a complete adapter holds, by a model that has sizes but no weights.

    A of a layer is [rank, inputs] and B is [outputs, rank]; the names are those of PEFT's adapter files.
    """
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes: dict[str, tuple[int, int]] = {}
    for target in target_modules:
        layer = skeleton.get_submodule(target)
        shapes[f"base_model.model.{target}.lora_A.weight"] = (rank, layer.in_features)
        shapes[f"base_model.model.{target}{_B_SUFFIX}"] = (layer.out_features, rank)
    return shapes


def verify_tensors(path: Path, sha256: str, shapes: Shapes, lora: LoraSpec) -> None:
    """Check the adapter's file against its recorded SHA-256, its tensors' names, shapes and type, and every number.

    Raises StepFailure: UNSAFE_ARTEFACT if it is not the file that training wrote, DIVERGED if a number is not finite,
    BAD_CONFIGURATION if nothing was learned, INTERNAL_ERROR if it is not the adapter that was asked for.
    """
    if not path.is_file():
        raise unsafe_artefact(f"{path} is missing although training recorded it: create the job again")
    found = file_sha256(path)
    if found != sha256:
        raise unsafe_artefact(
            f"{path} has sha256 {found}, but training wrote {sha256}: it was changed or damaged afterwards and is not "
            "published; create the job again"
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            _require_same_names(set(tensors.keys()), set(shapes))
            unmoved = [name for name in shapes if not _checked(name, tensors.get_tensor(name), shapes[name], lora)]
    except SafetensorError as error:
        raise _wrong_adapter(f"{path.name} is no safetensors file: {error}") from error
    _require_learned(unmoved, len(shapes) // 2)


def _require_same_names(found: set[str], expected: set[str]) -> None:
    for names, what in ((expected - found, "lacks"), (found - expected, "has unexpected")):
        if names:
            raise _wrong_adapter(f"the adapter {what} {len(names)} of {len(expected)} tensors, first {min(names)}")


def _checked(name: str, tensor: torch.Tensor, shape: tuple[int, int], lora: LoraSpec) -> bool:
    """Check one tensor; False for a B that is still zero, as it was before training."""
    if tuple(tensor.shape) != shape:
        raise _wrong_adapter(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")
    if tensor.dtype != _DTYPES[lora.dtype]:
        raise _wrong_adapter(f"{name} is {tensor.dtype}, but spec.lora.dtype is {lora.dtype}")
    if not bool(torch.isfinite(tensor).all()):
        raise StepFailure(
            ExitCode.DIVERGED,
            f"{name} of the trained adapter holds NaN or infinite numbers, so it is not published: lower "
            "spec.training.learningRate and create the job again",
        )
    return not name.endswith(_B_SUFFIX) or bool(tensor.any())


def _require_learned(unmoved: list[str], layers: int) -> None:
    """B starts at zero, and any step with a gradient and a learning rate moves it."""
    if len(unmoved) == layers:
        # Only settings can do this: gradients that are zero everywhere would have no loss to come from.
        raise bad_configuration(
            "the trained adapter is still zero, so the model would answer as before: training took no step with a "
            "learning rate above 0; set spec.training.warmupSteps below the number of steps, or raise learningRate"
        )
    if unmoved:
        raise _wrong_adapter(f"no gradient has reached {len(unmoved)} of {layers} layers, first {unmoved[0]}")


def verify_config(
    path: Path, lora: LoraSpec, *, target_modules: tuple[str, ...], base_name: str, base_revision: str
) -> None:
    """Check that adapter_config.json describes this adapter. Raises StepFailure (INTERNAL_ERROR) if not."""
    expected: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "auto_mapping": None,
        "modules_to_save": None,
    }
    try:
        config = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise _wrong_adapter(f"{path.name} cannot be read: {error}") from error
    for key, value in expected.items():
        if config.get(key) != value:
            raise _wrong_adapter(f"{path.name} has {key}: {_brief(config.get(key))}, not {_brief(value)}")


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _wrong_adapter(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.INTERNAL_ERROR, f"{what}: this is a defect of the trainer, please report it; nothing was published"
    )
