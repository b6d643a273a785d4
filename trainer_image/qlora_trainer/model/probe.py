"""Probes a family with a shrunken random model: do we compute what transformers does, and keep packed rows apart?"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_trainer.model.attention import ATTENTION, RowBoundaries, register_attention
from qlora_trainer.model.loss import LogitTransform

_VOCABULARY = 128
_ROWS = (7, 12)
_WINDOW = 5
"""Shorter than both rows."""
_SOFTCAP = 1.0
"""Low enough to change every score and logit."""
_MOST_BLOCKS = 8
_NOISE = 0.2
"""Standard deviation of the weights: enough for scores to differ, too little for one token to take all attention."""


@dataclass(frozen=True)
class Probe:
    """The result of a probe."""

    exact: bool
    """A row's logits are those of transformers' own attention and head, alone and behind another row."""
    isolated: bool
    """Another row before it does not change a bit of them."""


@torch.no_grad()
def probe(config: Any) -> Probe:
    """Compare a small random model of a text decoder's `config` with our attention, positions and head with itself.

    Takes some tens of milliseconds. Raises what transformers raises for a configuration that it cannot use.
    """
    register_attention()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shrunken(config), dtype=torch.float32, attn_implementation="eager")
        for parameter in model.eval().parameters():
            if parameter.ndim == 1:
                # Biases are initialized with 0 and norms with 1: leaving one out would not change the logits.
                parameter.add_(_NOISE * torch.randn_like(parameter))
        first, other, second = (torch.randint(_VOCABULARY, (1, tokens)) for tokens in (_ROWS[0], *_ROWS))
    expected = model(input_ids=second, use_cache=False).logits
    model.set_attn_implementation(ATTENTION)
    alone = _logits(model, second, RowBoundaries.of(_ROWS[1:], second.device))
    rows = RowBoundaries.of(_ROWS, second.device)
    behind, behind_other = (
        _logits(model, torch.cat([row, second], dim=1), rows)[:, _ROWS[0] :] for row in (first, other)
    )
    if not _close(alone, expected):
        return Probe(exact=False, isolated=False)
    return Probe(exact=True, isolated=torch.equal(behind, behind_other) and _close(behind, expected))


def _close(logits: Tensor, expected: Tensor) -> bool:
    return torch.allclose(logits, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _logits(model: Any, input_ids: Tensor, rows: RowBoundaries) -> Tensor:
    """Logits as training computes them: decoder, head, transform."""
    states = model.get_decoder()(
        input_ids=input_ids, position_ids=rows.position_ids(), rows=rows, use_cache=False
    ).last_hidden_state
    return LogitTransform.of(model.config)(model.get_output_embeddings()(states))


def shrunken(config: Any) -> Any:
    """The same family with few heads (of the same size, which positions depend on), few tokens and few blocks.

    The blocks show each kind that the model has: sliding or global, with or without rotation.
    """
    small = copy.deepcopy(config)
    heads, key_heads = small.num_attention_heads, getattr(small, "num_key_value_heads", None)
    head_size = getattr(small, "head_dim", None) or small.hidden_size // heads
    blocks = _blocks_of_each_kind(small)
    changes: dict[str, Any] = {
        "num_hidden_layers": len(blocks),
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if key_heads in (None, heads) else 1,
        "hidden_size": 2 * head_size,
        "intermediate_size": 64,
        "vocab_size": _VOCABULARY,
        "initializer_range": _NOISE,
        **{name: [values[block] for block in blocks] for name, values in _lists_by_block(small).items()},
        **{name: _SOFTCAP for name in vars(small) if "softcap" in name},
    }
    if getattr(small, "sliding_window", None):
        changes["sliding_window"] = _WINDOW
    for name, value in changes.items():
        if getattr(small, name, None) is not None:
            setattr(small, name, value)
    # The embedding rejects ids outside the small vocabulary.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    return small


def _lists_by_block(config: Any) -> dict[str, list[Any]]:
    """The entries of a configuration that have a value for each block, such as `layer_types` and `no_rope_layers`."""
    blocks = config.num_hidden_layers
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == blocks}


def _blocks_of_each_kind(config: Any) -> list[int]:
    """Numbers of blocks, at least two and at most eight, that together are of each kind."""
    kinds: dict[str, int] = {}
    for block, kind in enumerate(zip(*_lists_by_block(config).values(), strict=True)):
        kinds.setdefault(repr(kind), block)
    found = list(kinds.values())[:_MOST_BLOCKS] or [0]
    return found if len(found) > 1 else found * 2
