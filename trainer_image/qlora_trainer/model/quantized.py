"""The 4-bit layers of a loaded model: their tensors, their SHA-256, and the folder that keeps them for a merge."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_trainer.core.failures import unsafe_artifact
from qlora_trainer.core.filesystem import atomic_folder, remove

FILE_BYTES = 2**30
"""Size at which a file of the folder is complete; this much is in memory at a time."""
_SUM = "sha256"
Layer = Mapping[str, Tensor]
"""Packed weights, constants and tables of a 4-bit layer in main memory, named as in a checkpoint of bitsandbytes."""


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Name and tensors of each 4-bit layer, in the order of their names."""
    for name, module in sorted(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state.as_dict(packed=True)
            tensors = {"weight": weight.data} | {f"weight.{key}": value for key, value in state.items()}
            yield name, {key: tensor.detach().cpu().contiguous() for key, tensor in sorted(tensors.items())}


def layers_sha256(layers: Iterable[tuple[str, Layer]]) -> str:
    """SHA-256 over name, type, shape and bytes of every tensor, one layer in memory at a time."""
    digest = hashlib.sha256()
    for name, tensors in layers:
        for key, tensor in tensors.items():
            digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep_quantized(model: nn.Module, folder: Path, sha256: str, file_bytes: int = FILE_BYTES) -> None:
    """Write the model's 4-bit layers, whose sum is `sha256`, to `folder`, which is complete or absent afterwards.

    Returns at once if they are there. Raises OSError or SafetensorError if they cannot be written.
    """
    if _recorded(folder) == sha256:
        return
    # Of another base: there may be no room for both.
    remove(folder)
    with atomic_folder(folder) as partial:
        for number, tensors in enumerate(_files(quantized_layers(model), file_bytes)):
            save_file(tensors, partial / f"{number:05d}.safetensors")
        (partial / _SUM).write_text(sha256)


def is_kept(folder: Path, sha256: str) -> bool:
    """Whether `keep_quantized` has finished for these weights. `require_sha256` checks what the files hold now."""
    return _recorded(folder) == sha256


def _recorded(folder: Path) -> str | None:
    try:
        return (folder / _SUM).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _files(layers: Iterable[tuple[str, Layer]], file_bytes: int) -> Iterator[dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    for name, layer in layers:
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) >= file_bytes:
            yield tensors
            tensors = {}
    if tensors:
        yield tensors


class QuantizedWeights:
    """The layers in a folder that `keep_quantized` wrote. Each is read when it is needed."""

    def __init__(self, folder: Path) -> None:
        """Read the files' headers. Raises StepFailure (UNSAFE_ARTIFACT) if one is not a safetensors file."""
        self._folder = folder
        self._layers: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                opened = cast("Any", safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise unsafe_artifact(f"{path} is damaged ({error}): create the job again") from error
            for key in opened.keys():  # noqa: SIM118 - it is no dictionary
                layer, _, rest = key.partition(".weight")
                self._layers.setdefault(layer, {})[f"weight{rest}"] = opened

    def __contains__(self, layer: str) -> bool:
        return layer in self._layers

    def __iter__(self) -> Iterator[tuple[str, Layer]]:
        return ((name, self._read(name)) for name in sorted(self._layers))

    def _read(self, layer: str) -> Layer:
        files = self._layers[layer]
        return {key: files[key].get_tensor(f"{layer}.{key}") for key in sorted(files)}

    def require_sha256(self, sha256: str) -> None:
        """Raise StepFailure (UNSAFE_ARTIFACT) unless these weights have the sum that training recorded."""
        found = layers_sha256(self)
        if found != sha256:
            raise unsafe_artifact(
                f"the 4-bit weights in {self._folder} have sha256 {found}, but the adapter was trained on {sha256}: "
                "they were changed or damaged afterwards and are not merged; create the job again"
            )

    def dequantized(self, layer: str) -> Tensor:
        """The layer's weight [outputs, inputs] in 16 bit, the values that training used. Raises KeyError."""
        tensors = dict(self._read(layer))
        packed = tensors.pop("weight")
        state = {key.removeprefix("weight."): tensor for key, tensor in tensors.items()}
        return cast("Tensor", dequantize_4bit(packed, QuantState.from_dict(state, torch.device("cpu"))))
