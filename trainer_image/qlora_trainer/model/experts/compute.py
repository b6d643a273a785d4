"""Computes routed experts, in every family whose experts use transformers' interface for them.

The classes of these families differ only in whether they have a gate, biases, a norm behind each expert, or transposed
weights (`transformers.integrations.moe`). Here their frozen weights are dequantized a few at a time, in the forward
pass and again in the backward pass, and no result depends on the order of additions in a GPU's threads.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlora_trainer.model.experts.stack import Stack
from qlora_trainer.model.protocols import Network

EXPERTS = "qlora_experts"
"""Name of the implementation in transformers."""
DENSE_BYTES = 2**28
"""Dequantized weights that exist at a time, or one expert's if that is larger."""
ExpertWeights: TypeAlias = Stack | Tensor


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
    counts: tuple[int, ...]
    """Rows of each expert."""
    choices: int

    @classmethod
    def from_choices(cls, chosen: Tensor, experts: int) -> "Routing":
        """The routing of `chosen`, int64 [tokens, choices]."""
        places = chosen.reshape(-1)
        sorted_experts, order = torch.sort(places, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return cls(order, inverse, sorted_experts, _counts(sorted_experts, experts), chosen.shape[1])


def _counts(sorted_experts: Tensor, experts: int) -> tuple[int, ...]:
    """Count the rows of each expert. A GPU is waited for once: `bincount` would wait for two more of its results."""
    if isinstance(sorted_experts, FakeTensor):
        # Without data. That as many experts as possible are hit takes the most memory: more are dequantized at a time.
        rows, more = divmod(len(sorted_experts), experts)
        return (rows + 1,) * more + (rows,) * (experts - more)
    numbers = torch.arange(experts, device=sorted_experts.device)
    ends = torch.searchsorted(sorted_experts, numbers, right=True).tolist()
    return tuple(end - start for start, end in pairwise([0, *ends]))


def _experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' weighted sum [tokens, hidden size].

    `hidden_states` is [tokens, hidden size], `top_k_index` and `top_k_weights` are [tokens, choices]. Gradients reach
    the first and the last of them.
    """
    routing = Routing.from_choices(top_k_index, module.num_experts)
    inner_name = "gate_up_proj" if module.has_gate else "up_proj"
    rows = _Dispatched.apply(hidden_states.to(_compute_dtype(hidden_states)), routing)
    inner = _project(module, inner_name, rows, routing)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _project(module, "down_proj", inner, routing)
    if module.has_post_expert_norm:
        output = module.post_expert_norm(output)
    weights = _Permuted.apply(top_k_weights.reshape(-1), routing.order, routing.inverse)
    weighted = _Permuted.apply(output * weights.unsqueeze(1), routing.inverse, routing.order)
    summed = weighted.view(len(hidden_states), routing.choices, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _project(module: Any, name: str, rows: Tensor, routing: Routing) -> Tensor:
    """Each row multiplied by its expert's weight, [rows, output features]."""
    output = _Product.apply(rows.to(_compute_dtype(rows)), getattr(module, name), routing.counts, module.is_transposed)
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
    def forward(
        context: Any, rows: Tensor, weights: ExpertWeights, counts: tuple[int, ...], transposed: bool
    ) -> Tensor:
        context.weights, context.counts, context.transposed = weights, counts, transposed
        return _multiply(rows, weights, counts, transposed=transposed)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        product = _multiply(gradient, context.weights, context.counts, transposed=not context.transposed)
        return product, None, None, None


def _multiply(rows: Tensor, weights: ExpertWeights, counts: Sequence[int], *, transposed: bool) -> Tensor:
    """Multiply rows [rows, in], sorted by expert, by weights [out, in] or [in, out]."""
    _, *shape = weights.shape
    output, dtype = rows.new_empty(len(rows), shape[1] if transposed else shape[0]), rows.dtype
    parts, outputs = rows.split(counts), output.split(counts)
    for first, end in _runs(counts, shape[0] * shape[1] * rows.element_size()):
        dense = weights[first:end].to(dtype) if isinstance(weights, Tensor) else weights.dense(first, end, dtype)
        for expert, matrix in enumerate(dense if transposed else dense.mT, first):
            torch.mm(parts[expert], matrix, out=outputs[expert])
        # The next experts are dequantized when these are gone.
        del dense, matrix
    return output


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
