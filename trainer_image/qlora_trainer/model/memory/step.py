"""Runs one micro batch, forward and backward, and reports its additional bytes."""

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qlora_api.spec.training import PreferenceSpec
from qlora_trainer.data.prepared import PackedSequence
from qlora_trainer.model.architecture.decoder import decoder_blocks
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.joint import joint_losses, route
from qlora_trainer.model.losses.loss import batch_loss, row_losses
from qlora_trainer.model.losses.preference import dpo
from qlora_trainer.model.memory.backward import backward
from qlora_trainer.model.memory.live_bytes import LiveBytes
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.protocols import AdaptedModel, Decoder


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one micro batch on top of those that are alive before it."""

    kept: int
    """After the decoder: activations, or checkpoints, until the backward pass."""
    loss: int
    """The most while the loss is computed, less what is kept."""
    work: int
    """The most while the decoder runs, forward or backward, less what is kept."""
    blocks: tuple[int, ...]
    """Of what is kept, that of each block."""


def full_batch(sequences: int, tokens: int, *, pairs: bool = False) -> Batch:
    """A micro batch of full sequences as it is given to a GPU, in main memory: each is a row, all tokens are targets.

    With `pairs` each is two rows of half the tokens.
    Another batch of this size takes more only where FlashAttention computes the gradients of more rows: 128 tokens'
    worth of sums for each further row, while a block's attention is at work (see `live_bytes`).
    """
    anything = torch.zeros(tokens, dtype=torch.int64)
    sequence = PackedSequence(anything, anything, (tokens,))
    if pairs:
        sequence = PackedSequence(anything, anything, (tokens - tokens // 2, tokens // 2), row_numbers=(0, 1))
    # The batch is not for a CPU, which gets other sizes.
    return Batch.from_sequences([sequence] * sequences, torch.device("meta"))


def step_bytes(model: AdaptedModel, batch: Batch, run_backward: Callable[[Tensor], None] = backward) -> StepBytes:
    """The bytes of a micro batch of a model with its adapter, on the batch's device.

    When gradients are accumulated, those of an earlier micro batch exist already, and are not counted.
    """
    return _bytes(model, [batch], lambda: _loss(model.get_base_model(), batch), run_backward)


def joint_step_bytes(
    model: AdaptedModel, batches: Mapping[str, Batch], run_backward: Callable[[Tensor], None] = backward
) -> StepBytes:
    """The same for a pass with micro batches of several adapters, by their names."""

    def loss() -> Tensor:
        return torch.stack(list(joint_losses(model, batches).values())).sum()

    with route(model, batches):
        return _bytes(model, batches.values(), loss, run_backward)


def _bytes(
    model: AdaptedModel,
    batches: Collection[Batch],
    loss_of: Callable[[], Tensor],
    run_backward: Callable[[Tensor], None],
) -> StepBytes:
    base, device = model.get_base_model(), model.device.type
    gc.collect()
    with LiveBytes(device) as live:
        for tensor in _tensors(model, batches):
            live.add(tensor)
        before = live.bytes
        live.take_peak()
        at_end: list[tuple[int, int]] = []
        at_blocks: list[int] = []
        blocks = decoder_blocks(base)
        hooks = [
            base.get_decoder().register_forward_hook(lambda *_: at_end.append((live.bytes, live.take_peak()))),
            blocks[0].register_forward_pre_hook(lambda *_: at_blocks.append(live.bytes)),
            *(block.register_forward_hook(lambda *_: at_blocks.append(live.bytes)) for block in blocks),
        ]
        try:
            with computing(model, device):
                loss = loss_of()
        finally:
            for hook in hooks:
                hook.remove()
        kept, forward_peak = at_end[0]
        loss_peak = live.take_peak()
        run_backward(loss)
        work_peak = max(forward_peak, live.take_peak())
    of_blocks = tuple(max(0, after - before) for before, after in pairwise(at_blocks))
    return StepBytes(kept - before, loss_peak - kept, work_peak - kept, of_blocks)


def _loss(base: Decoder, batch: Batch) -> Tensor:
    """Return a batch's loss, for pairs that of DPO, without the reference's pass."""
    if batch.pairs is None:
        return batch_loss(base, batch)
    losses = row_losses(base, batch)
    return dpo(losses, torch.zeros_like(losses), PreferenceSpec()).loss.sum()


def _tensors(model: AdaptedModel, batches: Iterable[Batch]) -> Iterator[Tensor]:
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
    yield from model.buffers()
    for batch in batches:
        yield from (batch.input_ids, batch.position_ids, batch.rows.offsets, batch.predicting, batch.targets)
