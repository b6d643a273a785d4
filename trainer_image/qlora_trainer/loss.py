"""The training loss: cross-entropy of the labelled tokens, computed so that the full logits never exist."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from qlora_trainer.batches import Batch

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at the same time; the memory estimate counts on it."""


@dataclass(frozen=True)
class LogitTransform:
    """What a family does to the logits after its output layer; the identity for most."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Self:
        """The transform that a model's configuration asks for (Granite divides, Cohere multiplies, Gemma 2 caps)."""
        multiplier = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(multiplier / divisor, getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits as the model would return them."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def batch_loss(model: Any, batch: Batch) -> Tensor:
    """Sum of the losses of a batch's targets, a float32 scalar. `model` is a causal language model of transformers."""
    states = model.get_decoder()(
        input_ids=batch.input_ids, position_ids=batch.position_ids, rows=batch.rows, use_cache=False
    ).last_hidden_state[0]
    head, transform = model.get_output_embeddings(), LogitTransform.of(model.config)
    return summed_loss(states[batch.predicting], batch.targets, head, transform)


def summed_loss(
    hidden: Tensor,
    targets: Tensor,
    head: torch.nn.Module,
    transform: LogitTransform,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Sum of the negative log-likelihoods (natural log) of `targets`, a float32 scalar.

    `hidden` is [targets, hidden size]: the decoder's last states at the positions that predict a target. `head` gives
    their logits, a chunk at a time; backward computes each chunk's logits again instead of keeping them (Chen et al.
    2016, arXiv 1604.06174). The caller divides by the number of targets of the whole optimizer step.
    """
    if not len(targets):
        return hidden.sum().float() * 0.0
    losses = [
        checkpoint(_chunk_loss, part, part_targets, head, transform, use_reentrant=False, preserve_rng_state=False)
        for part, part_targets in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    return torch.stack(losses).sum()


def _chunk_loss(hidden: Tensor, targets: Tensor, head: torch.nn.Module, transform: LogitTransform) -> Tensor:
    return cross_entropy(transform(head(hidden)).float(), targets, reduction="sum")
