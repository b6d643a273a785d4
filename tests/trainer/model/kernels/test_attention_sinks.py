"""Attention with sinks equals that of transformers' gpt-oss, by each of the kernels that it is computed with."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from qlora_trainer.core import cpu
from qlora_trainer.model.kernels import attention_sinks
from qlora_trainer.model.kernels.attention import RowBoundaries, rows_attention
from qlora_trainer.model.kernels.attention_sinks import rows_with_sinks
from tests.support.models.attention import HEADS, KEY_HEADS, LENGTHS, MODULE, tensors, visible

ROWS = RowBoundaries.from_lengths(LENGTHS, torch.device("cpu"))
SCALE = 0.3
SINKS = torch.tensor([-2.0, 0.0, 1.5, 4.0], dtype=torch.float64)
WINDOWS = [None, 1, 40, 300]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def transformers(window: int | None) -> Attention:
    def compute(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        module: Any = SimpleNamespace(**(vars(MODULE) | {"sinks": SINKS.to(query.dtype), "training": False}))
        mask = query.new_zeros(1, 1, sum(LENGTHS), sum(LENGTHS)).masked_fill(~visible(window), float("-inf"))
        output: Tensor = eager_attention_forward(module, query, key, value, mask, SCALE)[0]
        return output

    return compute


def ours(window: int | None) -> Attention:
    def compute(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        settings: dict[str, Any] = {"scaling": SCALE, "sliding_window": window, "s_aux": SINKS.to(query.dtype)}
        return rows_attention(MODULE, query, key, value, None, rows=ROWS, **settings)[0]

    return compute


def results(attention: Attention, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of the inputs, in 64 bit."""
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors()]
    output = attention(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    return [tensor.detach().double() for tensor in (output, *gradients)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance


@pytest.mark.parametrize("window", WINDOWS)
def test_on_a_cpu_it_is_that_of_transformers(window: int | None) -> None:
    expected = results(transformers(window), torch.float64)
    assert_close(results(ours(window), torch.float64), expected, 1e-12)


@pytest.mark.parametrize("window", [None, 40])
def test_in_16_bit_it_is_as_close_to_the_exact_one_as_that_of_transformers(window: int | None) -> None:
    exact = results(transformers(window), torch.float64)
    theirs = results(transformers(window), torch.bfloat16)
    for one, other, reference in zip(results(ours(window), torch.bfloat16), theirs, exact, strict=True):
        assert (one - reference).norm() <= 1.05 * (other - reference).norm()


@pytest.mark.parametrize("window", WINDOWS)
def test_heads_without_a_kernel_on_a_gpu_have_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "fuses_attention", lambda _: False)
    expected = results(transformers(window), torch.float64)
    assert_close(results(ours(window), torch.float64), expected, 1e-12)


class Kernel:
    """FlashAttention by its formulas, with the arguments of PyTorch's operations.

    Its backward pass computes weights by the given logarithms, and the sum of their gradients by the given output, as
    FlashAttention 2 does (Dao 2023, arXiv 2307.08691, algorithm 2).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
        self._window = window
        monkeypatch.setattr(attention_sinks, "_forward", self.forward)
        monkeypatch.setattr(attention_sinks, "_backward", self.backward)

    def _heads(self, key: Tensor) -> Tensor:
        return key.transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, dim=0)

    def _scores(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        scores = query.transpose(0, 1) @ self._heads(key).transpose(1, 2) * scale
        return scores.masked_fill(~visible(self._window), float("-inf"))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *settings: Any, backend: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        starts, _, longest, _, is_causal, scale, window_size, has_groups = settings
        assert starts.tolist() == [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
        assert longest >= max(LENGTHS)
        assert (is_causal, window_size) == (self._window is None, [(self._window or 0) - 1, 0])
        assert has_groups
        assert backend == attention_sinks._BACKEND
        scores = self._scores(query, key, scale)
        output = (scores.softmax(-1) @ self._heads(value)).transpose(0, 1).contiguous()
        return output, scores.logsumexp(-1), torch.zeros(2)

    def backward(
        self,
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        normalizer: Tensor,
        *settings: Any,
        backend: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale = settings[6]
        of_heads = gradient.transpose(0, 1)
        weights = (self._scores(query, key, scale) - normalizer.unsqueeze(2)).exp()
        sums = (gradient * output).sum(-1).T.unsqueeze(2)
        of_scores = weights * (of_heads @ self._heads(value).transpose(1, 2) - sums) * scale
        of_query = (of_scores @ self._heads(key)).transpose(0, 1)
        of_key, of_value = of_scores.transpose(1, 2) @ query.transpose(0, 1), weights.transpose(1, 2) @ of_heads
        of_groups = (each.unflatten(0, (KEY_HEADS, -1)).sum(1).transpose(0, 1) for each in (of_key, of_value))
        return (of_query, *of_groups)


@pytest.mark.parametrize("window", WINDOWS)
def test_on_a_gpu_the_kernels_output_is_rescaled_and_its_gradients_are_exact(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Kernel(monkeypatch, window)

    def compute(*inputs: Tensor) -> Tensor:
        query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in inputs)
        size = (-1 if window is None else window - 1, 0)
        rows = (ROWS.real_offsets, ROWS.longest)
        return rows_with_sinks(query, key, value, SINKS, *rows, SCALE, size).unsqueeze(0)

    expected = results(transformers(window), torch.float64)
    assert_close(results(compute, torch.float64), expected, 1e-12)
