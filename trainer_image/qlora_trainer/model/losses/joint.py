"""Computes the losses of several adapters on one base in one forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qlora_trainer.core import cpu
from qlora_trainer.model.architecture.decoder import decoder_states
from qlora_trainer.model.kernels.attention import RowBoundaries
from qlora_trainer.model.kernels.fused_lora import Segment, routing_of
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import LogitTransform, summed_loss
from qlora_trainer.model.protocols import AdaptedModel


@contextmanager
def route(model: AdaptedModel, batches: Mapping[str, Batch]) -> Iterator[None]:
    """In the body, forward passes are `joint_losses` of these batches, by the names of their adapters.

    Their backward passes have to be in it too: gradient checkpointing computes the blocks again. `require_apart` checks
    that the model's layers match tokens with adapters.
    """
    routing = routing_of(model)
    offsets = list(accumulate((batch.tokens for batch in batches.values()), initial=0))
    routing.tokens = offsets[-1] + cpu.padding(offsets[-1], model.device.type)
    routing.segments = tuple(
        Segment(name, start, start + batch.tokens)
        for (name, batch), start in zip(batches.items(), offsets, strict=False)
    )
    try:
        yield
    finally:
        routing.clear()


def joint_losses(model: AdaptedModel, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
    """For each adapter the summed loss of its batch's targets, a float32 scalar. Call it inside `route`.

    The base computes the tokens of all together, and each adapter those of its batch. Raises ModelError for layers that
    are given other tokens.
    """
    base = model.get_base_model()
    batch = _join(tuple(batches.values()))
    states = decoder_states(base, batch.input_ids, batch.position_ids, batch.rows)[0]
    positions = batch.predicting.split([part.target_count for part in batches.values()])
    head, transform = cast("nn.Module", base.get_output_embeddings()), LogitTransform.from_config(base.config)
    chunk_tokens = cpu.loss_chunk_tokens(states.device.type)
    return {
        name: summed_loss(states[predicting], part.targets, head, transform, chunk_tokens)
        for (name, part), predicting in zip(batches.items(), positions, strict=True)
    }


def _join(batches: tuple[Batch, ...]) -> Batch:
    """The batches one after the other. Padding follows the last only."""
    device = batches[0].input_ids.device
    offsets = list(accumulate((batch.tokens for batch in batches), initial=0))
    padding = cpu.padding(offsets[-1], device.type)
    lengths = tuple(
        length
        for batch in batches
        for length in batch.rows.lengths[: -1 if batch.tokens < batch.input_ids.shape[1] else None]
    )
    rows = RowBoundaries.from_lengths((*lengths, padding) if padding else lengths, device)
    predicting = [batch.predicting + offset for batch, offset in zip(batches, offsets, strict=False)]
    return Batch(
        pad(torch.cat([batch.input_ids[:, : batch.tokens] for batch in batches], dim=1), (0, padding)),
        rows.position_ids().to(device, non_blocking=True),
        rows,
        torch.cat(predicting),
        torch.cat([batch.targets for batch in batches]),
        offsets[-1],
    )
