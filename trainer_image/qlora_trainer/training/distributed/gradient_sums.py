"""Sums the gradients of a step over the ranks, in buckets, most of them while its last backward pass still runs.

DistributedDataParallel's reducer does so too. It sums in the gradients' own type, and a rank that runs out of memory in
the pass leaves the others waiting for the buckets that it has not reached. Here that rank starts them afterwards.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.distributed
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20
"""Bytes of the buckets for sums of gradients, as in DDP (arXiv 2006.15704)."""
# One is exchanged and one follows it. More would take memory while the pass has activations.
_AT_ONCE = 2
_BLOCK = re.compile(r"\.(\d+)\.")
Bucket = Sequence[Tensor]
Exchange = Callable[[], AbstractContextManager[None]]
"""Reports a lost rank as the failure of the exchange in its body."""


@dataclass
class GradientSums:
    """Sums of one step. Every rank calls `during_last_pass` and then `finish`, and starts all buckets in one order."""

    during: list[Bucket]
    """Those to start in the pass, the first one last."""
    after: list[Bucket]
    exchange: Exchange
    _running: deque[tuple[Bucket, Tensor, torch.distributed.Work]] = field(default_factory=deque)

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter], means: Tensor, exchange: Exchange, *, overlaps: bool) -> Self:
        """Divide the gradients of these parameters, by name, and the means, which are complete after the last pass.

        `overlaps`: whether to start sums in the pass, those of decoder blocks.
        """
        named = ((parameter, _BLOCK.search(name)) for name, parameter in parameters.items() if overlaps)
        blocks = {parameter: int(block[1]) for parameter, block in named if block is not None}
        others = [parameter for parameter in parameters.values() if parameter not in blocks]
        # The pass reaches the last block first. Gradients that a rank lacks do not change this order.
        during = list(_buckets(sorted(blocks, key=lambda parameter: blocks[parameter])))
        return cls(during, list(_buckets([means, *others])), exchange)

    @contextmanager
    def during_last_pass(self) -> Iterator[None]:
        """Start each bucket when the body's pass has computed its gradients, and those that it has not when it ends.

        A body that raises starts nothing more, as the process is about to end.
        """
        missing = {tensor for bucket in self.during for tensor in bucket}

        def start(parameter: Tensor) -> None:
            missing.discard(parameter)
            while self.during and missing.isdisjoint(self.during[-1]):
                self._start(self.during)

        hooks = [parameter.register_post_accumulate_grad_hook(start) for parameter in missing]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._complete(self.during)

    def finish(self) -> None:
        """Start the other buckets, and wait for their sums.

        Each gradient, and the rank's part of the means, is then the sum over the ranks, the same bits in each. A
        parameter without a gradient, in a rank that had no micro batch, counts as 0. Sums are in float32.
        """
        self._complete(self.after)

    def _complete(self, buckets: list[Bucket]) -> None:
        while buckets:
            self._start(buckets)
        while self._running:
            self._wait_for_first()

    def _start(self, buckets: list[Bucket]) -> None:
        """Start the sum of the last bucket, and remove it. One without memory for that stays."""
        if len(self._running) == _AT_ONCE:
            self._wait_for_first()
        with self.exchange(), torch.no_grad():
            flat = torch.cat([_gradient(tensor).flatten().float() for tensor in buckets[-1]])
            work = torch.distributed.all_reduce(flat, async_op=True)
        self._running.append((buckets.pop(), flat, work))

    def _wait_for_first(self) -> None:
        bucket, flat, work = self._running.popleft()
        with self.exchange(), torch.no_grad():
            # NCCL lets only the GPU wait.
            work.wait()
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                _gradient(tensor).copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[Bucket]:
    """Divide the tensors, in their order, into buckets of at most BUCKET_BYTES or one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + 4 * tensor.numel() > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += 4 * tensor.numel()
    if bucket:
        yield bucket


def _gradient(tensor: Tensor) -> Tensor:
    """Return a parameter's gradient, or the means themselves."""
    if not isinstance(tensor, nn.Parameter):
        return tensor
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad
