"""The training loss: cross-entropy of the labeled tokens, computed so that the full logits never exist."""

from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qlora_trainer.core import cpu
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.decoder import decoder_states


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the logits after its output layer; the identity for most."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """The transform that a model's configuration asks for (Granite divides, Cohere multiplies, Gemma 2 caps)."""
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


def batch_loss(model: Any, batch: Batch) -> Tensor:
    """Sum of the losses of a batch's targets, a float32 scalar. `model` is a causal language model of transformers."""
    states = decoder_states(model, batch.input_ids, batch.position_ids, batch.rows)[0]
    head, transform = model.get_output_embeddings(), LogitTransform.of(model.config)
    chunk_tokens = cpu.loss_chunk_tokens(states.device.type)
    return summed_loss(states[batch.predicting], batch.targets, head, transform, chunk_tokens)


def summed_loss(
    hidden: Tensor,
    targets: Tensor,
    head: torch.nn.Module,
    transform: LogitTransform,
    chunk_tokens: int,
) -> Tensor:
    """Sum of the negative log-likelihoods (natural log) of `targets`, a float32 scalar.

    `hidden` is [targets, hidden size]: the decoder's last states at the positions that predict a target. `head` gives
    their logits, a chunk at a time, which are never kept. The gradient of a frozen head's input is computed while they
    exist (Hsu et al. 2024, arXiv 2410.10989); for a head that is trained, backward recomputes each chunk's logits
    (Chen et al. 2016, arXiv 1604.06174). The caller divides by the number of targets of the whole optimizer step.
    """
    if not len(targets):
        return hidden.sum().float() * 0.0
    if not any(parameter.requires_grad for parameter in head.parameters()):
        return cast("Tensor", _FrozenHeadLoss.apply(hidden, targets, head, transform, chunk_tokens))
    losses = [
        checkpoint(_chunk_loss, part, part_targets, head, transform, use_reentrant=False, preserve_rng_state=False)
        for part, part_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(hidden: Tensor, targets: Tensor, head: torch.nn.Module, transform: LogitTransform) -> Tensor:
    return cross_entropy(transform(head(hidden)).float(), targets, reduction="sum")


class _FrozenHeadLoss(torch.autograd.Function):
    """The loss and, from the same logits, its gradient."""

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        targets: Tensor,
        head: torch.nn.Module,
        transform: LogitTransform,
        chunk_tokens: int,
    ) -> Tensor:
        needed = context.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needed else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(targets), chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            with torch.set_grad_enabled(needed):
                part = hidden[chunk].detach().requires_grad_(needed)
                logits = transform(head(part))
            # No operation of a head or a transform saves its result for backward; autograd would reject one that does.
            in_place = logits.detach()
            loss += _replace_by_gradient(in_place, targets[chunk])
            if gradient is not None:
                gradient[chunk] = torch.autograd.grad(logits, part, in_place)[0]
        context.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        return gradient * loss_gradient, None, None, None, None


def _replace_by_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy. The logits are overwritten with its gradient: softmax, less one at the target.

    Computed in float32, in the memory of a single copy of the logits. The largest logit is subtracted first: the
    exponential of more than 88 is no float32.
    """
    columns = targets.unsqueeze(1)
    values = logits.to(torch.float32, copy=True)
    values -= values.amax(dim=1, keepdim=True)
    of_targets = values.gather(1, columns)
    totals = values.exp_().sum(dim=1, keepdim=True)
    loss = (totals.log() - of_targets).sum()
    values /= totals
    values.scatter_add_(1, columns, values.new_full((), -1.0).expand_as(columns))
    logits.copy_(values)
    return loss
