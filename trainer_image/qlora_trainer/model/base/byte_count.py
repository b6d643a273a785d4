"""Counts the bytes of a loaded model's 4-bit weights, and checks their format."""

from collections import Counter
from dataclasses import dataclass
from math import prod

from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from qlora_trainer.core.completion import QuantizedLayers
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.model.experts.stack import expert_stacks
from qlora_trainer.model.nf4.quantization import layer_bytes


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
        """Bits per weight, or 0 without weights."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


def storage_of(model: nn.Module) -> Storage:
    """The storage of the 4-bit weights of a loaded model, each tensor counted once.

    Raises StepFailure (BAD_CONFIGURATION) naming the first weight that takes more or fewer bytes than its format.
    """
    counts: Counter[tuple[str, tuple[int, ...], int]] = Counter()
    for name, weight in model.named_parameters():
        if not isinstance(weight, Params4bit):
            continue
        state: QuantState = weight.quant_state
        found = sum(tensor.nbytes for tensor in (weight.data, *_tensors(state)))
        expected = layer_bytes(state.shape.numel(), double_quant=state.nested)
        if found != expected:
            raise bad_configuration(
                f"{name} takes {found} bytes and {expected} are what {state.shape.numel()} weights of type "
                f"{state.quant_type} take: this bitsandbytes stores them in another format"
            )
        kind = name.removesuffix(".weight").rpartition(".")[2]
        counts[kind, tuple(state.shape), found] += 1
    for name, stack in expert_stacks(model):
        if stack.bytes != stack.expected_bytes:
            raise bad_configuration(f"{name} takes {stack.bytes} bytes, not {stack.expected_bytes}")
        counts[name.rpartition(".")[2], stack.shape, stack.bytes] += 1
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
