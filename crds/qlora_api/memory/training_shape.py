"""The settings of a run that decide its memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"]
Sharding = Literal["none", "full"]
ALL_LINEAR = frozenset({"all-linear"})
WHOLE_MODULES = frozenset({"embed_tokens", "lm_head"})
"""Modules that can be trained whole."""
_OPTIMIZERS: tuple[Optimizer, ...] = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw")


@dataclass(frozen=True, slots=True)
class Recomputation:
    """The blocks whose activations are recomputed in the backward pass."""

    blocks: int | None = None
    """From the first; None means all."""
    offloads: bool = False
    """Whether their inputs are held in host memory until then."""


RECOMPUTE_ALL = Recomputation()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """Settings of a run that decide its memory, with the defaults of a QLoRAJob.

    Raises ValueError, naming the field, for an impossible value.
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
    recomputed_blocks: int | None = None
    """Blocks, from the first, whose activations are recomputed in the backward pass; None means all."""
    offloads_inputs: bool = False
    """Whether the inputs of these blocks are held in host memory, if all are recomputed."""
    dropout: float = 0.0
    gpus: int = 1
    sharding: Sharding = "none"
    """`full`: each GPU holds a part of the quantized blocks and of the vocabulary, and all of everything else."""
    answer_tokens: tuple[int, int] | None = None
    """Of the longest answer that is scored after training: those of its prompt, and those of both; None without."""
    has_batch_size: bool = False
    """Whether the job sets the sequences of a step, so that its accumulation steps follow the micro batch."""
    fixed: frozenset[str] = frozenset()
    """Names of fields that no advice may change."""

    def __post_init__(self) -> None:
        for field in _COUNTS:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}: must be at least 1")
        for field, allowed in _CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}: must be one of {', '.join(map(str, allowed))}")
        if self.recomputed_blocks is not None and self.recomputed_blocks < 0:
            raise ValueError(f"recomputed_blocks is {self.recomputed_blocks}: must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: must be at least 0 and below 1")
        if unknown := sorted(self.whole_modules - WHOLE_MODULES):
            raise ValueError(
                f"whole_modules is {', '.join(unknown)}: must be some of {', '.join(sorted(WHOLE_MODULES))}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch."""
        return self.micro_batch_size * self.sequence_length

    def recomputed_share(self, blocks: int | None) -> float:
        """The share of so many blocks whose activations are recomputed; None if their number is unknown."""
        if self.recomputed_blocks is None:
            return 1.0
        return self.recomputed_blocks / blocks if blocks else 0.0


_COUNTS = ("rank", "micro_batch_size", "sequence_length", "gradient_accumulation_steps", "adapted_layers", "gpus")
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "adapter_bytes": (2, 4),
    "optimizer": _OPTIMIZERS,
    "sharding": ("none", "full"),
}
