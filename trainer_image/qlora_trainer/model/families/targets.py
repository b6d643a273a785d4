"""Resolves spec.lora.targetModules to the layers of a model that get an adapter."""

from collections.abc import Iterable

from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import PretrainedConfig

from qlora_trainer.core.failures import bad_configuration

ALL_LINEAR = "all-linear"


class _StandIn(nn.Module):
    """A model of a single layer, for PEFT."""

    config: PretrainedConfig


def refused_by_peft(config: PretrainedConfig, names: Iterable[str]) -> set[str]:
    """The names of linear layers that PEFT attaches no LoRA to in a model of this configuration.

    It rejects the output layer of Mamba blocks, which fused kernels read outside its forward pass.
    """
    refused: set[str] = set()
    names = tuple(names)
    for last_part in set(map(_last_part, names)):
        stand_in = _StandIn()
        stand_in.config = config
        stand_in.add_module(last_part, nn.Linear(1, 1, device="meta"))
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=[last_part]), stand_in, low_cpu_mem_usage=True)
        except ValueError:
            refused.update(name for name in names if _last_part(name) == last_part)
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
    """Exact, sorted names out of `linears` for spec.lora.targetModules. Each name there must match.

    Those `left_out` can get no adapter, nor can those `without_dora`. `experts`: whether the model has routed experts.
    """
    chosen: set[str] = set()
    allowed = [name for name in linears if name not in left_out and name not in without_dora]
    for target in wanted:
        found = allowed if target == ALL_LINEAR else _matching_names(target, allowed)
        if not found:
            why = "which the model does not have"
            if _matching_names(target, left_out):
                why = "which can have no adapter in this family"
            elif _matching_names(target, without_dora):
                why = "which can have no DoRA (spec.lora.useDora) in this family"
            elif experts:
                why = "which no layer has besides routed experts and routers, and these get no adapter"
            existing = sorted(set(map(_last_part, allowed)))
            raise bad_configuration(
                f"spec.lora.targetModules names {target!r}, {why}; allowed are {ALL_LINEAR} and {', '.join(existing)}"
            )
        chosen.update(found)
    return tuple(sorted(chosen))


def _matching_names(target: str, linears: Iterable[str]) -> list[str]:
    return [name for name in linears if name == target or name.endswith(f".{target}")]


def in_blocks(targets: tuple[str, ...], blocks: tuple[int, ...] | None) -> tuple[str, ...]:
    """The `targets` in the blocks of spec.lora.layersToTransform, some in each block."""
    if blocks is None:
        return targets
    numbers = {target: next(int(part) for part in target.split(".") if part.isdecimal()) for target in targets}
    missing = sorted(set(blocks) - set(numbers.values()))
    if missing:
        existing = sorted(set(numbers.values()))
        raise bad_configuration(
            f"spec.lora.layersToTransform names block {missing[0]}, and the model has there no layer of "
            f"spec.lora.targetModules; the blocks that have one are numbered {existing[0]} to {existing[-1]}"
        )
    return tuple(target for target in targets if numbers[target] in blocks)
