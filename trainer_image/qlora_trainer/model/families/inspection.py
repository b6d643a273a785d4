"""Inspects a model's configuration: support, adapted layers, and row lengths."""

import json
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import cast

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import RopeParameters

from qlora_api.automatic import ModelFacts
from qlora_api.memory.model_shape import NAMED_SIZES, missing_sizes
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.failures import bad_configuration, model_unavailable, unsafe_artifact
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.model.architecture.decoder import (
    block_linears,
    lost_by_peft,
    outer_parameters,
    place_in_block,
    taken_for_experts,
)
from qlora_trainer.model.architecture.text_part import (
    auto_class,
    is_multimodal,
    parts_beside_text,
    text_part,
    without_weights,
)
from qlora_trainer.model.base.load import MIN_QUANTIZED_FRACTION
from qlora_trainer.model.errors import UNUSABLE, ModelError, explain_errors, with_error
from qlora_trainer.model.experts.layout import EXPERT_COUNTS, ExpertLayout, routing_linears
from qlora_trainer.model.families.family import ALTERNATIVE, Family
from qlora_trainer.model.families.probe import probe
from qlora_trainer.model.families.rejection import (
    entries,
    reason_in_config,
    reason_in_model,
    reason_in_probe,
)
from qlora_trainer.model.families.targets import in_blocks, refused_by_peft, resolve_targets
from qlora_trainer.model.nf4.base_weights import reason_against_stored_parts
from qlora_trainer.model.source.files import CONFIG, reject_code
from qlora_trainer.model.source.quantization import SETTINGS, experts_in_mxfp4, source_quantization, unusable

_MAX_CONFIG_BYTES = 2**24
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_EXPERT_SIZES = (*EXPERT_COUNTS, "moe_intermediate_size")
_TOWERS_OF_TIMM = ("architecture", "backbone")
"""Settings that name a timm model, for transformers to build a tower of."""


def inspect_family(config_folder: Path, lora: LoraSpec) -> Family:
    """The family of the model whose config.json is in `config_folder`. Reads no weights and runs none of its code.

    Raises StepFailure: UNSAFE_ARTIFACT for a model that brings code; BAD_CONFIGURATION, naming the family, for one that
    QLoRA cannot train here (quantized in another format, too few layers that become 4-bit, a small model of it that
    computes other values than transformers) and for a target module that the model does not have. Takes as much time
    and memory as the sizes in the file ask for: call it within limits for an untrusted file.
    """
    config = _read_config(config_folder)
    try:
        with explain_errors("this trainer cannot use its settings"):
            return _inspect(config, lora)
    except ModelError as error:
        raise bad_configuration(
            f"{config_folder / CONFIG} (model_type {config.model_type!r}) describes no model that can be "
            f"trained here: {error}; {ALTERNATIVE}"
        ) from error


def inspect_published(folder: Path, lora: LoraSpec) -> Family:
    """Inspect as `inspect_family`. Raises StepFailure for code beside the tokenizer, and for sizes that are missing."""
    reject_code(folder)
    family = inspect_family(folder, lora)
    if missing := _unnamed_sizes(folder, experts=family.mixture_of_experts):
        raise bad_configuration(f"spec.model.source: {missing_sizes(missing)}")
    return family


def _weights_per_rank(model: PreTrainedModel, names: Iterable[str]) -> int:
    layers = (model.get_submodule(name) for name in names)
    return sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, nn.Linear))


def _unnamed_sizes(folder: Path, *, experts: bool) -> list[str]:
    """Sizes that config.json does not name: transformers' defaults are another model's.

    Of a part of a multimodal model, transformers writes only what differs from its defaults: one size is enough.
    """
    raw = json.loads((folder / CONFIG).read_bytes())
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    text = config.get_text_config(decoder=True)
    named = (value for _, value in entries(raw)) if text is not config else raw.values()
    numbers = {value for value in named if isinstance(value, int)}
    names = (*NAMED_SIZES, *(_EXPERT_SIZES if experts else ()))
    defaults = type(text).default_config_fields()
    fields = {name: text.attribute_map.get(name, name) for name in names}
    sizes = {name: field for name, field in fields.items() if isinstance(defaults.get(field), int)}
    unnamed = [
        name
        for name, field in sizes.items()
        # By its number: files also have names that only the family reads, such as BLOOM's n_embed.
        if vars(text).get(field) == defaults[field] and defaults[field] not in numbers
    ]
    return unnamed if text is config or len(unnamed) == len(sizes) else []


def _inspect(config: PretrainedConfig, lora: LoraSpec) -> Family:
    """See `inspect_family`. Raises ModelError if a library cannot use the model."""
    model_type, loader = config.model_type, cast("type[object]", auto_class(config))
    _reject(model_type, reason_in_config(config))
    with explain_errors("transformers cannot build a model from this config.json"):
        skeleton = text_part(config)
    with explain_errors("this trainer cannot read the layers of the model that transformers builds"):
        _reject(model_type, reason_in_model(skeleton))
        whole = without_weights(config) if is_multimodal(config) else skeleton
        _reject(model_type, reason_against_stored_parts(whole, parts_beside_text(whole)))
        fraction = quantized_fraction(skeleton)
        stacks = ExpertLayout.from_model(skeleton).stacks.values()
        experts = bool(stacks)
        _reject_untying(model_type, skeleton, lora)
    if fraction < MIN_QUANTIZED_FRACTION:
        _reject(
            model_type,
            f"only {fraction:.1%} of its parameters outside the embeddings are in plain linear layers, which is "
            f"what is stored in 4-bit, and at least {MIN_QUANTIZED_FRACTION:.0%} must be",
        )
    if experts and getattr(config, SETTINGS[0], None) is not None and not experts_in_mxfp4(config):
        _reject(model_type, "it is a mixture of experts that is quantized already, and its experts are not")
    probed = probe(config, skeleton)
    _reject(model_type, reason_in_probe(probed))
    linears = block_linears(skeleton)
    taken = taken_for_experts(skeleton, linears)
    with explain_errors("PEFT cannot attach an adapter to its layers"):
        refused = refused_by_peft(config, (name for name in linears if name not in taken))
        refused |= lost_by_peft(skeleton, linears)
    left_out = tuple(name for name in linears if place_in_block(name) in probed.without_gradient or name in refused)
    if len(left_out) == len(linears):
        _reject(
            model_type,
            "no layer of its blocks can have an adapter: no gradient reaches it, PEFT rejects it, or PEFT does not "
            "find it by its name when it reads the adapter",
        )
    without_dora = tuple(sorted(taken.difference(left_out))) if lora.use_dora else ()
    targets = resolve_targets(lora.target_modules, linears, left_out, without_dora, experts=experts)
    text = config.get_text_config(decoder=True)
    adapted = in_blocks(targets, lora.layers_to_transform)
    return Family(
        model_type=model_type,
        target_modules=adapted,
        sizes=ModelFacts(text.hidden_size, _weights_per_rank(skeleton, adapted)),
        vocabulary=text.vocab_size,
        quantized_fraction=fraction,
        one_row=not probed.is_isolated,
        attention=str(probed.attention),
        longest_row=longest_row(text),
        fixed_positions=longest_row(text) if probed.has_fixed_positions else None,
        same_rotation_up_to=same_rotation_up_to(text),
        without_adapter=left_out,
        mixture_of_experts=experts,
        experts_in_mxfp4=experts and experts_in_mxfp4(config),
        idle_parameters=_idle_parameters(text, [stack.shape for stack in stacks]),
        without_dora=without_dora,
        auto_class=loader.__name__,
    )


def _idle_parameters(text: PretrainedConfig, stacks: Sequence[tuple[int, int, int]]) -> int | None:
    """Weights of the experts that a token is not routed to, or None if their number is unknown."""
    if not stacks:
        return 0
    chosen = next((count for name in _EXPERTS_OF_A_TOKEN if isinstance(count := getattr(text, name, None), int)), None)
    if chosen is None:
        return None
    return sum((experts - min(chosen, experts)) * rows * columns for experts, rows, columns in stacks)


def _reject(model_type: str, reason: str | None) -> None:
    if reason is not None:
        raise bad_configuration(f"model_type {model_type!r} cannot be trained here: {reason}; {ALTERNATIVE}")


def _read_config(folder: Path) -> PretrainedConfig:
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise bad_configuration(
                f"{path} is larger than a configuration: at most {_MAX_CONFIG_BYTES} bytes are read"
            )
        raw = json.loads(content)
    except FileNotFoundError as missing:
        raise model_unavailable(f"{path} does not exist: the folder holds no transformers model") from missing
    except (ValueError, RecursionError) as error:
        raise bad_configuration(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise bad_configuration(f"{path} names no model_type: it is not the configuration of a transformers model")
    _require_safe(path, raw)
    source_quantization(raw, str(path))
    if raw["model_type"] not in CONFIG_MAPPING:
        raise bad_configuration(
            f"{path} has model_type {raw['model_type']!r}, which transformers {transformers.__version__} of this "
            f"trainer does not have: {ALTERNATIVE}, or use a release of the trainer that has it"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNUSABLE as error:
        cannot = f"{path}: transformers cannot read a configuration of model_type {raw['model_type']!r}"
        raise bad_configuration(with_error(cannot, error)) from error


def _require_safe(path: Path, raw: JsonObject) -> None:
    """Raise StepFailure for a configuration that runs or reads foreign content."""
    for name, value in entries(raw):
        if name == "auto_map":
            raise unsafe_artifact(f"{path} has auto_map: the model brings Python code, which is never run here")
        if "attn_implementation" in name and isinstance(value, str) and "/" in value:
            raise unsafe_artifact(f"{path} has {name} {value!r}: it would download and run a kernel")
        if name in _TOWERS_OF_TIMM and isinstance(value, str) and ":" in value:
            # timm takes what is before the colon for a place: hf-hub or local-dir.
            raise unsafe_artifact(
                f"{path} has {name} {value!r}: the settings of a tower would be read from another place; allowed is "
                "the name of one of timm's models"
            )
        if name == "checkpoint_path":
            raise unsafe_artifact(
                f"{path} has {name}: weights of a tower would be read from another file than those that are checked "
                "and recorded; remove it"
            )
        if name == "transformers_weights":
            raise unsafe_artifact(
                f"{path} has transformers_weights: other weights than those that are checked and recorded would be "
                "loaded; remove it, and name the weights' files as usual"
            )
        if name in SETTINGS and value is not raw.get(SETTINGS[0]):
            raise unusable(raw, str(path), name, value)


def quantized_fraction(model: PreTrainedModel) -> float:
    """Share of exact `nn.Linear` modules and experts in the parameters of the blocks."""
    outer, head = outer_parameters(model), model.get_output_embeddings()
    inner = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outer)
    # A subclass, as Falcon's, is not replaced by a 4-bit layer.
    routing = set(routing_linears(model))
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name not in routing
    )
    experts = sum(prod(stack.shape) for stack in ExpertLayout.from_model(model).stacks.values())
    return (linear + experts) / inner if inner else 0.0


def _reject_untying(model_type: str, model: PreTrainedModel, lora: LoraSpec) -> None:
    """Reject training a copy of one of two tied modules: a different model."""
    head = model.get_output_embeddings()
    if lora.modules_to_save and head.weight is model.get_input_embeddings().weight:
        raise bad_configuration(
            f"spec.lora.modulesToSave: in this model of type {model_type!r} embed_tokens and lm_head are one matrix, "
            "which cannot be trained as two: leave modulesToSave out, or choose a model that does not tie them"
        )


def longest_row(config: PretrainedConfig) -> int | None:
    """Tokens of the longest row that the model has positions for, or None without a limit.

    `max_position_embeddings`, or more where the rotation is stretched: `factor` times the original length with YaRN
    (arXiv 2309.00071), `factor` times the length with linear interpolation (arXiv 2306.15595).
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    stretched = [positions]
    for rotation in _rotations(config):
        factor = rotation.get("factor") or 1.0
        if rotation["rope_type"] == "yarn":
            stretched.append(int(factor * (rotation.get("original_max_position_embeddings") or positions)))
        elif rotation["rope_type"] == "linear":
            stretched.append(int(factor * positions))
    return max(stretched)


def same_rotation_up_to(config: PretrainedConfig) -> int | None:
    """The most tokens of a row whose rotation is independent of its sequence, or None without a limit.

    LongRoPE (arXiv 2402.13753), as transformers computes it, takes its long factors for a whole sequence as soon as
    one row in it is longer than the original length.
    """
    lengths = [
        int(cast("int", rotation["original_max_position_embeddings"]))
        for rotation in _rotations(config)
        if rotation["rope_type"] == "longrope"
    ]
    return min(lengths, default=None)


def _rotations(config: PretrainedConfig) -> Iterator[RopeParameters]:
    """The rotary settings, one for each kind of layer where kinds differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rotation in (parameters, *parameters.values()):
        if isinstance(rotation, dict) and "rope_type" in rotation:
            yield cast("RopeParameters", rotation)
