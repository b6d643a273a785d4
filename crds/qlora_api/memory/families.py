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


@dataclass(frozen=True, slots=True)
class BlockBytes:
    """What a block takes, with activations in bfloat16."""

    kept: PerToken
    """What a block keeps for its backward pass when it is not recomputed."""
    backward: tuple[PerToken, ...]
    """Live at the peak of a recomputed block's backward pass, beside its input: the largest of several moments."""
    backward_with_dropout: tuple[PerToken, ...]
    """The same with dropout before each adapter, which keeps a masked input of its own for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's block."""

    linears: Callable[[Widths], Linears]
    block: BlockBytes
    composed: BlockBytes | None = None
    """The block with transformers' own norms, as published peaks of other trainers need it."""
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


# The counts were read off dry runs of the real layers over shapes with wide and with narrow MLPs, by
# benchmarks.memory_table, which prints them; a test compares each family with a dry run. Where hidden and query width
# were not varied apart, the query's share is that of Llama. The rows of gpt_neox and olmo, and those of composed norms,
# were read off while the trainer still composed them.
_LLAMA = Family(
    linears=_gated,
    block=BlockBytes(
        kept=PerToken(8, 4, 8, 4),
        backward=(PerToken(8, 4, 12, 4),),
        backward_with_dropout=(PerToken(25, 7, 11, 4), PerToken(19, 7, 12, 4), PerToken(27, 7, 8, 4)),
    ),
    composed=BlockBytes(
        kept=PerToken(12, 4, 8, 4),
        backward=(PerToken(14, 4, 12, 4), PerToken(32, 4, 0, 4)),
        backward_with_dropout=(PerToken(38, 8, 12, 4),),
    ),
)
_GELU = frozenset({"gelu_pytorch_tanh", "gelu", "gelu_new"})
_COHERE = replace(
    _LLAMA,
    block=BlockBytes(
        kept=PerToken(10, 4, 8, 4),
        backward=(PerToken(12, 5, 12, 4), PerToken(30, 1, 0, 0)),
        backward_with_dropout=(PerToken(33, 8, 11, 4), PerToken(35, 8, 8, 4)),
    ),
    composed=None,
    tied=True,
)
_GEMMA = replace(_LLAMA, composed=None, activations=_GELU, head_dim=256, tied=True)
_OLMO_2 = replace(
    _LLAMA,
    block=BlockBytes(
        kept=PerToken(10, 4, 8, 6),
        backward=(PerToken(8, 4, 12, 6), PerToken(12, 4, 8, 6)),
        backward_with_dropout=(PerToken(32, 4, 11, 6),),
    ),
    composed=None,
)
FAMILIES: Mapping[str, Family] = {
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        block=BlockBytes(
            kept=PerToken(12, 4, 8, 4),
            backward=(PerToken(10, 5, 12, 4), PerToken(16, 5, 8, 4)),
            backward_with_dropout=(PerToken(29, 8, 11, 4),),
        ),
    ),
    "gemma3_text": replace(
        _GEMMA,
        block=BlockBytes(
            kept=PerToken(12, 8, 8, 6),
            backward=(PerToken(10, 8, 12, 6), PerToken(16, 8, 8, 6)),
            backward_with_dropout=(PerToken(29, 9, 11, 6),),
        ),
        omitted={"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262_208},
    ),
    "glm4": Family(
        linears=_fused_mlp,
        block=BlockBytes(
            kept=PerToken(12, 6, 8, 4),
            backward=(PerToken(10, 7, 12, 4), PerToken(14, 7, 8, 4)),
            backward_with_dropout=(PerToken(26, 8, 11, 4), PerToken(20, 8, 12, 4)),
        ),
        head_dim=128,
    ),
    "gpt_neox": Family(
        linears=_gpt_neox,
        block=BlockBytes(
            kept=PerToken(20, 0, 4, 0),
            backward=(PerToken(20, 0, 8, 0), PerToken(28, 0, 4, 0)),
            backward_with_dropout=(PerToken(34, 0, 8, 0),),
        ),
        activations=_GELU,
    ),
    "granite": replace(
        _LLAMA,
        block=BlockBytes(
            kept=PerToken(8, 4, 8, 4),
            backward=(PerToken(8, 4, 12, 4), PerToken(12, 4, 8, 4)),
            backward_with_dropout=(PerToken(27, 7, 11, 4), PerToken(29, 7, 8, 4)),
        ),
        composed=BlockBytes(
            kept=PerToken(12, 4, 8, 4),
            backward=(PerToken(16, 4, 12, 4), PerToken(34, 4, 0, 4)),
            backward_with_dropout=(PerToken(42, 8, 12, 4),),
        ),
    ),
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "olmo": replace(
        _LLAMA,
        block=BlockBytes(
            kept=PerToken(12, 4, 8, 4),
            backward=(PerToken(15, 4, 12, 4), PerToken(22, 4, 8, 4)),
            backward_with_dropout=(PerToken(39, 8, 12, 4),),
        ),
        composed=None,
    ),
    "olmo2": _OLMO_2,
    "olmo3": _OLMO_2,
    "phi": Family(
        linears=_phi,
        block=BlockBytes(
            kept=PerToken(6, 4, 4, 4),
            backward=(PerToken(6, 4, 6, 4), PerToken(13, 4, 0, 11), PerToken(10, 4, 4, 4)),
            backward_with_dropout=(PerToken(25, 4, 7, 4), PerToken(31, 4, 0, 11)),
        ),
        activations=_GELU,
    ),
    "phi3": Family(
        linears=_fused,
        block=BlockBytes(
            kept=PerToken(10, 4, 8, 4),
            backward=(PerToken(10, 4, 12, 4),),
            backward_with_dropout=(PerToken(17, 4, 12, 4), PerToken(19, 4, 11, 4), PerToken(24, 4, 0, 10)),
        ),
    ),
    "qwen2": _LLAMA,
    "qwen3": replace(
        _LLAMA,
        block=BlockBytes(
            kept=PerToken(8, 6, 8, 6),
            backward=(PerToken(8, 7, 12, 6),),
            backward_with_dropout=(PerToken(25, 10, 11, 6), PerToken(19, 10, 12, 6), PerToken(27, 10, 8, 6)),
        ),
        composed=None,
        head_dim=128,
    ),
    "seed_oss": replace(_LLAMA, head_dim=128),
    "smollm3": replace(_LLAMA, tied=True),
}
