"""Lists the linear layers in a block of each dense model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

Linears = Mapping[str, tuple[int, int]]
"""Input and output features of each linear layer of one block, by name."""


class Widths(NamedTuple):
    """Widths of a block: hidden state, all queries, keys (or values), and the MLP."""

    hidden: int
    query: int
    key: int
    mlp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's block, and its defaults."""

    linears: Callable[[Widths], Linears]
    head_dim: int | None = None
    """The family's `head_dim` where config.json leaves it out; None means the hidden size divided by the heads."""
    tied: bool = False
    """The family's `tie_word_embeddings` where config.json leaves it out."""
    omitted: Mapping[str, int] | None = None
    """Other sizes that published configurations leave out, with transformers' defaults."""


def _gated(w: Widths) -> Linears:
    return _attention(w) | {
        "gate_proj": (w.hidden, w.mlp),
        "up_proj": (w.hidden, w.mlp),
        "down_proj": (w.mlp, w.hidden),
    }


def _attention(w: Widths) -> dict[str, tuple[int, int]]:
    return {
        "q_proj": (w.hidden, w.query),
        "k_proj": (w.hidden, w.key),
        "v_proj": (w.hidden, w.key),
        "o_proj": (w.query, w.hidden),
    }


def _fused_mlp(w: Widths) -> Linears:
    return _attention(w) | _gate_up(w)


def _gate_up(w: Widths) -> dict[str, tuple[int, int]]:
    return {"gate_up_proj": (w.hidden, 2 * w.mlp), "down_proj": (w.mlp, w.hidden)}


def _fused(w: Widths) -> Linears:
    return {"qkv_proj": (w.hidden, w.query + 2 * w.key), "o_proj": (w.query, w.hidden)} | _gate_up(w)


def _phi(w: Widths) -> Linears:
    return {
        "q_proj": (w.hidden, w.query),
        "k_proj": (w.hidden, w.key),
        "v_proj": (w.hidden, w.key),
        "dense": (w.query, w.hidden),
        "fc1": (w.hidden, w.mlp),
        "fc2": (w.mlp, w.hidden),
    }


def _gpt_neox(w: Widths) -> Linears:
    return {
        "query_key_value": (w.hidden, 3 * w.hidden),
        "dense": (w.hidden, w.hidden),
        "dense_h_to_4h": (w.hidden, w.mlp),
        "dense_4h_to_h": (w.mlp, w.hidden),
    }


_LLAMA = Family(linears=_gated)
_COHERE = Family(linears=_gated, tied=True)
_GEMMA = Family(linears=_gated, head_dim=256, tied=True)
FAMILIES: Mapping[str, Family] = {
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": replace(_GEMMA, omitted={"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208}),
    "glm4": Family(linears=_fused_mlp, head_dim=128),
    "gpt_neox": Family(linears=_gpt_neox),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "phi": Family(linears=_phi),
    "phi3": Family(linears=_fused),
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, head_dim=128),
    "seed_oss": replace(_LLAMA, head_dim=128),
    "smollm3": replace(_LLAMA, tied=True),
}
