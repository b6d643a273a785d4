"""The losses of several adapters on one base, each with rows of its own, from one forward pass."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import pad

from qlora_trainer.core import cpu
from qlora_trainer.model.attention import RowBoundaries
from qlora_trainer.model.batch import Batch
from qlora_trainer.model.decoder import decoder_states
from qlora_trainer.model.fused_lora import FusedLora, Routing, Segment
from qlora_trainer.model.loss import LogitTransform, summed_loss


@contextmanager
def joint_losses(model: PeftModel, batches: Mapping[str, Batch]) -> Iterator[dict[str, Tensor]]:
    """For each adapter the summed loss of its batch's targets, a float32 scalar, for the backward pass in the body.

    The base computes all tokens at once, and each adapter its own. The backward pass has to be inside: gradient
    checkpointing computes the blocks again. Raises ModelError for a model whose layers cannot tell whose a token is.
    """
    base: Any = model.get_base_model()
    batch = joined(tuple(batches.values()))
    routing = _routing(base)
    offsets = accumulate((part.tokens for part in batches.values()), initial=0)
    routing.tokens = batch.input_ids.shape[1]
    routing.segments = tuple(
        Segment(name, start, start + part.tokens) for (name, part), start in zip(batches.items(), offsets, strict=False)
    )
    try:
        states = decoder_states(base, batch.input_ids, batch.position_ids, batch.rows)[0]
        counts = [part.target_count for part in batches.values()]
        head, transform = base.get_output_embeddings(), LogitTransform.of(base.config)
        chunk_tokens = cpu.loss_chunk_tokens(states.device.type)
        yield {
            name: summed_loss(states[predicting], part.targets, head, transform, chunk_tokens)
            for (name, part), predicting in zip(batches.items(), batch.predicting.split(counts), strict=True)
        }
    finally:
        routing.segments = ()


def joined(batches: tuple[Batch, ...]) -> Batch:
    """The batches one after the other as one. Padding follows the last only."""
    device = batches[0].input_ids.device
    offsets = list(accumulate((batch.tokens for batch in batches), initial=0))
    padding = cpu.padding(offsets[-1], device.type)
    lengths = tuple(length for batch in batches for length in _without_padding(batch))
    rows = RowBoundaries.of((*lengths, padding) if padding else lengths, device)
    predicting = [batch.predicting + offset for batch, offset in zip(batches, offsets, strict=False)]
    return Batch(
        pad(torch.cat([batch.input_ids[:, : batch.tokens] for batch in batches], dim=1), (0, padding)),
        rows.position_ids().to(device, non_blocking=True),
        rows,
        torch.cat(predicting),
        torch.cat([batch.targets for batch in batches]),
        offsets[-1],
    )


def _without_padding(batch: Batch) -> tuple[int, ...]:
    return batch.rows.lengths[: -1 if batch.tokens < batch.input_ids.shape[1] else None]


def _routing(base: Any) -> Routing:
    """What the fused layers share."""
    return next(module.routing for module in base.modules() if isinstance(module, FusedLora))
