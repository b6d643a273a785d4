"""Probes a family with a random tiny model: exact values, and isolated rows."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from qlora_trainer.model.architecture.decoder import (
    block_linears,
    block_structures,
    compute_as_in_use,
    decoder_states,
    place_in_block,
)
from qlora_trainer.model.architecture.text_part import random_text_part
from qlora_trainer.model.errors import ModelError, explain_errors
from qlora_trainer.model.experts.compute import EXPERTS, expert_modules, register_experts
from qlora_trainer.model.families.tiny_model import SPECIAL_TOKENS, VOCABULARY, WEIGHT_DEVIATION, shrink
from qlora_trainer.model.kernels.attention import ATTENTION, RowBoundaries, register_attention
from qlora_trainer.model.losses.loss import LogitTransform

_ROWS = (7, 12)
"""Both longer than the shrunken window."""
_UNKNOWN = (ModelError, ValueError, RuntimeError, TypeError, AttributeError, KeyError)
"""What transformers raises for a setting that a family does not know."""
_SMALL_MODEL = "the small test model of this type"


@dataclass(frozen=True)
class Probe:
    """The findings with a small random model of a family."""

    attention: str | None
    """The `attn_implementation` with which a row's logits are those of transformers' own attention, experts and head.

    None if there is none."""
    is_isolated: bool = False
    """Whether a row before it changes no bit of its values. See `_is_same_behind`."""
    is_causal: bool = False
    """Nor does a later token change those of an earlier one, beyond rounding."""
    is_stateless: bool = False
    """Nor does a sequence before it change a bit."""
    is_steady: bool = False
    """They are the same in training mode, without what `compute_as_in_use` turns off."""
    without_gradient: frozenset[tuple[int, str]] = frozenset()
    """Linear layers without part in the loss, by block number and name in the block."""
    bypassed: tuple[str, ...] = ()
    """Names of linear layers whose weights are used outside their forward pass."""
    unlike: tuple[str, ...] = ()
    """Parts of blocks that only the whole model has, or only the small one."""
    has_fixed_positions: bool = False
    """Whether it computes no row beyond its positions, as with learned vectors."""


def probe(config: PretrainedConfig, whole: PreTrainedModel) -> Probe:
    """Compare a small random model of this `config` with our attention, positions and head with itself.

    Where our attention does not compute what the family's own does, transformers' is tried, for one row a sequence.
    `whole` is the model that it stands for, with weights or without: each kind of block of one must be in the other.

    Takes a tenth of a second for most families, and seconds for recurrent layers. Raises ModelError for a
    configuration that this trainer cannot make small, and for a small model that transformers cannot build or run.
    """
    register_attention()
    register_experts()
    with explain_errors(f"this trainer cannot make {_SMALL_MODEL}"):
        small = shrink(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokens = VOCABULARY - len(SPECIAL_TOKENS)
        first, other, second = (torch.randint(tokens, (1, length)) for length in (_ROWS[0], *_ROWS))
        expected = _expected_logits(small.config, second)
        with explain_errors(f"{_SMALL_MODEL} cannot be run as in training"):
            with torch.no_grad():
                model, attention = _exact_model(small.config, second, expected)
                if model is None:
                    return Probe(None)
                isolated = attention == ATTENTION and _isolates(model, second, (first, other), expected)
                causal, stateless = _is_causal(model, second), _is_stateless(model, second, other)
            silent, bypassed = _without_gradient(model, second)
            with torch.no_grad():
                # It is in training mode now.
                steady = _is_close(_logits(model, second, _ROWS[1:]), expected)
            unlike = _unlike(whole, model)
        fixed = _has_fixed_positions(small.config, second)
    blocks = enumerate(small.stands_for)
    silent_layers = {(block, name) for block, small_block in blocks for number, name in silent if number == small_block}
    return Probe(attention, isolated, causal, stateless, steady, frozenset(silent_layers), bypassed, unlike, fixed)


def _unlike(whole: PreTrainedModel, small: PreTrainedModel) -> tuple[str, ...]:
    """Block kinds that only one of the models has, by the parts that differ."""
    kinds, small_kinds = block_structures(whole), block_structures(small)
    parts: set[str] = set()
    for kind in kinds ^ small_kinds:
        others = small_kinds if kind in kinds else kinds
        parts |= min((kind ^ other for other in others), key=len)
    return tuple(sorted(parts))


def _expected_logits(config: PretrainedConfig, row: Tensor) -> Tensor:
    """The row's logits, as transformers computes them with its attention and experts."""
    with explain_errors(f"transformers cannot build {_SMALL_MODEL}"):
        model = _random_model(config, "eager", "eager")
    with explain_errors(f"transformers cannot run on text alone {_SMALL_MODEL}"), torch.no_grad():
        return model(input_ids=row, use_cache=False).logits


def _has_fixed_positions(config: PretrainedConfig, row: Tensor) -> bool:
    """Whether the model computes a row as long as its positions, but none longer."""
    of_row = copy.deepcopy(config)
    text = of_row.get_text_config(decoder=True)
    if getattr(text, "max_position_embeddings", None) is None:
        return False
    text.max_position_embeddings = row.shape[1]
    try:
        model = _random_model(of_row, "eager", "eager")
    except (*_UNKNOWN, IndexError):
        # Such as a rotation that is stated for a longer context. Then it is computed, for any position.
        return False
    return not _computes(model, torch.cat([row, row[:, :1]], dim=1)) and _computes(model, row)


def _computes(model: PreTrainedModel, row: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(input_ids=row, use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return False
    return True


def _random_model(config: PretrainedConfig, attention: str, experts: str = EXPERTS) -> PreTrainedModel:
    """The model with these implementations, and the same random weights for each."""
    torch.manual_seed(1)
    model = random_text_part(config, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts)
    for parameter in model.eval().parameters():
        # Those of towers are frozen, of full size and without memory: comparing them would take it.
        if parameter.requires_grad and (parameter.ndim == 1 or bool((parameter == parameter.flatten()[:1]).all())):
            # Biases, and some routers, are initialized with 0 and norms with 1: leaving one out, or drawing experts at
            # random, would not change the logits.
            parameter.data.add_(WEIGHT_DEVIATION * torch.randn_like(parameter))
    return model


def _exact_model(
    config: PretrainedConfig, row: Tensor, expected: Tensor
) -> tuple[PreTrainedModel, str] | tuple[None, None]:
    """Return model and implementation with the expected logits. Raises as ours does."""
    refusal: Exception | None = None
    for attention in (ATTENTION, "sdpa", "eager"):
        try:
            # Made with it, as it is loaded: some families do not change theirs afterwards.
            model = _random_model(config, attention)
            if _is_close(_logits(model, row, _ROWS[1:]), expected):
                return model, attention
        except _UNKNOWN as error:
            # A family without support for an implementation fails in any of these ways.
            refusal = error if attention == ATTENTION else refusal
    if refusal is not None:
        raise refusal
    return None, None


def _isolates(model: PreTrainedModel, row: Tensor, before: tuple[Tensor, Tensor], expected: Tensor) -> bool:
    """Whether a row's logits are the expected ones behind each of the other rows."""
    behind, behind_other = (
        _logits(model, torch.cat([other, row], dim=1), _ROWS)[:, other.shape[1] :] for other in before
    )
    return _is_same_behind(model, behind, behind_other) and _is_close(behind, expected)


def _is_same_behind(model: PreTrainedModel, logits: Tensor, others: Tensor) -> bool:
    """Whether a row's logits behind two different rows are the same to the bit.

    With routed experts up to rounding, 2^-16 of the largest: an expert's number of tokens depends on the other row, and
    a matrix product of another size adds in another order. A leak from another row is above: its tokens' states are as
    large as those of this row.
    """
    if next(expert_modules(model), None) is None:
        return torch.equal(logits, others)
    return bool((logits - others).abs().max() <= 2**-16 * logits.abs().max())


def _is_causal(model: PreTrainedModel, row: Tensor) -> bool:
    half = row.shape[1] // 2
    changed = torch.cat([row[:, :half], row[:, half:].flip(1)], dim=1)
    before, after = (_logits(model, tokens, _ROWS[1:])[:, :half] for tokens in (row, changed))
    return _is_close(after, before)


def _is_stateless(model: PreTrainedModel, row: Tensor, other: Tensor) -> bool:
    before = _logits(model, row, _ROWS[1:])
    _logits(model, other, _ROWS[:1])
    return torch.equal(_logits(model, row, _ROWS[1:]), before)


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _logits(model: PreTrainedModel, input_ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Logits as training computes them: decoder, head, transform."""
    rows = RowBoundaries.from_lengths(lengths, input_ids.device)
    states = decoder_states(model, input_ids, rows.position_ids(), rows)
    return LogitTransform.from_config(model.config)(model.get_output_embeddings()(states))


def _without_gradient(model: PreTrainedModel, row: Tensor) -> tuple[list[tuple[int, str]], tuple[str, ...]]:
    """Return linear layers without part in the loss, and names of weights in it."""
    linears = block_linears(model)
    compute_as_in_use(model)
    model.train()
    with _results_of(model, linears) as results:
        cross_entropy(_logits(model, row, _ROWS[1:])[0, :-1].float(), row[0, 1:]).backward()
    reached = {name for name, result in results if result.grad is not None and bool(result.grad.any())}
    called = {name for name, _ in results}
    bypassed = [name for name in linears if name not in called and model.get_submodule(name).weight.grad is not None]
    silent = [place_in_block(name) for name in linears if name not in reached]
    return silent, tuple(sorted({place_in_block(name)[1] for name in bypassed}))


@contextmanager
def _results_of(model: nn.Module, names: tuple[str, ...]) -> Iterator[list[tuple[str, Tensor]]]:
    """The results of these modules in the body, with gradients after a backward pass."""
    results: list[tuple[str, Tensor]] = []

    def keep(name: str, result: Tensor) -> None:
        if result.requires_grad:
            result.retain_grad()
            results.append((name, result))

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _module, _given, result, name=name: keep(name, result))
        for name in names
    ]
    try:
        yield results
    finally:
        for hook in hooks:
            hook.remove()
