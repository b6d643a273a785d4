"""Linear attention within rows computes what transformers' own computes for each row alone."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5

from qlora_trainer.model.errors import ModelError
from qlora_trainer.model.kernels.attention import RowBoundaries
from qlora_trainer.model.kernels.linear_attention import _Convolution, _DeltaRule

Function = Callable[..., Tensor]
# Of one token, shorter and longer than a chunk, from its start and across.
LENGTHS = (1, 130, 64, 1, 2, 300, 15, 90)
WEAK, STRONG = 0.1, 8.0
THEIRS = modeling_qwen3_5.torch_chunk_gated_delta_rule


def boundaries(lengths: Sequence[int]) -> RowBoundaries:
    return RowBoundaries.from_lengths(tuple(lengths), torch.device("cpu"))


def inputs(tokens: int, decay: float, *, size: int = 16, groups: int = 2) -> list[Tensor]:
    """Queries, keys, values of another size, logarithms of decays, factors; in 64 bit."""
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, tokens, *shape, generator=generator, dtype=torch.float64)

    heads = 2 * groups
    pair = [normal(2, size), normal(2, size)]
    return [*pair, normal(heads, size + 8), -decay * normal(heads).exp(), normal(heads).sigmoid()]


def theirs(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    return THEIRS(query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]


def exact(monkeypatch: pytest.MonkeyPatch, lengths: Sequence[int]) -> Function:
    """Of each row alone, by transformers' function, which computes in 32 bit otherwise."""

    def compute(*given: Tensor) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(torch, "float32", torch.float64)
            rows = zip(*(tensor.split(list(lengths), dim=1) for tensor in given), strict=True)
            return torch.cat([theirs(*row) for row in rows], dim=1)

    return compute


def ours(lengths: Sequence[int]) -> Function:
    rows, rule = boundaries(lengths), _DeltaRule(THEIRS)

    def compute(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
        return rule(query, key, value, g=decay, beta=beta, rows=rows, use_qk_l2norm_in_kernel=True)[0]

    return compute


def convolution(lengths: Sequence[int], inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    convolve = _Convolution(modeling_qwen3_5.causal_conv1d_fn)
    return convolve(inputs, weight, bias, activation="silu", rows=boundaries(lengths))


def results(function: Function, given: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of all inputs, in 64 bit."""
    given = [tensor.detach().requires_grad_() for tensor in given]
    output = function(*given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    gradients = torch.autograd.grad((output * weights).sum(), given)
    return [tensor.detach().double() for tensor in (output, *gradients)]


@pytest.mark.parametrize("decay", [WEAK, STRONG])
@pytest.mark.parametrize("lengths", [(1,), (5,), (128,), (300,), LENGTHS], ids=str)
def test_each_row_has_output_and_gradients_of_transformers(
    lengths: Sequence[int], decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = inputs(sum(lengths), decay, groups=1 if lengths == (300,) else 2)
    expected = results(exact(monkeypatch, lengths), given)
    for found, other in zip(results(ours(lengths), given), expected, strict=True):
        assert (found - other).abs().max() <= 1e-12 * other.abs().max()


def test_a_row_before_it_changes_no_bit() -> None:
    lengths = (200, 150)
    given = [tensor.float() for tensor in inputs(sum(lengths), STRONG)]
    other = [torch.cat([tensor[:, :200].flip(1), tensor[:, 200:]], dim=1) for tensor in given]
    for one, two in zip(results(ours(lengths), given), results(ours(lengths), other), strict=True):
        assert torch.equal(one[:, 200:], two[:, 200:])
        assert not torch.equal(one[:, :200], two[:, :200])


@pytest.mark.parametrize("decay", [WEAK, STRONG])
@pytest.mark.parametrize(
    ("dtype", "is_cast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_it_is_as_close_to_the_exact_one_as_that_of_transformers(
    dtype: torch.dtype, is_cast: bool, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [tensor.to(dtype) for tensor in inputs(400, decay, size=64)]
    reference = results(exact(monkeypatch, (400,)), [tensor.double() for tensor in given])

    def cast(function: Function) -> Function:
        def compute(*tensors: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
                return function(*tensors)

        return compute

    found, other = (results(cast(function), given) for function in (ours((400,)), theirs))
    # In 32 bit both are within a few roundings.
    allowed = 2.0 if dtype == torch.float32 else 1.05
    for one, two, it in zip(found, other, reference, strict=True):
        assert (one - it).norm() <= allowed * (two - it).norm()


@pytest.mark.parametrize(
    "settings", [{"output_final_state": True}, {"initial_state": torch.zeros(1)}, {"use_qk_l2norm_in_kernel": False}]
)
def test_a_state_or_keys_that_are_not_normalized_are_rejected(settings: dict[str, Any]) -> None:
    query, key, value, decay, beta = inputs(3, WEAK)
    with pytest.raises(ModelError, match="normalized keys and no cache"):
        _DeltaRule(THEIRS)(
            query, key, value, g=decay, beta=beta, rows=boundaries((3,)), **{"use_qk_l2norm_in_kernel": True} | settings
        )


@pytest.mark.parametrize("lengths", [(1,), (7,), (1, 1, 2, 3, 40, 1)], ids=str)
def test_a_convolution_reads_no_token_of_another_row(lengths: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, sum(lengths), 6), (6, 4), (6,))
    by_token, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def alone(inputs: Tensor, *parameters: Tensor) -> Tensor:
        rows = inputs.split(list(lengths), dim=2)
        return torch.cat([convolution(row.shape[2:], row, *parameters) for row in rows], dim=2)

    given = (by_token.transpose(1, 2), weight, bias)
    expected = results(alone, given)
    for found, other in zip(results(partial(convolution, lengths), given), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=0, atol=1e-13)
