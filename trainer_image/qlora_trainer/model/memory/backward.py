"""Walks autograd's graph in Python, for tensors on a device that does not exist.

Autograd's engine waits for a thread of the device. The walk runs the same nodes in the engine's order and, like it,
frees what a node has saved as soon as the node has run.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

Node: TypeAlias = Any
"""A `torch.autograd.graph.Node`, of which PyTorch declares only a part."""
Edge: TypeAlias = tuple[Node, int]
"""A node of the graph, and the number of one of its inputs."""
_ACCUMULATES = "torch::autograd::AccumulateGrad"


def backward(output: Tensor) -> None:
    """Do `output.backward()` for a scalar, also without data, and free its graph."""
    # Not the root itself: a reference to it keeps the whole graph.
    roots: list[Edge] = [(output.grad_fn, output.output_nr)]
    gradient = torch.ones_like(output)
    output.detach_()
    for node, given in _walk(roots, gradient):
        if node.name() == _ACCUMULATES and given[0] is not None:
            with torch.no_grad():
                node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad.add_(given[0])
        del node, given


def gradients(
    outputs: Tensor, inputs: Tensor | Sequence[Tensor], grad_outputs: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of one output, on tensors with or without data.

    None for an input that it does not use.
    """
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    edges: list[Edge] = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, wanted)]
    found: dict[Edge, Tensor | None] = {}
    gradient = torch.ones_like(outputs) if grad_outputs is None else grad_outputs
    for node, given in _walk([(outputs.grad_fn, outputs.output_nr)], gradient):
        arrived = {(node, number): one for number, one in enumerate(given)}
        found |= {edge: arrived[edge] for edge in edges if edge in arrived}
    return tuple(found.get(edge) for edge in edges)


def nodes(output: Tensor) -> list[Node]:
    """The nodes of the graph that computed `output`, each once."""
    return [output.grad_fn, *_consumers(output.grad_fn)]


@torch.no_grad()
def _run(node: Node, given: Sequence[Tensor | None]) -> Sequence[tuple[Edge, Tensor | None]]:
    """A node's gradients for those of its outputs, with the edges they follow."""
    edges = node.next_functions
    # The engine runs backward as the forward pass of a thread without autocast.
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        if not isinstance(node, BackwardCFunction):
            made = node(*given)
            return list(zip(edges, made if isinstance(made, tuple) else (made,), strict=True))
        # Whether a function wants zeros for outputs without a gradient cannot be read; one that does not ignores them.
        function: Node = node
        made = function.apply(
            *(
                torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if gradient is None else gradient
                for gradient, meta in zip(given, function._input_metadata, strict=True)
            )
        )
    # It returns a result for every argument of its forward, and may return None for more; edges are of tensors only.
    results = made if isinstance(made, tuple) else (made,)
    of_tensors = [result for result, needed in zip(results, node.needs_input_grad, strict=False) if needed]
    return list(zip((edge for edge in edges if edge[0] is not None), of_tensors, strict=True))


def _walk(roots: list[Edge], gradient: Tensor) -> Iterator[tuple[Node, list[Tensor | None]]]:
    """Run the nodes in the engine's order. Yields each, before it runs, with the gradients of its outputs.

    Takes the only root out of `roots`: a node, and what it has saved, lives until it has run, unless the caller has
    another reference to it.
    """
    root, number = roots.pop()
    arrived: dict[Node, dict[int, Tensor]] = {root: {number: gradient}}
    waiting = _consumers(root)
    order, ready = count(), [(0, 0, root)]
    del root, gradient
    while ready:
        node = heapq.heappop(ready)[2]
        came = arrived.pop(node, {})
        given = [_fit(came.pop(number, None), meta) for number, meta in enumerate(node._input_metadata)]
        edges = node.next_functions
        reached = any(one is not None for one in given)
        if reached:
            yield node, given
        made = _run(node, given) if reached and edges else []
        del given, came
        _add(arrived, made)
        del node, made
        _push_ready(ready, edges, waiting, order)


def _push_ready(
    ready: list[tuple[int, int, Node]], edges: Sequence[Edge], waiting: Counter[Node], order: Iterator[int]
) -> None:
    """Push the nodes that only waited for a node with these edges."""
    for node, _ in edges:
        if node is not None:
            waiting[node] -= 1
            if not waiting[node]:
                del waiting[node]
                # The engine runs the newest node first, but accumulates gradients as soon as they exist.
                last_first = -(2**63) if node.name() == _ACCUMULATES else -node._sequence_nr()
                heapq.heappush(ready, (last_first, next(order), node))


def _add(arrived: dict[Node, dict[int, Tensor]], made: Sequence[tuple[Edge, Tensor | None]]) -> None:
    """Add gradients to those that have come along other edges."""
    for (node, number), gradient in made:
        if gradient is not None and node is not None:
            sums = arrived.setdefault(node, {})
            sums[number] = sums[number] + gradient if number in sums else gradient


def _consumers(root: Node) -> Counter[Node]:
    """Number of edges to each node behind `root`."""
    counted: Counter[Node] = Counter()
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                if node not in counted:
                    stack.append(node)
                counted[node] += 1
    return counted


def _fit(gradient: Tensor | None, metadata: Node) -> Tensor | None:
    """The gradient in the shape and type of its tensor, as the engine makes it."""
    if gradient is None:
        return None
    if gradient.shape != tuple(metadata.shape):
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)
