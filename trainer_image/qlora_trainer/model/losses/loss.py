"""The training loss: cross-entropy of labeled tokens, without full logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig

from qlora_trainer.core import cpu
from qlora_trainer.model.architecture.decoder import decoder_states
from qlora_trainer.model.architecture.vocabulary import SpreadHead, largest
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.spread import spread_chunk_losses
from qlora_trainer.model.protocols import Decoder


@dataclass(frozen=True)
class LogitTransform:
    """A family's change of the logits after its output layer, mostly the identity."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> Self:
        """The configuration's transform: Granite divides, Cohere multiplies, Gemma 2 caps."""
        text = config.get_text_config(decoder=True)
        multiplier = getattr(text, "logit_scale", None) or 1.0
        divisor = getattr(text, "logits_scaling", None) or 1.0
        return cls(multiplier / divisor, getattr(text, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits as the model would return them."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def batch_loss(model: Decoder, batch: Batch) -> Tensor:
    """Sum of a batch's target losses, a float32 scalar, of a causal language model."""
    return summed_loss(*_of_targets(model, batch))


def row_losses(model: Decoder, batch: Batch) -> Tensor:
    """float32 [rows]: the sum of the losses of each row's targets, for a batch of pairs.

    It is the negative logarithm of the likelihood that the model gives to the row's targets.
    """
    if batch.pairs is None:
        raise AssertionError("a job whose objective compares answers has rows that are pairs")
    losses = target_losses(*_of_targets(model, batch))
    return torch.stack([row.sum() for row in losses.split(batch.pairs.target_counts)])


def _of_targets(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor, nn.Module, LogitTransform, int]:
    """The arguments of `summed_loss` and `target_losses`."""
    states = decoder_states(model, batch.input_ids, batch.position_ids, batch.rows)[0]
    head, transform = cast("nn.Module", model.get_output_embeddings()), LogitTransform.from_config(model.config)
    return states[batch.predicting], batch.targets, head, transform, cpu.loss_chunk_tokens(states.device.type)


def summed_loss(
    hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, chunk_tokens: int
) -> Tensor:
    """Sum of the negative log-likelihoods (natural log) of `targets`, a float32 scalar.

    `hidden` is [targets, hidden size]: the decoder's last states at the positions that predict a target. `head` gives
    their logits, a chunk at a time, which are never kept. The gradient of a frozen head's input is computed while they
    exist (Hsu et al. 2024, arXiv 2410.10989); for a head that is trained, backward recomputes each chunk's logits
    (Chen et al. 2016, arXiv 1604.06174). The caller divides by the number of targets of the whole optimizer step.
    """
    if not len(targets) and not isinstance(head, SpreadHead):
        return hidden.sum().float() * 0.0
    if _is_frozen(head):
        return _FrozenHeadLoss.apply(hidden, targets, head, transform, chunk_tokens)
    return torch.stack(_trained_head_losses(hidden, targets, head, transform, chunk_tokens, "sum")).sum()


def target_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, chunk_tokens: int
) -> Tensor:
    """float32 [targets]: the negative log-likelihood of each of `targets`, computed like `summed_loss`.

    The losses may count with any weights, which need not be known before backward: what is kept from the forward pass
    is the gradient of each loss by its state, [targets, hidden size] in the states' type, as for the sum.
    """
    if not len(targets) and not isinstance(head, SpreadHead):
        return hidden.sum(dim=-1).float() * 0.0
    if _is_frozen(head):
        return _FrozenHeadLosses.apply(hidden, targets, head, transform, chunk_tokens)
    return torch.cat(_trained_head_losses(hidden, targets, head, transform, chunk_tokens, "none"))


def _is_frozen(head: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in head.parameters())


def _trained_head_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, chunk_tokens: int, reduction: str
) -> list[Tensor]:
    """The losses of each chunk, whose logits backward computes again."""

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(transform(head(hidden)).float(), targets, reduction=reduction)

    return [
        checkpoint(chunk_loss, part, part_targets, use_reentrant=False, preserve_rng_state=False)
        for part, part_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and, from the same logits, its gradient."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, chunk_tokens: int
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(len(targets), head, chunk_tokens):
            loss += _chunk_losses(hidden, targets, head, transform, chunk, gradient).sum()
        context.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * loss_gradient, None, None, None, None


class _FrozenHeadLosses(torch.autograd.Function):
    """The loss of each target and, from the same logits, its gradient."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, chunk_tokens: int
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(len(targets), head, chunk_tokens):
            losses[chunk] = _chunk_losses(hidden, targets, head, transform, chunk, gradient).squeeze(1)
        context.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(context: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        # Multiplied in float32, but never there as a whole in it.
        return torch.mul(gradient, weights.unsqueeze(1), out=torch.empty_like(gradient)), None, None, None, None


def _chunks(targets: int, head: nn.Module, chunk_tokens: int) -> Iterator[slice]:
    """The chunks of so many targets. With a spread head they are as many in each rank, and computed together."""
    if isinstance(head, SpreadHead):
        targets, chunk_tokens = largest(targets), max(1, chunk_tokens // head.part.ranks)
    for first in range(0, targets, chunk_tokens):
        yield slice(first, min(first + chunk_tokens, targets))


def _chunk_losses(
    hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform, chunk: slice, gradient: Tensor | None
) -> Tensor:
    """Return each target's loss, float32 [chunk, 1], and set its part of `gradient`."""
    if isinstance(head, SpreadHead):
        return spread_chunk_losses(hidden, targets, head, transform, chunk, gradient)
    needed = gradient is not None
    with torch.set_grad_enabled(needed):
        part = hidden[chunk].detach().requires_grad_(needed)
        logits = transform(head(part))
    # No operation of a head or a transform saves its result for backward; autograd would reject one that does.
    in_place = logits.detach()
    losses = _replace_by_gradient(in_place, targets[chunk])
    if gradient is not None:
        gradient[chunk] = torch.autograd.grad(logits, part, in_place)[0]
    return losses


def _replace_by_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target, float32 [targets, 1]. The logits become its gradient: softmax, less 1 at it.

    Computed in float32, in the memory of a single copy of the logits. The largest logit is subtracted first: the
    exponential of more than 88 is no float32.
    """
    columns = targets.unsqueeze(1)
    values = logits.to(torch.float32, copy=True)
    values -= values.amax(dim=1, keepdim=True)
    of_targets = values.gather(1, columns)
    totals = values.exp_().sum(dim=1, keepdim=True)
    losses = totals.log() - of_targets
    values /= totals
    values.scatter_add_(1, columns, values.new_full((), -1.0).expand_as(columns))
    logits.copy_(values)
    return losses
