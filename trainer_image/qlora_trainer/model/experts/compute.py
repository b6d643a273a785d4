"""Computes routed experts, in every family whose experts use transformers' interface for them.

The classes of these families differ only in whether they have a gate, biases, a norm behind each expert, or transposed
weights (`transformers.integrations.moe`). Here their frozen weights are dequantized in the forward pass and again in
the backward pass, and no result depends on the order of additions in a GPU's threads.

A GPU with a kernel for it multiplies all experts of a block together, and the host waits for no result. Elsewhere the
chosen experts are dequantized a few at a time and multiplied one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_api.gpus import GROUPED_MAJORS, has_room_for_groups
from qlora_api.memory.estimate import GIB
from qlora_trainer.model.experts.stack import Stack
from qlora_trainer.model.protocols import Network

EXPERTS = "qlora_experts"
"""Name of the implementation in transformers."""
DENSE_BYTES = 2**28
"""Dequantized weights that exist at a time, or one expert's if that is larger, where experts are multiplied apart."""
GROUPED_BYTES = 3 * 2**30
"""The most dequantized weights that are multiplied together. Most of today's mixtures have fewer in a weight."""
# The kernel reads 16 bytes at a time.
_GROUPED_MULTIPLE = 8
ExpertWeights: TypeAlias = Stack | Tensor
Groups: TypeAlias = tuple[int, ...] | Tensor
"""Rows of each expert or, to multiply all together, int32 [experts] on the device: the end of each expert's rows."""


def register_experts() -> None:
    """Register the implementation in transformers under its name."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_forward)


@dataclass(frozen=True)
class Routing:
    """The experts of each token, `choices` for each. A row is a token at an expert."""

    order: Tensor
    """int64 [rows]: for each row, sorted by expert, its place in [tokens, choices]."""
    inverse: Tensor
    """int64 [rows]: for each place its row."""
    experts: Tensor
    """int64 [rows]: the expert of each row."""
    groups: Groups
    choices: int

    @classmethod
    def from_choices(cls, chosen: Tensor, experts: int, *, together: bool) -> "Routing":
        """The routing of `chosen`, int64 [tokens, choices], to multiply all experts `together` or apart."""
        places = chosen.reshape(-1)
        sorted_experts, order = torch.sort(places, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        # `bincount` would wait for two of a GPU's results.
        numbers = torch.arange(experts, device=places.device)
        ends = torch.searchsorted(sorted_experts, numbers, right=True, out_int32=True)
        groups = ends if together else _counts(sorted_experts, ends)
        return cls(order, inverse, sorted_experts, groups, chosen.shape[1])


def _counts(sorted_experts: Tensor, ends: Tensor) -> tuple[int, ...]:
    """Rows of each expert. Waits for the GPU."""
    # Also without data, so that the wait is counted.
    ends = ends.cpu()
    if isinstance(sorted_experts, FakeTensor):
        # Without data. That as many experts as possible are hit takes the most memory: more are dequantized at a time.
        rows, more = divmod(len(sorted_experts), len(ends))
        return (rows + 1,) * more + (rows,) * (len(ends) - more)
    return tuple(end - start for start, end in pairwise([0, *ends.tolist()]))


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether a GPU multiplies groups of rows by one kernel, and has memory for all experts of a block."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.major in GROUPED_MAJORS and has_room_for_groups(properties.total_memory / GIB)


def _multiplies_together(weights: Sequence[ExpertWeights], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel takes these weights. Without it PyTorch's own loop waits for the GPU."""
    return (
        dtype == torch.bfloat16
        and all(width % _GROUPED_MULTIPLE == 0 for weight in weights for width in weight.shape[1:])
        and all(prod(weight.shape) * dtype.itemsize <= GROUPED_BYTES for weight in weights)
        and has_grouped_kernel(device)
    )


def _experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' weighted sum [tokens, hidden size].

    `hidden_states` is [tokens, hidden size], `top_k_index` and `top_k_weights` are [tokens, choices]. Gradients reach
    the first and the last of them.
    """
    inner_name, dtype = "gate_up_proj" if module.has_gate else "up_proj", _compute_dtype(hidden_states)
    weights = (getattr(module, inner_name), module.down_proj)
    together = _multiplies_together(weights, dtype, hidden_states.device)
    routing = Routing.from_choices(top_k_index, module.num_experts, together=together)
    rows = _Dispatched.apply(hidden_states.to(dtype), routing)
    inner = _project(module, inner_name, rows, routing)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _project(module, "down_proj", inner, routing)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    shares = _Permuted.apply(top_k_weights.reshape(-1), routing.order, routing.inverse)
    weighted = _Permuted.apply(output * shares.unsqueeze(1), routing.inverse, routing.order)
    summed = weighted.view(len(hidden_states), routing.choices, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _project(module: Any, name: str, rows: Tensor, routing: Routing) -> Tensor:
    """Each row multiplied by its expert's weight, [rows, output features]."""
    output = _Product.apply(rows.to(_compute_dtype(rows)), getattr(module, name), routing.groups, module.is_transposed)
    if module.has_bias:
        output = output + getattr(module, f"{name}_bias")[routing.experts].to(output.dtype)
    return output


class _Dispatched(torch.autograd.Function):
    """Tokens [tokens, features] as rows, with gradients added in order of choices."""

    @staticmethod
    def forward(context: Any, tokens: Tensor, routing: Routing) -> Tensor:
        context.routing = routing
        return tokens.index_select(0, routing.order // routing.choices)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        by_place = gradient.index_select(0, context.routing.inverse)
        return by_place.view(-1, context.routing.choices, gradient.shape[1]).sum(dim=1), None


class _Permuted(torch.autograd.Function):
    """Entries in another order. Autograd's own backward would add them atomically."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        context.inverse = inverse
        return tensor.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, context.inverse), None, None


class _Product(torch.autograd.Function):
    """Rows times their experts' frozen weights. Backward needs only these weights."""

    @staticmethod
    def forward(context: Any, rows: Tensor, weights: ExpertWeights, groups: Groups, transposed: bool) -> Tensor:
        context.weights, context.groups, context.transposed = weights, groups, transposed
        return _multiply(rows, weights, groups, transposed=transposed)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        product = _multiply(gradient, context.weights, context.groups, transposed=not context.transposed)
        return product, None, None, None


def _multiply(rows: Tensor, weights: ExpertWeights, groups: Groups, *, transposed: bool) -> Tensor:
    """Multiply rows [rows, in], sorted by expert, by weights [out, in] or [in, out]."""
    experts, *shape = weights.shape
    if isinstance(groups, Tensor):
        dense = _dense(weights, 0, experts, rows.dtype)
        return grouped_mm(rows.contiguous(), dense if transposed else dense.mT, offs=groups)
    output = rows.new_empty(len(rows), shape[1] if transposed else shape[0])
    parts, outputs = rows.split(groups), output.split(groups)
    for first, end in _runs(groups, shape[0] * shape[1] * rows.element_size()):
        dense = _dense(weights, first, end, rows.dtype)
        for expert, matrix in enumerate(dense if transposed else dense.mT, first):
            torch.mm(parts[expert], matrix, out=outputs[expert])
        # The next experts are dequantized when these are gone.
        del dense, matrix
    return output


def _dense(weights: ExpertWeights, first: int, end: int, dtype: torch.dtype) -> Tensor:
    return weights[first:end].to(dtype) if isinstance(weights, Tensor) else weights.dense(first, end, dtype)


def _runs(counts: Sequence[int], expert_bytes: int) -> Iterator[tuple[int, int]]:
    """First and end of neighboring experts with rows, to be dequantized together."""
    most = max(1, DENSE_BYTES // expert_bytes)
    first = 0
    while first < len(counts):
        end = first
        while end < len(counts) and counts[end] and end - first < most:
            end += 1
        if end > first:
            yield first, end
        first = max(end, first + 1)


def expert_modules(model: Network) -> Iterator[tuple[str, Any]]:
    """Name and module of each collection of experts with transformers' interface."""
    for name, module in model.named_modules():
        if all(hasattr(module, mark) for mark in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")):
            yield name, module
