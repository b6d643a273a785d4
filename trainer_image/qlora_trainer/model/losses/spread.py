"""The losses under an output layer that is spread over the ranks. Each computes its logits for the tokens of all."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from qlora_trainer.model.architecture.vocabulary import SpreadHead, VocabularyPart


def spread_chunk_losses(
    hidden: Tensor,
    targets: Tensor,
    head: SpreadHead,
    transform: Callable[[Tensor], Tensor],
    chunk: slice,
    gradient: Tensor | None,
) -> Tensor:
    """Return each target's loss, float32 [chunk, 1], and set its part of `gradient`.

    The chunk has the same size in every rank, and may exceed a rank's targets.
    """
    part, size, own = head.part, chunk.stop - chunk.start, len(targets[chunk])
    needed = gradient is not None
    with torch.no_grad():
        raw = head(part.gather(hidden[chunk].detach(), size))
    with torch.set_grad_enabled(needed):
        logits = transform(raw.requires_grad_(needed))
    in_place = logits.detach()
    losses = _replace_by_gradient(in_place, part.gather(targets[chunk], size), part)
    if gradient is not None:
        raw_gradient = torch.autograd.grad(logits, raw, in_place)[0]
        gradient[chunk] = part.return_sums(_matmul_in_float32(raw_gradient, head.weight))[:own]
    return losses[part.rank * size :][:own]


def _replace_by_gradient(logits: Tensor, targets: Tensor, part: VocabularyPart) -> Tensor:
    """Cross-entropy of each target, float32 [targets, 1]. This part's logits become its gradient.

    As for a whole output layer, with the largest logit and both sums exchanged.
    """
    columns, elsewhere = part.local(targets.unsqueeze(1))
    values = logits.to(torch.float32, copy=True)
    largest = values.amax(dim=1, keepdim=True)
    torch.distributed.all_reduce(largest, ReduceOp.MAX)
    values -= largest
    of_targets = values.gather(1, columns).masked_fill_(elsewhere, 0.0)
    totals = values.exp_().sum(dim=1, keepdim=True)
    sums = torch.stack([of_targets, totals])
    torch.distributed.all_reduce(sums)
    of_targets, totals = sums
    values /= totals
    values.scatter_add_(1, columns, elsewhere.float() - 1.0)
    logits.copy_(values)
    return totals.log() - of_targets


def _matmul_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product of matrices in 16 bit: the sum over the ranks is rounded, not each part of it."""
    right = right.to(left.dtype)
    with torch.autocast(left.device.type, enabled=False):
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
