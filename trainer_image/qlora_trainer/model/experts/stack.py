"""Keeps routed experts' frozen weights in 4-bit, and dequantizes any of them."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor, nn

from qlora_api.spec.training import QuantizationSpec
from qlora_trainer.model.experts.mxfp4_stack import Mxfp4Stack, looked_up
from qlora_trainer.model.nf4.quantization import BLOCK, OUTER_BLOCK, dynamic_map, layer_bytes


class ExpertStack(nn.Module):
    """One weight of all experts of a block: [experts, rows, columns] in 4-bit, not a parameter.

    An expert consists of one or more `pieces` of the same size, which follow one another: its matrices in the
    checkpoint, such as gate and up. Each was quantized separately, exactly as bitsandbytes quantizes a linear layer, so
    no block of 64 weights and no constant of the second level crosses from one to the next. Therefore a piece has a
    multiple of 64 weights. The tables of the values are the same for all, and are kept once.
    """

    packed: Tensor
    """uint8 [experts, bytes]: two weights a byte."""
    absmax: Tensor
    """[experts, blocks]: the constants, float32 or, with double quantization, uint8."""
    code: Tensor
    """float32 [16]: the 4-bit values."""
    outer_absmax: Tensor
    """float32 [experts, pieces, outer blocks]: the constants of the constants.

    Empty without double quantization.
    """
    outer_code: Tensor
    """float32 [256]: values of 8-bit constants, empty without double quantization."""
    offset: Tensor
    """float32 [experts, pieces]: the mean that was subtracted from the constants.

    Empty without double quantization.
    """

    def __init__(
        self, shape: tuple[int, int, int], pieces: int, quantization: QuantizationSpec, device: torch.device | str
    ) -> None:
        """Create without values. Raises ValueError unless pieces have 64 N weights."""
        super().__init__()
        experts, size = shape[0], shape[1] * shape[2]
        if size % (pieces * BLOCK):
            raise ValueError(f"{pieces} pieces of {size} weights cannot be cut into blocks of {BLOCK}")
        self.shape, self.pieces, self.quantization = shape, pieces, quantization
        double, blocks = quantization.double_quant, size // BLOCK
        outer_blocks = -(-blocks // pieces // OUTER_BLOCK)
        outer_shape, offset_shape = ((experts, pieces, outer_blocks), (experts, pieces)) if double else ((0,), (0,))
        # Not persistent: transformers would ask the checkpoint for them.
        for name, tensor in {
            "packed": torch.empty(experts, size // 2, dtype=torch.uint8, device=device),
            "absmax": torch.empty(experts, blocks, dtype=torch.uint8 if double else torch.float32, device=device),
            "code": get_4bit_type(quantization.type, device="cpu").to(device),
            "outer_absmax": torch.empty(outer_shape, dtype=torch.float32, device=device),
            "outer_code": dynamic_map().to(device, copy=True) if double else torch.empty(0, device=device),
            "offset": torch.empty(offset_shape, dtype=torch.float32, device=device),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def piece_shape(self) -> tuple[int, int]:
        """Of a piece as the checkpoint has it."""
        return self.shape[1] // self.pieces, self.shape[2]

    @property
    def parameters_count(self) -> int:
        """Weights of all experts."""
        experts, rows, columns = self.shape
        return experts * rows * columns

    @property
    def bytes(self) -> int:
        """Bytes of everything that is needed to read the weights."""
        return sum(buffer.untyped_storage().nbytes() for buffer in self.buffers())

    @property
    def expected_bytes(self) -> int:
        """Bytes of so many weights in this format."""
        double = self.quantization.double_quant
        tables = layer_bytes(0, double_quant=False) + (4 * 256 if double else 0)
        piece = self.shape[1] * self.shape[2] // self.pieces
        return tables + self.shape[0] * self.pieces * (layer_bytes(piece, double_quant=double) - tables)

    def put(self, expert: int, piece: int, layer: Mapping[str, Tensor]) -> None:
        """Set a piece of an expert to the tensors of a 4-bit layer, as `four_bit.quantize` names them.

        Raises ValueError if they are of another type or size.
        """
        tensors = {name.removeprefix("."): tensor for name, tensor in layer.items() if name}
        state: Any = QuantState.from_dict(tensors, torch.device("cpu"))
        found = (state.quant_type, state.nested, state.blocksize, tuple(state.shape))
        wanted = (self.quantization.type, self.quantization.double_quant, BLOCK, self.piece_shape)
        if found != wanted:
            raise ValueError(f"it has (type, double quantization, block, shape) {found}, not {wanted}")
        self.packed[expert].chunk(self.pieces)[piece].copy_(layer[""].reshape(-1))
        self.absmax[expert].chunk(self.pieces)[piece].copy_(state.absmax)
        if state.nested:
            self.outer_absmax[expert, piece].copy_(state.state2.absmax)
            self.offset[expert, piece].copy_(state.offset)

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The weights [end - first, rows, columns] of experts `first` to before `end`."""
        weights = (end - first) * self.shape[1] * self.shape[2]
        state = QuantState(
            absmax=self._constants(first, end).reshape(-1),
            # bitsandbytes' kernel for CPUs lets no block cross rows: it gives wrong values for rows of 32, for example.
            shape=torch.Size((weights // BLOCK, BLOCK)),
            code=self.code,
            blocksize=BLOCK,
            quant_type=self.quantization.type,
            dtype=torch.bfloat16,
        )
        dense = dequantize_4bit(self.packed[first:end].reshape(-1, 1), state)
        return cast("Tensor", dense.view(end - first, *self.shape[1:]).to(dtype))

    def _constants(self, first: int, end: int) -> Tensor:
        """float32 [experts, blocks]: what each block of 64 is multiplied with."""
        if not self.quantization.double_quant:
            return self.absmax[first:end]
        values = looked_up(self.outer_code, self.absmax[first:end]).view(end - first, self.pieces, -1)
        outer = self.outer_absmax[first:end].repeat_interleave(OUTER_BLOCK, dim=2)[..., : values.shape[2]]
        return values.mul_(outer).add_(self.offset[first:end, :, None]).reshape(end - first, -1)


def expert_stacks(model: nn.Module) -> Iterator[tuple[str, ExpertStack | Mxfp4Stack]]:
    """Name and stack of each weight of routed experts that is in 4-bit."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ExpertStack | Mxfp4Stack))
