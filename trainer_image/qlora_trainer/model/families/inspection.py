"""Inspects a model's configuration: whether it can be trained, which layers get an adapter, how long rows may be."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_api.spec.output import OutputSpec
from qlora_api.spec.training import LoraSpec, TrainingSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration, model_unavailable, unsafe_artifact
from qlora_trainer.core.model_error import UNUSABLE, ModelError, explained, with_error
from qlora_trainer.model.architecture.decoder import block_linears, outer_parameters, place_in_block
from qlora_trainer.model.architecture.peft_names import lost_by_peft, taken_for_experts
from qlora_trainer.model.architecture.text_part import (
    auto_class,
    is_multimodal,
    parts_beside_text,
    text_part,
    without_weights,
)
from qlora_trainer.model.base.load import MIN_QUANTIZED_FRACTION
from qlora_trainer.model.experts.layout import ExpertLayout, routing_linears
from qlora_trainer.model.families.probe import probe
from qlora_trainer.model.families.rejection import (
    ALTERNATIVE,
    entries,
    reason_in_config,
    reason_in_model,
    reason_in_probe,
)
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.nf4.base_weights import reason_against_stored_parts
from qlora_trainer.model.source.quantization import (
    SETTINGS,
    experts_in_mxfp4,
    source_quantization,
    unusable,
)

ALL_LINEAR = "all-linear"
_MAX_CONFIG_BYTES = 2**24
_TOWERS_OF_TIMM = ("architecture", "backbone")
"""Settings that name a model of the library timm, by which transformers builds a tower."""


@dataclass(frozen=True)
class Family:
    """What is known about a base model before any of its weights is read."""

    model_type: str
    target_modules: tuple[str, ...]
    """Exact, sorted module names that get an adapter."""
    quantized_fraction: float
    """Of the parameters outside embeddings and head, those in layers that become 4-bit."""
    one_row: bool
    """Whether a sequence must have a single row: others in it would have an effect, in a small model of this family."""
    attention: str = ATTENTION
    """The `attn_implementation` with which the model is loaded: ours, or transformers' for one row a sequence."""
    longest_row: int | None = None
    """Tokens that the model has positions for; None if its configuration does not say."""
    fixed_positions: int | None = None
    """The same where it computes no longer row at all; None if it does, as with rotary positions."""
    same_rotation_up_to: int | None = None
    """Tokens of a row beyond which the model turns every row of its sequence by other angles; None if it never does."""
    without_adapter: tuple[str, ...] = ()
    """Linear layers of the blocks that get no adapter: no gradient would reach it, or PEFT refuses them."""
    mixture_of_experts: bool = False
    """Whether tokens are routed to experts, which then are in 4-bit and get no adapter."""
    experts_in_mxfp4: bool = False
    """Whether these are in MXFP4, as they were published, and stay so."""
    without_dora: tuple[str, ...] = ()
    """Linear layers of the blocks that get no adapter because it is DoRA, and PEFT takes their names for experts'."""
    auto_class: str = AutoModelForCausalLM.__name__
    """The one of transformers that loads the model to whose layers the adapter's names belong."""

    def keeps_rows_apart(self, row_tokens: int) -> bool:
        """Whether rows of up to `row_tokens` tokens can share a sequence without any effect on each other."""
        return not self.one_row and row_tokens <= (self.same_rotation_up_to or row_tokens)

    def require_rows_apart(self, row_tokens: int) -> None:
        """Raise StepFailure unless a micro batch may hold several rows of up to `row_tokens` tokens."""
        if not self.keeps_rows_apart(row_tokens):
            raise cannot_keep_rows_apart(self.model_type)

    def require_whole_and_unmerged(self, training: TrainingSpec, output: OutputSpec) -> None:
        """Raise StepFailure if the job shards, merges or publishes a mixture of experts, which is not supported."""
        if self.mixture_of_experts and training.sharding == "full":
            raise bad_configuration(
                f"spec.training.sharding is full, and the model (model_type {self.model_type!r}) is a mixture of "
                "experts, whose experts are not sharded: leave it out, and use GPUs that hold the whole model in 4-bit"
            )
        if self.mixture_of_experts and output.merged is not None:
            raise bad_configuration(
                f"spec.output.merged: the model (model_type {self.model_type!r}) is a mixture of experts, into which "
                "no adapter is merged: leave it out, and serve the adapter beside its base"
            )
        if self.mixture_of_experts and output.base is not None:
            raise bad_configuration(
                f"spec.output.base: the model (model_type {self.model_type!r}) is a mixture of experts, and no server "
                "reads experts as they are in its 4-bit base: leave it out"
            )

    def require_positions(self, row_tokens: int) -> None:
        """Raise StepFailure unless the model has positions for rows of `row_tokens` tokens."""
        if self.longest_row is not None and row_tokens > self.longest_row:
            raise bad_configuration(
                f"spec.training.maxSequenceLength is {row_tokens}, but the model (model_type {self.model_type!r}) has "
                f"positions for {self.longest_row} tokens (max_position_embeddings): set it to {self.longest_row} or "
                "less, or name a model with a longer context"
            )


def cannot_keep_rows_apart(model_type: str) -> StepFailure:
    """The failure of a job whose micro batches hold several rows of a model that needs one."""
    return bad_configuration(
        f"model_type {model_type!r} cannot keep the rows of a batch apart: set spec.training.microBatchSize to 1 and "
        "raise gradientAccumulationSteps instead"
    )


def cannot_compare_answers(model_type: str) -> StepFailure:
    """The failure of a job that compares two answers in one pass of a model that needs each row alone."""
    return bad_configuration(
        f"model_type {model_type!r} cannot keep the rows of a batch apart, and spec.training.objective compares two "
        "answers in one pass: set objective to supervised, or use a model whose rows can share a sequence"
    )


def inspect_family(config_folder: Path, lora: LoraSpec) -> Family:
    """The family of the model whose config.json is in `config_folder`. Reads no weights and runs none of its code.

    Raises StepFailure: UNSAFE_ARTIFACT for a model that brings its own code; BAD_CONFIGURATION, naming the family,
    for one that QLoRA cannot train here (quantized otherwise, too few layers that become 4-bit, a small model of it
    that computes otherwise than transformers) and for a target module that the model does not have. Takes as much
    time and memory as the sizes in the file say: call it within limits for a stranger's.
    """
    config = _read_config(config_folder)
    try:
        with explained("this trainer cannot use its settings"):
            return _inspected(config, lora)
    except ModelError as error:
        raise bad_configuration(
            f"{config_folder / 'config.json'} (model_type {config.model_type!r}) describes no model that can be "
            f"trained here: {error}; {ALTERNATIVE}"
        ) from error


def _inspected(config: Any, lora: LoraSpec) -> Family:
    """See `inspect_family`. Raises ModelError if transformers, PyTorch or PEFT cannot use what they are given."""
    model_type = config.model_type
    _reject(model_type, reason_in_config(config))
    loader: Any = auto_class(config)
    with explained("transformers cannot build a model from this config.json"):
        skeleton = text_part(config)
    with explained("this trainer cannot read the layers of the model that transformers builds"):
        _reject(model_type, reason_in_model(skeleton))
        whole = without_weights(config) if is_multimodal(config) else skeleton
        _reject(model_type, reason_against_stored_parts(whole, parts_beside_text(whole)))
        fraction = quantized_fraction(skeleton)
        experts = bool(ExpertLayout.of(skeleton).stacks)
        _reject_untying(model_type, skeleton, lora)
    if fraction < MIN_QUANTIZED_FRACTION:
        _reject(
            model_type,
            f"only {fraction:.1%} of its parameters outside the embeddings are in plain linear layers, which is "
            f"what is stored in 4-bit, and at least {MIN_QUANTIZED_FRACTION:.0%} must be",
        )
    _reject_stored_experts(config, experts=experts)
    probed = probe(config, skeleton)
    _reject(model_type, reason_in_probe(probed))
    linears = block_linears(skeleton)
    taken = taken_for_experts(skeleton, linears)
    with explained("PEFT cannot attach an adapter to its layers"):
        refused = refused_by_peft(config, (name for name in linears if name not in taken))
        refused |= lost_by_peft(skeleton, linears)
    left_out = tuple(name for name in linears if place_in_block(name) in probed.without_gradient or name in refused)
    if len(left_out) == len(linears):
        _reject(
            model_type,
            "no layer of its blocks can have an adapter: no gradient reaches it, PEFT refuses it, or PEFT does not "
            "find it by its name when it reads the adapter",
        )
    without_dora = tuple(sorted(taken.difference(left_out))) if lora.use_dora else ()
    targets = resolve_targets(lora.target_modules, linears, left_out, without_dora, experts=experts)
    text = config.get_text_config(decoder=True)
    return Family(
        model_type=model_type,
        target_modules=in_blocks(targets, lora.layers_to_transform),
        quantized_fraction=fraction,
        one_row=not probed.isolated,
        attention=str(probed.attention),
        longest_row=longest_row(text),
        fixed_positions=longest_row(text) if probed.fixed_positions else None,
        same_rotation_up_to=same_rotation_up_to(text),
        without_adapter=left_out,
        mixture_of_experts=experts,
        experts_in_mxfp4=experts and experts_in_mxfp4(config),
        without_dora=without_dora,
        auto_class=loader.__name__,
    )


def _reject_stored_experts(config: Any, *, experts: bool) -> None:
    """Reject a mixture of experts that bitsandbytes has stored in 4 bit."""
    stored_in_4_bit = getattr(config, SETTINGS[0], None) is not None and not experts_in_mxfp4(config)
    if stored_in_4_bit and experts:
        _reject(config.model_type, "it is a mixture of experts that is quantized already, and its experts are not")


def _reject(model_type: str, reason: str | None) -> None:
    if reason is not None:
        raise bad_configuration(f"model_type {model_type!r} cannot be trained here: {reason}; {ALTERNATIVE}")


def _read_config(folder: Path) -> Any:
    path = folder / "config.json"
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
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNUSABLE as error:
        cannot = with_error(
            f"{path}: transformers cannot read a configuration of model_type {raw['model_type']!r}", error
        )
        raise bad_configuration(cannot) from error


def _require_safe(path: Path, raw: dict[str, Any]) -> None:
    """Raise StepFailure for a configuration with which transformers would run or read what is not the model's."""
    for name, value in entries(raw):
        if name == "auto_map":
            raise unsafe_artifact(f"{path} has auto_map: the model brings its own Python code, which is never run here")
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
    """Of the parameters outside embeddings and output layer, those in exact `nn.Linear` modules and routed experts."""
    outer, head = outer_parameters(model), model.get_output_embeddings()
    inner = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in outer)
    # A subclass, as Falcon's, is not replaced by a 4-bit layer.
    routing = set(routing_linears(model))
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name not in routing
    )
    experts = sum(prod(stack.shape) for stack in ExpertLayout.of(model).stacks.values())
    return (linear + experts) / inner if inner else 0.0


def refused_by_peft(config: Any, names: Iterable[str]) -> set[str]:
    """Those of the names of linear layers on which PEFT attaches no LoRA in a model of this configuration.

    It refuses the output layer of Mamba blocks, which fused kernels read beside its forward pass.
    """
    refused: set[str] = set()
    by_last_part = groupby(sorted(names, key=_last_part), _last_part)
    for last_part, group in by_last_part:
        stand_in = nn.Module()
        stand_in.config = config
        stand_in.add_module(last_part, nn.Linear(1, 1, device="meta"))
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=[last_part]), stand_in, low_cpu_mem_usage=True)
        except ValueError:
            refused.update(group)
    return refused


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def resolve_targets(
    wanted: tuple[str, ...],
    linears: tuple[str, ...],
    left_out: tuple[str, ...] = (),
    without_dora: tuple[str, ...] = (),
    *,
    experts: bool = False,
) -> tuple[str, ...]:
    """Exact, sorted names out of `linears` for the names of spec.lora.targetModules, each of which must match.

    Those `left_out` can get no adapter, nor can those `without_dora`. `experts`: whether the model has routed experts.
    """
    chosen: set[str] = set()
    allowed = [name for name in linears if name not in left_out and name not in without_dora]
    for target in wanted:
        found = allowed if target == ALL_LINEAR else _named(target, allowed)
        if not found:
            why = "which the model does not have"
            if _named(target, left_out):
                why = "which can have no adapter in this family"
            elif _named(target, without_dora):
                why = "which can have no DoRA (spec.lora.useDora) in this family"
            elif experts:
                why = "which no layer has besides routed experts and routers, and these get no adapter"
            existing = sorted(set(map(_last_part, allowed)))
            raise bad_configuration(
                f"spec.lora.targetModules names {target!r}, {why}; allowed are {ALL_LINEAR} and {', '.join(existing)}"
            )
        chosen.update(found)
    return tuple(sorted(chosen))


def _named(target: str, linears: Iterable[str]) -> list[str]:
    return [name for name in linears if name == target or name.endswith(f".{target}")]


def in_blocks(targets: tuple[str, ...], blocks: tuple[int, ...] | None) -> tuple[str, ...]:
    """Those of `targets` in the decoder blocks of spec.lora.layersToTransform, each of which must hold some."""
    if blocks is None:
        return targets
    numbers = {target: next(int(part) for part in target.split(".") if part.isdecimal()) for target in targets}
    missing = sorted(set(blocks) - set(numbers.values()))
    if missing:
        existing = sorted(set(numbers.values()))
        raise bad_configuration(
            f"spec.lora.layersToTransform names block {missing[0]}, in which the model has no layer of "
            f"spec.lora.targetModules; the blocks that have one are numbered {existing[0]} to {existing[-1]}"
        )
    return tuple(target for target in targets if numbers[target] in blocks)


def _reject_untying(model_type: str, model: Any, lora: LoraSpec) -> None:
    """Reject training a copy of one of two tied modules, which would give another model than the spec describes."""
    head = model.get_output_embeddings()
    if lora.modules_to_save and head.weight is model.get_input_embeddings().weight:
        raise bad_configuration(
            f"spec.lora.modulesToSave: in this model of type {model_type!r} embed_tokens and lm_head are one matrix, "
            "which cannot be trained as two: leave modulesToSave out, or choose a model that does not tie them"
        )


def longest_row(config: Any) -> int | None:
    """Tokens of the longest row that the model has positions for; None if the configuration does not say.

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


def same_rotation_up_to(config: Any) -> int | None:
    """Tokens up to which a row is rotated by the same angles whatever else is in its sequence; None if always.

    LongRoPE (arXiv 2402.13753), as transformers computes it, takes its long factors for a whole sequence as soon as
    one row in it is longer than the original length.
    """
    lengths = [
        int(rotation["original_max_position_embeddings"])
        for rotation in _rotations(config)
        if rotation["rope_type"] == "longrope"
    ]
    return min(lengths, default=None)


def _rotations(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings, one for each kind of layer where kinds differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rotation in (parameters, *parameters.values()):
        if isinstance(rotation, dict) and "rope_type" in rotation:
            yield rotation
