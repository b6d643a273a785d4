"""Decides from a model's config.json whether it can be trained with QLoRA, and which of its layers get an adapter."""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_api.training import LoraSpec
from qlora_trainer.attention import ATTENTION, Rows, register_attention
from qlora_trainer.failures import bad_configuration, model_unavailable, unsafe_artefact
from qlora_trainer.loss import LogitTransform

MIN_QUANTIZED_FRACTION = 0.98
ALL_LINEAR = "all-linear"

# transformers checks a value where it is first used: each of these is one that does not fit.
_UNUSABLE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    OSError,
    StrictDataclassError,
)

_PROBE_VOCABULARY = 128
_PROBE_WINDOW = 5
_PROBE_ROWS = (7, 12)


@dataclass(frozen=True)
class Family:
    """What is known about a base model before any of its weights is read."""

    model_type: str
    target_modules: tuple[str, ...]
    """Exact, sorted module names that get an adapter."""
    quantized_fraction: float
    """Of the parameters outside embeddings and head, those in layers that become 4-bit."""
    packing_isolated: bool
    """Whether rows in one sequence cannot see each other: a leak test on a shrunken random model of this family."""


def inspect_family(config_folder: Path, lora: LoraSpec) -> Family:
    """The family of the model whose config.json lies in `config_folder`. Reads no weights and runs none of its code.

    Raises StepFailure: UNSAFE_ARTEFACT for a model that brings its own code; BAD_CONFIGURATION, naming the family,
    for one that QLoRA cannot train here (mixture of experts, already quantized, too few linear layers) and for a
    target module that the model does not have.
    """
    config = _read_config(config_folder)
    model_type = config.model_type
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        _refuse_experts(model_type, skeleton)
        fraction = quantized_fraction(skeleton)
        if fraction < MIN_QUANTIZED_FRACTION:
            raise bad_configuration(
                f"model_type {model_type!r}: only {fraction:.1%} of the parameters outside the embeddings are in plain "
                f"linear layers, which is what is held in 4 bit; at least {MIN_QUANTIZED_FRACTION:.0%} must be"
            )
        targets = resolve_targets(lora.target_modules, block_linears(skeleton))
        isolated = _probe(model_type, config)
    except _UNUSABLE as error:
        raise bad_configuration(
            f"{config_folder / 'config.json'} (model_type {model_type!r}) describes no model that can be trained here: "
            f"{error}"
        ) from error
    return Family(model_type, targets, fraction, isolated)


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError as missing:
        raise model_unavailable(f"{path} does not exist: the folder holds no transformers model") from missing
    except (ValueError, RecursionError) as error:
        raise bad_configuration(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise bad_configuration(f"{path} names no model_type: it is not the configuration of a transformers model")
    for name, value in _entries(raw):
        if name == "auto_map":
            raise unsafe_artefact(f"{path} has auto_map: the model brings its own Python code, which is never run here")
        if "attn_implementation" in name and isinstance(value, str) and "/" in value:
            raise unsafe_artefact(f"{path} has {name} {value!r}: it would download and run a kernel")
        if name == "transformers_weights":
            raise unsafe_artefact(
                f"{path} has transformers_weights: other weights than those that are checked and recorded would be "
                "loaded; remove it, and name the weights' files as usual"
            )
        if name == "quantization_config":
            raise bad_configuration(
                f"{path} has quantization_config: the model is already quantized, which would silently win over "
                "spec.quantization; name the original 16-bit model instead"
            )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except _UNUSABLE as error:
        raise bad_configuration(f"{path}: model_type {raw['model_type']!r} cannot be read: {error}") from error


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def _refuse_experts(model_type: str, model: nn.Module) -> None:
    """Experts are parameters with three axes, which bitsandbytes leaves in 16 bit: most of such a model."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and "expert" in name:
            raise bad_configuration(
                f"model_type {model_type!r} is a mixture of experts: its experts ({name}) cannot be held in 4 bit; "
                "choose a dense model"
            )


def quantized_fraction(model: nn.Module) -> float:
    """Of the parameters outside input embeddings and output head, those in exact `nn.Linear` modules."""
    outer = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    head = model.get_output_embeddings()
    outer |= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    inner = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outer)
    # A subclass, as Falcon's, is not replaced by a 4-bit layer.
    linear = sum(
        module.weight.numel() for module in model.modules() if type(module) is nn.Linear and module is not head
    )
    return linear / inner if inner else 0.0


def block_linears(model: Any) -> tuple[str, ...]:
    """Sorted names of the linear layers in the text decoder's blocks: no head, no router, no vision tower."""
    decoder = model.get_decoder()
    blocks = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = next(
        (child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child) == blocks), None
    )
    if layers is None:
        raise bad_configuration(f"model_type {model.config.model_type!r}: its {blocks} decoder blocks were not found")
    inside = {id(module) for module in layers.modules() if isinstance(module, nn.Linear)}
    return tuple(sorted(name for name, module in model.named_modules() if id(module) in inside))


def resolve_targets(wanted: tuple[str, ...], linears: tuple[str, ...]) -> tuple[str, ...]:
    """Exact, sorted names out of `linears` for the names of spec.lora.targetModules, each of which must match."""
    chosen: set[str] = set()
    for target in wanted:
        found = linears if target == ALL_LINEAR else [n for n in linears if n == target or n.endswith(f".{target}")]
        if not found:
            existing = sorted({name.rpartition(".")[2] for name in linears})
            raise bad_configuration(
                f"spec.lora.targetModules names {target!r}, which the model does not have; "
                f"allowed are {ALL_LINEAR} and {', '.join(existing)}"
            )
        chosen.update(found)
    return tuple(sorted(chosen))


@torch.no_grad()
def _probe(model_type: str, config: Any) -> bool:
    """Try a shrunken random model of the family with our attention and head; True if rows are isolated.

    Raises StepFailure if a single row's logits differ from those of transformers' own attention and head.
    """
    register_attention()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            _shrunken(config), dtype=torch.float32, attn_implementation="eager"
        ).eval()
        first, other, second = (torch.randint(_PROBE_VOCABULARY, (1, n)) for n in (*_PROBE_ROWS[:1], *_PROBE_ROWS))
    expected = model(input_ids=second, use_cache=False).logits
    model.set_attn_implementation(ATTENTION)
    alone = _logits(model, second, Rows.of(_PROBE_ROWS[1:], second.device))
    if not torch.allclose(alone, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        raise bad_configuration(
            f"model_type {model_type!r} computes attention or logits in a way that this trainer does not know; "
            "choose another family"
        )
    rows = Rows.of(_PROBE_ROWS, second.device)
    with_first, with_other = (_logits(model, torch.cat([row, second], dim=1), rows) for row in (first, other))
    return torch.equal(with_first[:, _PROBE_ROWS[0] :], with_other[:, _PROBE_ROWS[0] :])


def _logits(model: Any, input_ids: Tensor, rows: Rows) -> Tensor:
    """Logits as training computes them: decoder, head, transform."""
    states = model.get_decoder()(
        input_ids=input_ids, position_ids=rows.position_ids(), rows=rows, use_cache=False
    ).last_hidden_state
    return LogitTransform.of(model.config)(model.get_output_embeddings()(states))


def _shrunken(config: Any) -> Any:
    """The same family with two blocks, few heads (of the same size, which positions depend on) and few tokens."""
    small = copy.deepcopy(config.get_text_config(decoder=True))
    heads, key_heads = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    head_size = getattr(small, "head_dim", None) or small.hidden_size // heads
    changes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if key_heads in (None, heads) else 1,
        "hidden_size": 2 * head_size,
        "intermediate_size": 64,
        "vocab_size": _PROBE_VOCABULARY,
        "layer_types": _two_kinds(getattr(small, "layer_types", None)),
        "sliding_window": _PROBE_WINDOW if getattr(small, "sliding_window", None) else None,
        "initializer_range": 0.2,
    }
    for name, value in changes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    # Ids beyond the small vocabulary would be refused by the embedding.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    return small


def _two_kinds(layer_types: list[str] | None) -> list[str] | None:
    """Two blocks that together show every kind of attention, so far as two can."""
    return None if layer_types is None else (list(dict.fromkeys(layer_types)) * 2)[:2]
