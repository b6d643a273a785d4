"""Reads a dense model's sizes from its `config.json`."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from qlora_api.memory.families import FAMILIES, Family, Linears, Widths

SUPPORTED_MODEL_TYPES = tuple(sorted(FAMILIES))
_SUPPORTED = f"supported are dense decoders of model_type {', '.join(SUPPORTED_MODEL_TYPES)}"
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Far above any published dense model, low enough that a typing error or an attack is reported and not multiplied.
LARGEST_SIZES: Mapping[str, int] = {
    "hidden_size": 131_072,
    "num_hidden_layers": 1_024,
    "intermediate_size": 1_048_576,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 4_096,
    "vocab_size": 10_000_000,
}
NAMED_SIZES = tuple(name for name in LARGEST_SIZES if name not in ("num_key_value_heads", "head_dim"))
"""Those that a config.json must have: the others follow from them, or from the family."""


class UnsupportedModelError(ValueError):
    """A size that no model has: the message has field, value and allowed values."""


class UnlistedModelError(UnsupportedModelError):
    """A model whose layers FAMILIES lacks: a dry run may count them."""


def _show(value: object) -> str:
    """The beginning of a wrong value, for a message."""
    if isinstance(value, (list, dict)):
        return repr(reprlib.repr(value))
    if isinstance(value, int) and abs(value) >= 10**20:
        # A number with thousands of digits has no decimal text in Python.
        return f"a number of {value.bit_length()} bits"
    return repr(str(value)[:60])


def _whole_number(value: object, field: str, highest: int) -> int:
    """The value, an int from 1 to `highest`. Raises UnsupportedModelError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsupportedModelError(f"{field} is {_show(value)}: must be a whole number from 1 to {highest}")
    if not 1 <= value <= highest:
        found = str(value) if abs(value) < 10**20 else _show(value)
        raise UnsupportedModelError(f"{field} is {found}: must be from 1 to {highest}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder of one of FAMILIES, named as in a `config.json`.

    Raises UnsupportedModelError for an unknown family, or a size that no model has, naming the field.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise UnsupportedModelError(f"model_type is {self.model_type[:60]!r}; {_SUPPORTED}")
        for field, highest in LARGEST_SIZES.items():
            _whole_number(getattr(self, field), field, highest)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_key_value_heads is {self.num_key_value_heads}: "
                f"must divide num_attention_heads, which is {self.num_attention_heads}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """Read a parsed `config.json`, or its `text_config` in a multimodal model.

        Only the text decoder is described: the weights of a vision or audio tower are not counted. Norms and biases,
        below 0.05 % of the parameters, are left out. A missing `num_key_value_heads` means one per attention head; a
        missing `head_dim` or `tie_word_embeddings` has the family's default.

        Raises UnsupportedModelError for a mixture of experts, another architecture, or a missing or impossible size.
        """
        decoder = _decoder(config)
        family = _known_family(decoder)
        sizes = {**(family.omitted or {})}
        sizes |= {
            field: _whole_number(decoder[field], field, highest)
            for field, highest in LARGEST_SIZES.items()
            if decoder.get(field) is not None
        }
        if missing := [field for field in NAMED_SIZES if field not in sizes]:
            # A part of a multimodal model leaves out what transformers knows: a dry run may count them.
            raise (UnsupportedModelError if decoder is config else UnlistedModelError)(missing_sizes(missing))
        heads = sizes["num_attention_heads"]
        sizes.setdefault("num_key_value_heads", heads)
        if "head_dim" not in sizes and not family.head_dim and sizes["hidden_size"] % heads:
            raise UnsupportedModelError(
                f"head_dim is missing and hidden_size {sizes['hidden_size']} is not a multiple of num_attention_heads "
                f"{heads}"
            )
        sizes.setdefault("head_dim", family.head_dim or sizes["hidden_size"] // heads)
        tied = decoder.get("tie_word_embeddings", config.get("tie_word_embeddings", family.tied))
        if not isinstance(tied, bool):
            raise UnsupportedModelError(f"tie_word_embeddings is {_show(tied)}: must be true or false")
        return cls(model_type=str(decoder["model_type"]), tie_word_embeddings=tied, **sizes)

    @property
    def family(self) -> Family:
        """The model's family."""
        return FAMILIES[self.model_type]

    @property
    def widths(self) -> Widths:
        """Widths of a block."""
        return Widths(
            self.hidden_size,
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
            self.intermediate_size,
        )

    @property
    def projections(self) -> Linears:
        """Input and output features of each linear layer of one block, by name."""
        return self.family.linears(self.widths)

    @property
    def linear_parameters(self) -> int:
        """Parameters of the blocks' linear layers: what is quantized to 4-bit."""
        return self.num_hidden_layers * sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def embedding_parameters(self) -> int:
        """Parameters of embedding and output layer, which stay in 16 bit.

        They are one matrix when tied.
        """
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)


def missing_sizes(names: Sequence[str]) -> str:
    """Return the error of a config.json without these sizes."""
    are = "is" if len(names) == 1 else "are"
    return f"{', '.join(names)} {are} missing in the model's config.json: take the file as its publisher has it"


def mixes_experts(config: Mapping[str, object]) -> bool:
    """Whether the model of that `config.json` has experts that each take some tokens."""
    return bool(_expert_counts(_decoder(config)))


def _decoder(config: Mapping[str, object]) -> Mapping[str, object]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _expert_counts(decoder: Mapping[str, object]) -> dict[str, int]:
    counts = {field: decoder.get(field) for field in _EXPERT_COUNTS}
    return {field: count for field, count in counts.items() if isinstance(count, int) and count > 1}


def _known_family(decoder: Mapping[str, object]) -> Family:
    """The family of a parsed `config.json`. Raises UnlistedModelError without one."""
    for field, experts in _expert_counts(decoder).items():
        raise UnlistedModelError(f"{field} is {min(experts, 10**9)}: a mixture of experts is not listed; {_SUPPORTED}")
    model_type = decoder.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        found = "missing" if model_type is None else _show(model_type)
        raise UnlistedModelError(f"model_type is {found}; {_SUPPORTED}")
    return family
