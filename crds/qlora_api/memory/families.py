"""Which linear layers a block of each model family has, and how many bytes its activations take; one entry a family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

Linears = Mapping[str, tuple[int, int]]
"""Input and output features of each linear layer of one block, by name."""


class Widths(NamedTuple):
    """Widths of a block: features of the hidden state, of all queries, of the keys (or values), inside the MLP."""

    hidden: int
    query: int
    key: int
    mlp: int


@dataclass(frozen=True, slots=True)
class PerToken:
    """Bytes per token, as a multiple of each width of a block."""

    hidden: int
    query: int
    mlp: int
    key: int

    def at(self, widths: Widths) -> int:
        """Bytes per token in a block of these widths."""
        return self.hidden * widths.hidden + self.query * widths.query + self.mlp * widths.mlp + self.key * widths.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's block. All counts of bytes are those of bfloat16 activations, norms computed in float32."""

    linears: Callable[[Widths], Linears]
    kept: PerToken
    """What a block keeps for its backward pass when it is not recomputed."""
    backward: tuple[PerToken, ...]
    """Live at the peak of a recomputed block's backward pass, beside its input: the largest of several moments."""
    backward_with_dropout: tuple[PerToken, ...]
    """The same with dropout before each adapter, which keeps a masked input of its own for each."""
    activations: frozenset[str] = frozenset({"silu", "swish"})
    """Values of `hidden_act` that these counts hold for."""
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
    return _attention(w) | {"gate_up_proj": (w.hidden, 2 * w.mlp), "down_proj": (w.mlp, w.hidden)}


def _fused(w: Widths) -> Linears:
    return {
        "qkv_proj": (w.hidden, w.query + 2 * w.key),
        "o_proj": (w.query, w.hidden),
        "gate_up_proj": (w.hidden, 2 * w.mlp),
        "down_proj": (w.mlp, w.hidden),
    }


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


# The counts were read off live bytes of the real layers without weights (benchmarks.dry_run), over shapes with wide
# and with narrow MLPs; a test repeats it for each family. Where hidden and query width were not varied apart, the
# query's share is that of Llama.
_LLAMA = Family(
    linears=_gated,
    kept=PerToken(12, 4, 8, 4),
    backward=(PerToken(14, 4, 12, 4), PerToken(32, 4, 0, 4)),
    backward_with_dropout=(PerToken(38, 8, 12, 4),),
)
_GELU = frozenset({"gelu_pytorch_tanh", "gelu", "gelu_new"})
_COHERE = replace(
    _LLAMA,
    kept=PerToken(10, 4, 8, 4),
    backward=(PerToken(12, 4, 12, 4), PerToken(27, 4, 0, 13)),
    tied=True,
)
_GEMMA = replace(_LLAMA, activations=_GELU, head_dim=256, tied=True)
_OLMO_2 = replace(
    _LLAMA,
    kept=PerToken(12, 8, 8, 8),
    backward=(PerToken(9, 8, 12, 8), PerToken(32, 8, 8, 8)),
    backward_with_dropout=(PerToken(43, 8, 12, 8), PerToken(54, 8, 10, 8)),
)
FAMILIES: Mapping[str, Family] = {
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        kept=PerToken(20, 4, 8, 4),
        backward=(PerToken(18, 4, 12, 4), PerToken(42, 4, 8, 4)),
        backward_with_dropout=(PerToken(48, 8, 12, 4), PerToken(58, 8, 10, 4)),
    ),
    "gemma3_text": replace(
        _GEMMA,
        kept=PerToken(20, 8, 8, 8),
        backward=(PerToken(18, 8, 12, 8), PerToken(42, 8, 8, 8)),
        backward_with_dropout=(PerToken(48, 12, 12, 8), PerToken(58, 12, 10, 8)),
        omitted={"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208},
    ),
    "glm4": Family(
        linears=_fused_mlp,
        kept=PerToken(20, 6, 8, 4),
        backward=(PerToken(20, 6, 12, 4), PerToken(42, 6, 8, 4)),
        backward_with_dropout=(PerToken(40, 8, 12, 4), PerToken(54, 8, 10, 4)),
        head_dim=128,
    ),
    "gpt_neox": Family(
        linears=_gpt_neox,
        kept=PerToken(20, 0, 4, 0),
        backward=(PerToken(20, 0, 8, 0), PerToken(28, 0, 4, 0)),
        backward_with_dropout=(PerToken(34, 0, 8, 0),),
        activations=_GELU,
    ),
    "granite": replace(
        _LLAMA,
        backward=(PerToken(16, 4, 12, 4), PerToken(34, 4, 0, 4)),
        backward_with_dropout=(PerToken(42, 8, 12, 4),),
    ),
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "olmo": replace(
        _LLAMA,
        backward=(PerToken(15, 4, 12, 4), PerToken(22, 4, 8, 4)),
        backward_with_dropout=(PerToken(39, 8, 12, 4),),
    ),
    "olmo2": _OLMO_2,
    "olmo3": _OLMO_2,
    "phi": Family(
        linears=_phi,
        kept=PerToken(6, 4, 10, 4),
        backward=(PerToken(6, 4, 14, 4), PerToken(14, 4, 10, 4)),
        backward_with_dropout=(PerToken(26, 8, 14, 4),),
        activations=_GELU,
    ),
    "phi3": Family(
        linears=_fused,
        kept=PerToken(16, 4, 8, 6),
        backward=(PerToken(22, 4, 12, 6), PerToken(36, 4, 0, 6)),
        backward_with_dropout=(PerToken(33, 4, 12, 6), PerToken(36, 4, 8, 5)),
    ),
    "qwen2": _LLAMA,
    "qwen3": replace(
        _LLAMA,
        kept=PerToken(12, 8, 8, 8),
        backward=(PerToken(14, 8, 12, 8), PerToken(32, 8, 0, 8)),
        backward_with_dropout=(PerToken(38, 12, 12, 8),),
        head_dim=128,
    ),
    "seed_oss": replace(_LLAMA, head_dim=128),
    "smollm3": replace(_LLAMA, tied=True),
}
