"""Counts the bytes that the 4-bit weights of a loaded model take, and checks them against their format."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any

from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from qlora_trainer.core.completion import QuantizedLayers
from qlora_trainer.core.failures import bad_configuration

BLOCK = 64
"""Weights that share one quantization constant (arXiv 2305.14314, section 3)."""
OUTER_BLOCK = 256
"""Constants that share one constant of the second level, if they are quantized too."""
_FLOAT32_BYTES = 4
_CODE_BYTES = 16 * _FLOAT32_BYTES
_CONSTANTS_CODE_BYTES = 256 * _FLOAT32_BYTES


@dataclass(frozen=True)
class Storage:
    """The 4-bit weights of a model."""

    layers: tuple[QuantizedLayers, ...]
    """By kind, in the order in which the model has the first of each."""

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(kind.count * prod(kind.shape) for kind in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of the weights and of everything that is needed to read them."""
        return sum(kind.count * kind.bytes_each for kind in self.layers)

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight; 0 without weights."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def storage_of(model: nn.Module) -> Storage:
    """The storage of the 4-bit weights of a loaded model, each tensor counted once.

    Raises StepFailure (BAD_CONFIGURATION) naming the first weight that takes more or fewer bytes than its format.
    """
    counts: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    for name, weight in model.named_parameters():
        if not isinstance(weight, Params4bit):
            continue
        state: Any = weight.quant_state
        found = sum(tensor.nbytes for tensor in (weight.data, *_tensors(state)))
        expected = layer_bytes(state.shape.numel(), double_quant=state.nested)
        if found != expected:
            raise bad_configuration(
                f"{name} takes {found} bytes and {expected} are what {state.shape.numel()} weights of type "
                f"{state.quant_type} take: this bitsandbytes stores them in another format"
            )
        kind = name.removesuffix(".weight").rpartition(".")[2]
        counts[kind, tuple(state.shape), found] += 1
    return Storage(
        tuple(
            QuantizedLayers(name=kind, shape=shape, count=count, bytes_each=size)
            for (kind, shape, size), count in counts.items()
        )
    )


def _tensors(state: QuantState) -> list[Tensor]:
    """The constants and tables of a layer."""
    own = [state.absmax, state.code]
    return [*own, state.offset, *_tensors(state.state2)] if state.nested else own


def layer_bytes(parameters: int, *, double_quant: bool) -> int:
    """Bytes of one layer of so many weights in the format of bitsandbytes.

    Two weights per byte, a constant for each block, and the table of the 16 values. Double quantization stores the
    constants in 8 bit: with a float32 for each outer block of them, their mean, and the table of their 256 values.
    """
    blocks = -(-parameters // BLOCK)
    weights = -(-parameters // 2) + _CODE_BYTES
    if not double_quant:
        return weights + blocks * _FLOAT32_BYTES
    outer_blocks = -(-blocks // OUTER_BLOCK)
    return weights + blocks + outer_blocks * _FLOAT32_BYTES + _FLOAT32_BYTES + _CONSTANTS_CODE_BYTES
