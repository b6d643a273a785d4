"""CUDA tensors without data: shapes, types and operations are those of a GPU, and none is needed.

PyTorch's fake tensors report a device, so autocast, the choice of kernels and transformers' own branches
go the way of a GPU. They have no backward pass: that is `backward`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from torch.nn.functional import pad

from qlora_trainer.model.experts import compute
from qlora_trainer.model.kernels import attention
from qlora_trainer.model.kernels.attention import RowBoundaries
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.memory.backward import gradients
from qlora_trainer.model.protocols import Network

AMPERE, HOPPER = (8, 0), (9, 0)
"""Compute capabilities."""
_LARGEST_FLASH_HEAD = 256
_GRAPH_TASK = 1


@contextmanager
def fake_cuda(capability: tuple[int, int] = AMPERE, *, groups_experts: bool = False) -> Iterator[None]:
    """Create tensors without data. Those on `cuda` have this compute capability.

    `groups_experts`: whether the GPU has the kernel for all experts of a block, and the memory.
    """
    stand_ins: tuple[tuple[object, str, object], ...] = (
        (torch.cuda, "get_device_capability", lambda _device=None: capability),
        (compute, "has_grouped_kernel", lambda _device: groups_experts),
        (torch.cuda, "is_bf16_supported", lambda **_: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.autograd, "grad", gradients),
        # Gradient checkpointing recomputes a block once for each backward pass, identified by its number.
        (attention, "scaled_dot_product_attention", _fused_attention),
        (torch.nn.functional, "scaled_dot_product_attention", _fused_attention),
        (torch._C, "_current_graph_task_id", lambda: _GRAPH_TASK),
    )
    with ExitStack() as stack:
        for module, name, stand_in in stand_ins:
            stack.enter_context(_replace(module, name, stand_in))
        _clear_capability()
        stack.callback(_clear_capability)
        stack.enter_context(FakeTensorMode())
        yield


@contextmanager
def _replace(module: object, name: str, stand_in: object) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, original)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` with a GPU's kernel: PyTorch asks the GPU, and there is none.

    Without it PyTorch would keep all scores, in 32 bit. As with PyTorch's own, autocast chooses the type.
    """
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (query, key, value))
    size = query.shape[-1]
    if attn_mask is None and size == value.shape[-1] <= _LARGEST_FLASH_HEAD:
        # As PyTorch does: FlashAttention takes heads of eight and its multiples.
        parts = (pad(tensor, (0, -size % 8)) if size % 8 else tensor for tensor in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        padded: Tensor = flash(*parts, dropout_p, is_causal, scale=size**-0.5 if scale is None else scale)[0]
        return padded[..., :size]
    if enable_gqa:
        raise ValueError("the memory-efficient kernel takes as many heads of keys as of queries")
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype)
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(bias).masked_fill_(~attn_mask, -torch.inf)
        bias = bias.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output: Tensor = efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    return output


def _clear_capability() -> None:
    varlen._cudnn_version_and_major_capability.cache_clear()
    varlen._should_use_cudnn.cache_clear()


def on_fake_cuda(model: Network) -> None:
    """Replace a model's tensors, also of 4-bit layers, by CUDA ones without data."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
                # Of a 4-bit weight: how it is quantized.
                moved[id(parameter)].__dict__.update(parameter.__dict__)
            module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _like(buffer)
        if isinstance(module, Linear4bit):
            for state, name in product((module.quant_state, module.quant_state.state2), ("absmax", "code", "offset")):
                tensor = getattr(state, name, None)
                if tensor is not None:
                    setattr(state, name, _like(tensor))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def fake_batch(batch: Batch) -> Batch:
    """The batch on a GPU, without data."""
    rows = RowBoundaries(batch.rows.lengths, _like(batch.rows.offsets))
    return Batch(
        _like(batch.input_ids),
        _like(batch.position_ids),
        rows,
        _like(batch.predicting),
        _like(batch.targets),
        batch.tokens,
        batch.pairs,
    )
