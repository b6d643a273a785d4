"""Computes a model in float32 whose weights stay in 16 bit, mapped from its files."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.protocols import Decoder


def compute_in_float32(model: Decoder) -> None:
    """Convert the weights of each block, and of each module outside of them, while it runs.

    The largest of these takes 4 bytes per weight.
    """
    blocks = decoder_blocks(model)
    inside = {id(module) for module in blocks.modules()}
    for block in blocks:
        # Whole: a module may read the weights of another one in its block.
        _convert_while_running(block, (*block.parameters(), *block.buffers()))
    for module in model.modules():
        if id(module) not in inside:
            _convert_while_running(module, (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _convert_while_running(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    narrow = [(tensor, tensor.data) for tensor in tensors if tensor.dtype == torch.bfloat16]

    def widen(*_: object) -> None:
        for tensor, data in narrow:
            tensor.data = data.float()

    def restore(*_: object) -> None:
        for tensor, data in narrow:
            tensor.data = data

    if narrow:
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(restore)
