"""Compares the tensors in the files of a 4-bit base with those that the layout of its model announces."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open

from qlora_trainer.model.base_layout import BaseLayout
from qlora_trainer.model.stored_layer import StoredTensor

_DESCRIPTIONS = ("quant_state.", "quant_map", "nested_quant_map")
"""What says how to read a layer. The other tensors are the model's numbers."""


def require_tensors(folder: Path, files: Iterable[str], layout: BaseLayout) -> None:
    """Raise ValueError, naming the tensor, unless these files have the tensors of a base, and what reads them.

    Compared are names, types and shapes, and of each 4-bit layer its description and its tables: kernels read as many
    constants as the description asks for, and do not look where a tensor ends. The model's numbers are not read.
    Raises SafetensorError for a file of another format, OSError.
    """
    headers = {file: _headers(folder / file) for file in files}
    stored = {name: header for found in headers.values() for name, header in found.items()}
    wanted = layout.tensors(stored)
    if missing := wanted.keys() - stored.keys():
        raise ValueError(f"{min(missing)} is missing")
    for file, found in headers.items():
        for name, (dtype, shape) in found.items():
            if name not in wanted:
                raise ValueError(f"{name} belongs to no layer")
            entry, _ = wanted[name]
            if (dtype, shape) != (entry.dtype, entry.shape):
                raise ValueError(f"{name} is {dtype} {list(shape)}, and must be {entry.dtype} {list(entry.shape)}")
        _require_descriptions(folder / file, {name: layer for name in found if (layer := wanted[name][1]) is not None})


def _headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a file, by name."""
    with cast("Any", safe_open(path, framework="pt")) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
        return {name: (header.get_dtype(), tuple(header.get_shape())) for name, header in slices.items()}


def _require_descriptions(path: Path, layers: Mapping[str, StoredTensor]) -> None:
    with cast("Any", safe_open(path, framework="pt")) as opened:
        for name, layer in layers.items():
            if not layer.role.startswith(_DESCRIPTIONS):
                continue
            try:
                layer.ours(opened.get_tensor(name))
            except ValueError as error:
                raise ValueError(f"{name} is no part of a 4-bit layer: {error}") from error
