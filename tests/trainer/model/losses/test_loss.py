"""The chunked loss over packed rows equals the plain loss of one row at a time."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from qlora_trainer.core import cpu
from qlora_trainer.data.prepared import IGNORED_LABEL
from qlora_trainer.model.kernels.attention import ATTENTION, register_attention
from qlora_trainer.model.kernels.linear_attention import use_rows
from qlora_trainer.model.losses.batch import Batch, next_token_targets
from qlora_trainer.model.losses.loss import LogitTransform, batch_loss, summed_loss, target_losses
from tests.support.models.sequences import CPU, random_sequence, rows_of
from tests.support.models.tiny import SHAPE

FAMILIES = [
    transformers.LlamaConfig(**SHAPE),
    transformers.MistralConfig(**SHAPE, sliding_window=6),
    transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    transformers.Qwen3Config(**SHAPE, head_dim=16),
    transformers.GraniteConfig(**SHAPE, logits_scaling=8.0, attention_multiplier=0.1, embedding_multiplier=12.0),
    transformers.CohereConfig(**SHAPE, logit_scale=0.25),
    transformers.Gemma2Config(
        **SHAPE,
        head_dim=32,
        sliding_window=6,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=0.2,
        final_logit_softcapping=0.5,
    ),
    *(
        family(
            **SHAPE,
            pad_token_id=0,
            layer_types=["linear_attention", "full_attention"],
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=24,
        )
        for family in (transformers.Qwen3_5TextConfig, transformers.OlmoHybridConfig)
    ),
    transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"]),
]


class CountingHead(nn.Linear):
    """An output layer that remembers for how many positions it was asked at a time."""

    def __init__(self, features: int, vocabulary: int) -> None:
        super().__init__(features, vocabulary, bias=False)
        self.positions: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.positions.append(states.shape[0])
        return super().forward(states)


def head_states_and_targets(*, frozen: bool) -> tuple[CountingHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = CountingHead(16, 300).requires_grad_(not frozen)
    return head, torch.randn(100, 16, requires_grad=True), torch.randint(0, 300, (100,))


def whole_logits(head: CountingHead, states: Tensor, transform: LogitTransform) -> Tensor:
    """By the definition, and not counted."""
    logits = nn.functional.linear(states, head.weight) * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


on_each_head = pytest.mark.parametrize("frozen", [True, False])
with_each_transform = pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.125), LogitTransform(1.0, 5.0)]
)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_loss_and_gradients_of_packed_rows_equal_those_of_one_row_at_a_time(config: Any) -> None:
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    use_rows(model)
    sequences = [random_sequence((9, 14, 5), 1), random_sequence((20,), 2)]

    expected = torch.zeros(())
    for tokens, labels in (row for sequence in sequences for row in rows_of(sequence)):
        logits = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, :-1]
        expected = expected + cross_entropy(logits, labels[1:], ignore_index=IGNORED_LABEL, reduction="sum")
    expected.backward()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(ATTENTION)
    loss = batch_loss(model, Batch.from_sequences(sequences, CPU))
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-4, atol=1e-5, msg=name)


@on_each_head
@with_each_transform
def test_chunks_give_the_loss_and_gradient_of_the_whole_but_never_the_whole_logits(
    transform: LogitTransform, frozen: bool
) -> None:
    head, states, targets = head_states_and_targets(frozen=frozen)

    expected = cross_entropy(whole_logits(head, states, transform), targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, states)
    loss = summed_loss(states, targets, head, transform, chunk_tokens=32)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(states.grad, gradient, rtol=1e-5, atol=1e-6)
    assert max(head.positions) == 32
    # A trained head's logits are computed again in backward, a frozen one's are not.
    assert sum(head.positions) == (100 if frozen else 200)


@on_each_head
def test_overflowing_logits_have_the_loss_and_gradient_of_cross_entropy(frozen: bool) -> None:
    """exp(89) overflows float32, and logits above 100 are common without a soft cap."""
    head, states, targets = head_states_and_targets(frozen=frozen)
    nn.init.normal_(head.weight, std=50.0)
    logits = head(states)
    assert logits.amax(dim=1).min() > 89
    expected = cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, states)

    loss = summed_loss(states, targets, head, LogitTransform(), chunk_tokens=128)
    loss.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(states.grad, gradient, rtol=1e-5, atol=1e-4)


@on_each_head
@with_each_transform
def test_the_losses_of_targets_may_count_with_weights_that_depend_on_them(
    transform: LogitTransform, frozen: bool
) -> None:
    """The weight of a compared answer is known only after all of its losses."""
    head, states, targets = head_states_and_targets(frozen=frozen)

    def compared(losses: Tensor) -> Tensor:
        chosen, rejected = losses.split([60, 40])
        return -nn.functional.logsigmoid((rejected.sum() - chosen.sum()) / 50)

    expected = cross_entropy(whole_logits(head, states, transform), targets, reduction="none")
    (gradient,) = torch.autograd.grad(compared(expected), states)
    losses = target_losses(states, targets, head, transform, chunk_tokens=32)
    compared(losses).backward()

    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states.grad, gradient, rtol=1e-5, atol=1e-7)
    assert max(head.positions) == 32
    assert sum(head.positions) == (100 if frozen else 200)
    assert target_losses(states[:0], targets[:0], head, transform, chunk_tokens=32).shape == (0,)


def test_positions_without_a_target_are_never_given_to_the_head() -> None:
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE), attn_implementation=ATTENTION)
    model.lm_head = CountingHead(64, 512)
    sequence = random_sequence((12, 8), 3)

    batch_loss(model, Batch.from_sequences([sequence], CPU))

    assert model.lm_head.positions == [int((sequence.labels != IGNORED_LABEL).sum())]


def test_the_padding_of_a_long_batch_on_a_cpu_changes_no_loss_and_counts_nowhere() -> None:
    register_attention()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"max_position_embeddings": 1024})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    first, second = random_sequence((300,), 1), random_sequence((260,), 2)

    batch = Batch.from_sequences([first, second], CPU)
    apart = sum(batch_loss(model, Batch.from_sequences([sequence], CPU)) for sequence in (first, second))

    assert batch.input_ids.shape == batch.position_ids.shape == (1, 576)
    assert batch.tokens == 560
    assert batch.rows.lengths == (300, 260, 16)
    torch.testing.assert_close(batch_loss(model, batch), apart, rtol=1e-6, atol=0)


def test_a_batch_on_a_gpu_is_padded_to_tiles_and_its_logits_computed_in_chunks() -> None:
    batch = Batch.from_sequences([random_sequence((300, 260), 1)], torch.device("meta"))

    assert batch.input_ids.shape == batch.position_ids.shape == (1, 640)
    assert (batch.rows.lengths, batch.tokens) == ((300, 260, 80), 560)
    assert (cpu.loss_chunk_tokens("cuda"), cpu.loss_chunk_tokens("cpu")) == (512, 128)


def test_a_token_predicts_the_next_of_its_own_row_only() -> None:
    labels = torch.tensor([IGNORED_LABEL, 11, 12, 20, 21, IGNORED_LABEL])

    # 20 is labeled although it begins a row: no token of that row precedes it.
    assert next_token_targets(labels, (3, 2, 1)).tolist() == [11, 12, IGNORED_LABEL, 21, IGNORED_LABEL, IGNORED_LABEL]


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    states = torch.randn(0, 16, requires_grad=True)

    no_targets = torch.zeros(0, dtype=torch.int64)
    loss = summed_loss(states, no_targets, CountingHead(16, 30), LogitTransform(), chunk_tokens=128)
    loss.backward()

    assert loss.item() == 0.0


def test_a_micro_batch_of_several_sequences_is_one_row_without_padding() -> None:
    first, second = random_sequence((9, 14), 1), random_sequence((5,), 2)

    batch = Batch.from_sequences([first, second], CPU)

    assert batch.input_ids.tolist() == [first.input_ids.tolist() + second.input_ids.tolist()]
    assert batch.position_ids.tolist() == [[*range(9), *range(14), *range(5)]]
    assert batch.rows.offsets.tolist() == [0, 9, 23, 28, 28]
    assert batch.tokens == 28
