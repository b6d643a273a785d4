"""A training step on CUDA tensors without data: shapes, types and operations are those of a GPU, and none is needed.

PyTorch's fake tensors say which device they are on, so autocast, the choice of kernels and transformers' own branches
go the way of a GPU. What they do not have is a backward pass: autograd's engine waits for a thread of the device, which
does not exist. `backward` and `gradients` therefore walk the graph in Python.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import varlen

from qlora_trainer.model.attention import RowBoundaries
from qlora_trainer.model.batch import Batch

AMPERE, HOPPER = (8, 0), (9, 0)
"""Compute capabilities."""
_GRAPH_TASK = 1
Edge = tuple[Any, int]
"""A node of the graph, and the number of one of its inputs."""


@contextmanager
def fake_cuda(capability: tuple[int, int] = AMPERE) -> Iterator[None]:
    """Tensors that are made here have no data; those on `cuda` are on a GPU of this compute capability."""
    # If autograd starts inside, it starts a thread for the GPU, and no fork of this process can train afterwards.
    torch.ones(1, requires_grad=True).sum().backward()
    stand_ins = (
        patch.object(torch.cuda, "get_device_capability", lambda _device=None: capability),
        patch.object(torch.cuda, "is_bf16_supported", lambda **_: True),
        patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        patch.object(torch.autograd, "grad", gradients),
        # Gradient checkpointing recomputes a block once for each backward pass, which it knows by its number.
        patch.object(torch._C, "_current_graph_task_id", lambda: _GRAPH_TASK),
    )
    with ExitStack() as stack:
        for stand_in in stand_ins:
            stack.enter_context(stand_in)
        _forget_capability()
        stack.callback(_forget_capability)
        stack.enter_context(FakeTensorMode())
        yield


def _forget_capability() -> None:
    varlen._cudnn_version_and_major_capability.cache_clear()
    varlen._should_use_cudnn.cache_clear()


def on_fake_cuda(model: nn.Module) -> None:
    """Put CUDA tensors without data in the place of all tensors of a loaded model, its 4-bit layers' too."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = _moved(parameter)
            module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else _like(buffer)
        if isinstance(module, Linear4bit):
            outer = module.quant_state
            for state in (outer, outer.state2):
                for name in ("absmax", "code", "offset"):
                    if getattr(state, name, None) is not None:
                        setattr(state, name, _like(getattr(state, name)))


def _moved(parameter: Tensor) -> nn.Parameter:
    new = nn.Parameter(_like(parameter), requires_grad=parameter.requires_grad)
    # Of a 4-bit weight: how it is quantized.
    new.__dict__.update(parameter.__dict__)
    return new


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def fake_batch(batch: Batch) -> Batch:
    """The batch on a GPU, without data."""
    rows = RowBoundaries(batch.rows.lengths, _like(batch.rows.offsets))
    names = ("input_ids", "position_ids", "predicting", "targets")
    return replace(batch, rows=rows, **{name: _like(getattr(batch, name)) for name in names})


def backward(output: Tensor) -> None:
    """`output.backward()` for a scalar, on tensors with or without data."""
    for node, (gradient, *_) in _walk(output, torch.ones_like(output)):
        if node.name() == "torch::autograd::AccumulateGrad" and gradient is not None:
            variable = node.variable
            variable.grad = gradient if variable.grad is None else variable.grad + gradient


def gradients(
    outputs: Tensor, inputs: Tensor | Sequence[Tensor], grad_outputs: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of one output, on tensors with or without data; None for an input that it does not use."""
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    edges: list[Edge] = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, wanted)]
    found: dict[Edge, Tensor | None] = {}
    for node, given in _walk(outputs, torch.ones_like(outputs) if grad_outputs is None else grad_outputs):
        found |= {(node, number): gradient for number, gradient in enumerate(given)}
    return tuple(found.get(edge) for edge in edges)


def nodes(output: Tensor) -> list[Any]:
    """The graph's nodes from which `output` was computed, each before those that it was computed from."""
    ordered, seen = [], set()
    stack = [(output.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            ordered.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((previous, False) for previous, _ in node.next_functions)
    return ordered[::-1]


@torch.no_grad()
def _run(node: Any, given: Sequence[Tensor | None]) -> Sequence[tuple[Edge, Tensor | None]]:
    """What a node makes of the gradients of its outputs, with the edges along which it goes."""
    edges = node.next_functions
    # The engine runs backward as the forward pass of a thread without autocast.
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        if not isinstance(node, BackwardCFunction):
            made = node(*given)
            return list(zip(edges, made if isinstance(made, tuple) else (made,), strict=True))
        # Whether a function wants zeros for outputs without a gradient cannot be read; one that does not ignores them.
        made = node.apply(
            *(
                torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if gradient is None else gradient
                for gradient, meta in zip(given, node._input_metadata, strict=True)
            )
        )
    # It returns something for every argument of its forward, and may return None for more; edges are of tensors only.
    results = made if isinstance(made, tuple) else (made,)
    of_tensors = [result for result, needed in zip(results, node.needs_input_grad, strict=False) if needed]
    return list(zip((edge for edge in edges if edge[0] is not None), of_tensors, strict=True))


def _walk(output: Tensor, gradient: Tensor) -> Iterator[tuple[Any, list[Tensor | None]]]:
    """Run the nodes in the engine's order; each is given, before it runs, with the gradients of its outputs."""
    arrived: dict[Edge, Tensor] = {(output.grad_fn, output.output_nr): gradient}
    for node in nodes(output):
        metadata = node._input_metadata
        given = [_fitted(arrived.pop((node, number), None), meta) for number, meta in enumerate(metadata)]
        if all(one is None for one in given):
            continue
        yield node, given
        if node.next_functions:
            for edge, made in _run(node, given):
                if made is not None and edge[0] is not None:
                    arrived[edge] = arrived[edge] + made if edge in arrived else made


def _fitted(gradient: Tensor | None, metadata: Any) -> Tensor | None:
    """The gradient in the shape and type of what it is the gradient of, as the engine makes it."""
    if gradient is None:
        return None
    if gradient.shape != tuple(metadata.shape):
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)
