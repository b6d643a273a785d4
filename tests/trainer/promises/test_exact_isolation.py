"""After an evaluation all adapter weights learn, and packed rows stay independent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

from qlora_trainer.data.prepared import IGNORED_LABEL, PackedSequence
from qlora_trainer.model.adapter.attach import adapter_parameters
from qlora_trainer.model.losses.batch import Batch
from qlora_trainer.model.losses.loss import batch_loss
from qlora_trainer.model.nf4.quantization import BASE_DTYPE
from qlora_trainer.training.optimizer import make_optimizer
from tests.support.models.adapted import adapted
from tests.support.models.sequences import random_sequence
from tests.support.models.tiny import SHAPE, save_model
from tests.support.resolved import resolved_spec
from tests.support.training import job

LENGTHS = (20, 12, 9)
FAMILIES = [
    LlamaConfig(**SHAPE),
    MistralConfig(**SHAPE, sliding_window=6),
    Qwen2Config(**SHAPE, tie_word_embeddings=True),
    Qwen3Config(**SHAPE, head_dim=16),
    Gemma2Config(**SHAPE, head_dim=16, sliding_window=6),
    Phi3Config(**SHAPE, pad_token_id=0),
]


def loss_of(model: Any, sequence: PackedSequence) -> Tensor:
    """The loss as the loop computes it."""
    with torch.autocast("cpu", dtype=BASE_DTYPE, cache_enabled=False):
        return batch_loss(model.get_base_model(), Batch.from_sequences([sequence], torch.device("cpu")))


def evaluated_and_trained(folder: Path) -> Any:
    """A model that has been evaluated, trained for two steps, and evaluated again."""
    model = adapted(folder, seed=0)
    optimizer = make_optimizer(adapter_parameters(model).values(), resolved_spec(job().spec).training)
    for seed in (1, 2):
        evaluate(model)
        loss_of(model, random_sequence(LENGTHS, seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    evaluate(model)
    return model


def evaluate(model: Any) -> None:
    model.eval()
    with torch.no_grad():
        loss_of(model, random_sequence(LENGTHS, 9))
    model.train()


def taught_by(row: int, sequence: PackedSequence) -> PackedSequence:
    """The same tokens, with targets in one row only."""
    labels = [
        part if number == row else torch.full_like(part, IGNORED_LABEL)
        for number, part in enumerate(sequence.labels.split(list(LENGTHS)))
    ]
    return PackedSequence(sequence.input_ids, torch.cat(labels), LENGTHS)


def with_row(row: int, sequence: PackedSequence, other: PackedSequence) -> PackedSequence:
    """The sequence with one row taken from another."""
    parts = [list(each.input_ids.split(list(LENGTHS))) for each in (sequence, other)]
    parts[0][row] = parts[1][row]
    return PackedSequence(torch.cat(parts[0]), sequence.labels, LENGTHS)


def lesson(model: Any, sequence: PackedSequence) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a sequence."""
    model.zero_grad()
    loss = loss_of(model, sequence)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.item(), gradients


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_gradients_of_a_row_do_not_depend_on_its_neighbors_bit_for_bit(config: Any, tmp_path: Path) -> None:
    model = evaluated_and_trained(save_model(tmp_path / "model", config))
    sequence, other = random_sequence(LENGTHS, 3), random_sequence(LENGTHS, 4)

    assert all(gradient.abs().sum() > 0 for gradient in lesson(model, other)[1].values())
    for row in range(len(LENGTHS)):
        loss, gradients = lesson(model, taught_by(row, sequence))
        for beside in set(range(len(LENGTHS))) - {row}:
            other_loss, other_gradients = lesson(model, taught_by(row, with_row(beside, sequence, other)))
            assert other_loss == loss
            different = [name for name in gradients if not torch.equal(gradients[name], other_gradients[name])]
            assert not different, f"row {beside} has a part in what row {row} teaches"
        # The test would notice: another token of the same row changes its gradients.
        assert lesson(model, taught_by(row, with_row(row, sequence, other)))[0] != loss
