"""Describes the tensors of a complete adapter's file: names, shapes and types."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple, cast

import torch
from torch import nn

from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.model.adapter.attach import tensor_dtype, whole_modules
from qlora_trainer.model.protocols import Decoder

B_SUFFIX = ".lora_B.weight"
MAX_CONFIG_BYTES = 2**22
"""Of adapter_config.json with all target modules: about 50 KB at most."""
# A safetensors file begins with names, types, shapes and places in JSON, and notes of its writer.
_HEADER_BYTES = 2**20
_HEADER_BYTES_PER_TENSOR = 512


class Expected(NamedTuple):
    """Shape and dtype of a tensor of a complete adapter."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def expected_tensors(skeleton: Decoder, target_modules: tuple[str, ...], lora: ResolvedLora) -> Mapping[str, Expected]:
    """Each tensor of a complete adapter, by its name in PEFT's files."""
    shapes: dict[str, tuple[int, ...]] = {}
    for target in target_modules:
        layer = cast("nn.Linear", skeleton.get_submodule(target))
        shapes[f"{target}.lora_A.weight"] = (lora.rank, layer.in_features)
        shapes[f"{target}{B_SUFFIX}"] = (layer.out_features, lora.rank)
        if lora.use_dora:
            shapes[f"{target}.lora_magnitude_vector"] = (layer.out_features,)
    for path in whole_modules(skeleton, lora):
        for name, parameter in skeleton.get_submodule(path).named_parameters():
            shapes[f"{path}.{name}"] = tuple(parameter.shape)
    return {f"base_model.model.{name}": Expected(shape, tensor_dtype(name, lora)) for name, shape in shapes.items()}


def largest_file(expected: Mapping[str, Expected]) -> int:
    """Most bytes of such an adapter's file: 4 for each number, and the header."""
    numbers = sum(prod(wanted.shape) for wanted in expected.values())
    return 4 * numbers + _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * len(expected)
