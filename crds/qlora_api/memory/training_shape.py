"""The settings of a run that decide its memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qlora_api.contract import GPU_LOSS_CHUNK_TOKENS
from qlora_api.memory.model_shape import ModelShape

Optimizer = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"]
Sharding = Literal["none", "full"]
ALL_LINEAR = frozenset({"all-linear"})
WHOLE_MODULES = frozenset({"embed_tokens", "lm_head"})
"""Modules that can be trained whole."""
_OPTIMIZERS: tuple[Optimizer, ...] = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """Settings of a run that decide its memory. Raises ValueError, naming the field, for an impossible value.

    The defaults are what the trainer of this project does: norms and embeddings stay in 16-bit, adapters are stored in
    32-bit and multiplied in 16-bit, the loss is computed in chunks of tokens, and a norm is one operation. The last
    three fields describe other trainers, whose published peaks test the formula.
    """

    rank: int = 64
    adapter_bytes: Literal[2, 4] = 4
    """Bytes per adapter weight and per gradient entry: 2 is bfloat16, 4 is float32."""
    target_modules: frozenset[str] = ALL_LINEAR
    """`{"all-linear"}`, or names of linear layers in the blocks."""
    adapted_layers: int | None = None
    """Blocks that get an adapter; None means all."""
    use_dora: bool = False
    whole_modules: frozenset[str] = frozenset()
    """Names out of WHOLE_MODULES that are trained whole, on top of the adapter."""
    micro_batch_size: int = 1
    sequence_length: int = 512
    """Tokens per sequence, padding included."""
    gradient_accumulation_steps: int = 16
    optimizer: Optimizer = "paged_adamw_32bit"
    double_quantization: bool = True
    gradient_checkpointing: bool = True
    dropout: float = 0.0
    gpus: int = 1
    sharding: Sharding = "none"
    """`full`: each GPU holds a part of the quantized blocks, and all of everything else."""
    answer_tokens: tuple[int, int] | None = None
    """Of the longest answer that is scored after training: those of its prompt, and those of both; None without."""
    fixed: frozenset[str] = frozenset()
    """Names of fields that no advice may change."""
    loss_chunk_tokens: int | None = GPU_LOSS_CHUNK_TOKENS
    """Tokens whose logits exist at the same time; None builds those of the whole micro batch."""
    upcast: bool = False
    """PEFT's `prepare_model_for_kbit_training`: embeddings, norms and with them the residual stream in 32-bit."""
    composed: bool = False
    """transformers' own norms, each of several operations whose results are kept for the backward pass."""
    loss_bytes_per_logit: Literal[6, 12, 16] = 6
    """Of transformers' cross-entropy: 12 measured with release 5.24, 16 fits figures of 2023 and 2024."""

    def __post_init__(self) -> None:
        for field in _COUNTS:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}: must be at least 1")
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}: must be one of {', '.join(map(str, allowed))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: must be at least 0 and below 1")
        if self.whole_modules:
            _only("whole_modules", self.whole_modules, WHOLE_MODULES, "some of ")

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch."""
        return self.micro_batch_size * self.sequence_length

    def targets(self, model: ModelShape) -> frozenset[str]:
        """Names of the model's layers that get an adapter. Raises ValueError for one that it does not have."""
        linears = frozenset(model.projections)
        if self.target_modules == ALL_LINEAR:
            return linears
        _only("target_modules", self.target_modules, linears, f"for a {model.model_type} all-linear, or some of ")
        return self.target_modules


_COUNTS = (
    "rank",
    "micro_batch_size",
    "sequence_length",
    "gradient_accumulation_steps",
    "loss_chunk_tokens",
    "adapted_layers",
    "gpus",
)
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "adapter_bytes": (2, 4),
    "optimizer": _OPTIMIZERS,
    "sharding": ("none", "full"),
    "loss_bytes_per_logit": (6, 12, 16),
}


def _only(field: str, names: frozenset[str], allowed: frozenset[str], what: str) -> None:
    """Raise ValueError, naming `field`, unless `names` are some of `allowed`."""
    unknown = sorted(names - allowed)
    if unknown or not names:
        raise ValueError(f"{field} is {', '.join(unknown) or 'empty'}: must be {what}{', '.join(sorted(allowed))}")
