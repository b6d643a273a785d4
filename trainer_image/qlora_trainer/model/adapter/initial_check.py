"""Checks that an earlier adapter is one that this job can train further: its configuration, tensors and numbers.

The configuration is only compared. It is never given to PEFT, whose `auto_mapping` names classes to import.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from qlora_api.printable import shortened, shortened_json
from qlora_api.spec.resolved import ResolvedLora
from qlora_api.spec.training import MAX_ALPHA, MAX_RANK, LoraSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE
from qlora_trainer.core.paths import some_names
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.model.adapter.shapes import MAX_CONFIG_BYTES, Expected

# Settings without effect on the values that the adapter computes or on the names of its tensors.
_WITHOUT_EFFECT = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "loftq_config",
        "eva_config",
        "ensure_weight_tying",
        "runtime_config",
    }
)
# PEFT changes the base's own weights for these, so that the adapter is of another base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
_REMEDY = "set these fields to what the adapter has, or remove spec.lora.from to begin with a new adapter"


@dataclass(frozen=True)
class AdapterConfig:
    """The size of an adapter, and the base that its configuration names."""

    rank: int
    alpha: int

    base_name: str | None
    base_revision: str | None


def check_config(path: Path, location: str, lora: LoraSpec) -> AdapterConfig:
    """Compare adapter_config.json with spec.lora. Raises StepFailure."""
    config = _read(path, location)
    if config.get("peft_type") != "LORA":
        kind = shortened_json(config.get("peft_type"))
        raise bad_configuration(f"the adapter of spec.lora.from, {location}, is of type {kind}: must be LORA")
    # The job takes over what it leaves open.
    rank = lora.rank or _size(config, "r", MAX_RANK, location)
    alpha = lora.alpha or _size(config, "lora_alpha", MAX_ALPHA, location)
    wanted: dict[str, tuple[str, object]] = {
        "r": ("rank", rank),
        "lora_alpha": ("alpha", alpha),
        "use_rslora": ("useRslora", lora.use_rslora),
        "use_dora": ("useDora", lora.use_dora),
    }
    different = [
        f"spec.lora.{field} is {shortened_json(value)}, and the adapter has {shortened_json(found)}"
        for key, (field, value) in wanted.items()
        if (found := config.get(key, False)) != value
    ]
    if different:
        raise _does_not_match(location, different)
    _validate_variant(config, location, {*wanted, "peft_type"})
    names = (config.get("base_model_name_or_path"), config.get("revision"))
    base = (shortened(name, 200) if isinstance(name, str) and name else None for name in names)
    return AdapterConfig(rank, alpha, *base)


def _size(config: JsonObject, key: str, highest: int, location: str) -> int:
    found = config.get(key)
    if type(found) is not int or not 1 <= found <= highest:
        raise bad_configuration(
            f"the adapter of spec.lora.from, {location}, has {key} {shortened_json(found)}, must be a whole number "
            f"from 1 to {highest}: correct its {ADAPTER_CONFIG_FILE}, or name another adapter"
        )
    return found


def check_tensors(path: Path, location: str, lora: ResolvedLora, expected: Mapping[str, Expected]) -> None:
    """Compare the adapter's tensors with those of training. Raises StepFailure."""
    try:
        with safe_open(path, framework="pt") as tensors:
            _validate_names(set(tensors.keys()), set(expected), location)
            for name, wanted in expected.items():
                _validate_tensor(name, tensors.get_tensor(name), wanted, lora, location)
    except SafetensorError as error:
        raise bad_configuration(f"{location}/{path.name} is not a safetensors file ({error}): copy it again") from error


def _read(path: Path, location: str) -> JsonObject:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise bad_configuration(f"{location}/{path.name} is not JSON ({shortened(str(error), 80)})") from error
    if not isinstance(config, dict):
        raise bad_configuration(f"{location}/{path.name} is not a JSON object")
    return config


def _validate_variant(config: JsonObject, location: str, compared: set[str]) -> None:
    """Raise StepFailure for a variant of LoRA that is unsupported or newer."""
    initialized = config.get("init_lora_weights")
    if isinstance(initialized, str) and initialized.startswith(_CHANGE_THE_BASE):
        raise bad_configuration(
            f"the adapter of spec.lora.from, {location}, was initialized with "
            f"{shortened_json(initialized)}. PEFT changed the base for it: convert it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    defaults = LoraConfig().to_dict()
    for key in sorted(config.keys() - compared - _WITHOUT_EFFECT - {"init_lora_weights"}):
        value = config[key]
        if value and value != defaults.get(key):
            raise bad_configuration(
                f"the adapter of spec.lora.from, {location}, has {shortened_json(key)}: "
                f"{shortened_json(value)}, which this trainer does not support: name an adapter that was trained "
                "without it"
            )


def _validate_names(found: set[str], expected: set[str], location: str) -> None:
    """Raise StepFailure naming the settings where one side has more tensors."""
    different, both = [], (found, expected)
    for field, marks in (
        ("targetModules", (".lora_A.weight", ".lora_B.weight")),
        ("useDora", (".lora_magnitude_vector",)),
    ):
        layers = (
            {name.removesuffix(mark) for name in names for mark in marks if name.endswith(mark)} for names in both
        )
        different += _difference(field, *layers)
    different += _difference("modulesToSave", *({name for name in names if ".lora_" not in name} for names in both))
    if different or found != expected:
        raise _does_not_match(location, different or [f"it has other tensors, first {min(found ^ expected)[:200]!r}"])


def _difference(field: str, found: set[str], expected: set[str]) -> list[str]:
    if found == expected:
        return []
    same_names = {_last(name) for name in found} == {_last(name) for name in expected}
    if same_names and field == "targetModules":
        field = "layersToTransform"
    parts = []
    for names, where in ((found - expected, "only in the adapter"), (expected - found, "only in this job")):
        listed = f"{len(names)} layers" if same_names else some_names({_last(name) for name in names})[:300]
        parts += [f"{listed} {where}, first {min(names)[:200]}"] if names else []
    return [f"spec.lora.{field} differs: {' and '.join(parts)}"]


def _last(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _validate_tensor(name: str, tensor: torch.Tensor, expected: Expected, lora: ResolvedLora, location: str) -> None:
    if tuple(tensor.shape) != expected.shape:
        raise bad_configuration(
            f"the adapter of spec.lora.from, {location}, is of another base: {name} has shape {list(tensor.shape)}, "
            f"and on this job's base {list(expected.shape)}; name an adapter of this base, or its base in spec.model"
        )
    exact = {expected.dtype} | ({torch.float16, torch.bfloat16} if expected.dtype is torch.float32 else set())
    if tensor.dtype not in exact:
        remedy = (
            f"spec.lora.dtype is {lora.dtype}, which would round it: set spec.lora.dtype: float32"
            if ".lora_" in name
            else "modules that are trained in full are bfloat16: convert it"
        )
        raise bad_configuration(f"the adapter of spec.lora.from, {location}: {name} is {tensor.dtype}; {remedy}")
    if not bool(torch.isfinite(tensor).all()):
        raise bad_configuration(
            f"the adapter of spec.lora.from, {location}: {name} holds NaN or infinite numbers; name an adapter whose "
            "training has not diverged"
        )


def _does_not_match(location: str, different: list[str]) -> StepFailure:
    return bad_configuration(
        f"the adapter of spec.lora.from, {location}, does not match this job: {'; '.join(different)}; {_REMEDY}"
    )
