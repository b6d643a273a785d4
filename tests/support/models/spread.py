"""A rank of two that compares spread embeddings and a spread output layer with whole ones."""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from qlora_trainer.model.architecture.vocabulary import spread_vocabulary
from qlora_trainer.model.losses.loss import LogitTransform, summed_loss, target_losses
from tests.support.models.sequences import CPU

RANKS = 2
CHUNK_TOKENS = 8
TOKENS = (13, 21)
"""Of each rank."""


def compare(config: PretrainedConfig, counts: tuple[int, int], store: Path, rank: int) -> None:
    """Compare as the rank, which has so many of `counts` targets, a model in float32. Raises AssertionError."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    file = torch.distributed.FileStore(str(store), RANKS)
    torch.distributed.init_process_group("gloo", store=file, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    if (bias := whole.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    spread = deepcopy(whole)
    outside = {weight.data_ptr(): weight.nbytes for weight in outer_weights(whole)}

    own, all_of_it = spread_vocabulary(spread, rank, RANKS, CPU)

    assert all_of_it == sum(outside.values())
    assert abs(own - all_of_it / RANKS) <= all_of_it / len(whole.get_output_embeddings().weight)
    held = {weight.data_ptr(): weight.nbytes for weight in outer_weights(spread)}
    assert sum(held.values()) == own
    torch.manual_seed(rank)
    tokens = torch.randint(config.vocab_size, (1, TOKENS[rank]))
    states = whole.get_input_embeddings()(tokens)
    assert torch.equal(spread.get_input_embeddings()(tokens), states)
    hidden, targets = states[0, : counts[rank]], torch.randint(config.vocab_size, (counts[rank],))
    transform = LogitTransform.from_config(config)
    for loss in (summed_loss, target_losses):
        expected = _loss_and_gradient(loss, hidden, targets, whole.get_output_embeddings(), transform)
        found = _loss_and_gradient(loss, hidden, targets, spread.get_output_embeddings(), transform)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        found = summed_loss(hidden, targets, spread.get_output_embeddings(), transform, CHUNK_TOKENS)
        torch.testing.assert_close(
            found, summed_loss(hidden, targets, whole.get_output_embeddings(), transform, CHUNK_TOKENS)
        )


def outer_weights(model: Any) -> list[Tensor]:
    """The weights of the embeddings and of the output layer."""
    outside = (model.get_input_embeddings(), model.get_output_embeddings())
    return [weight for module in outside for name, weight in module.named_parameters() if name.endswith("weight")]


def _loss_and_gradient(
    loss: Any, hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    leaf = hidden.clone().requires_grad_()
    losses = loss(leaf, targets, head, transform, CHUNK_TOKENS)
    # With another weight for each target, as of a preference.
    (losses.sum() if losses.ndim == 0 else losses @ torch.arange(1.0, len(targets) + 1)).backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad
