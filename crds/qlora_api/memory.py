"""Estimates the GPU memory of a QLoRA training run from a model's configuration, before any weight is downloaded.

Pure arithmetic: sizes are bytes unless a name says otherwise, and one GB of a published figure is 1e9 bytes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from qlora_api.model_shape import PROJECTIONS as PROJECTIONS
from qlora_api.model_shape import ModelShape as ModelShape
from qlora_api.model_shape import UnsupportedModelError as UnsupportedModelError

Optimizer = Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw"]
Verdict = Literal["fits", "tight", "exceeds"]

GIB = 2**30
ALL_LINEAR = frozenset({"all-linear"})

_CONTEXT_BYTES = 600_000_000
# NF4 with one 32-bit constant per block of 64; double quantization makes it an 8-bit constant plus a 32-bit one per
# 256 blocks (arXiv 2305.14314, section 3): 4.5 and 4.127 bits per parameter.
_BITS_SINGLE = 4 + 32 / 64
_BITS_DOUBLE = 4 + 8 / 64 + 32 / (64 * 256)
_OPTIMIZERS: tuple[Optimizer, ...] = ("paged_adamw_32bit", "paged_adamw_8bit", "adamw")
# bitsandbytes keeps smaller state tensors in ordinary device memory.
_SMALLEST_PAGED_TENSOR = 100_000

_LOW_FACTOR = 0.90
_HIGH_FACTOR = 1.25
_ADMISSION_MARGIN = 1.07
_USABLE_SHARE = 0.98

_SHORTEST_SEQUENCE = 256
_SMALLEST_RANK = 8
# A change that saves less than this share is noise beside the estimate's own error.
_WORTHWHILE_SAVING = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingShape:
    """Settings of a run that decide its memory. Raises ValueError, naming the field, for an impossible value.

    The defaults are what the trainer of this project does: norms and embeddings stay in 16 bit, adapters are stored in
    32 bit and multiplied in 16 bit, the loss goes over chunks of tokens. The last two fields exist to describe other
    trainers, whose published peaks test the formula.
    """

    rank: int = 64
    adapter_bytes: Literal[2, 4] = 4
    """Bytes per adapter weight and per gradient entry: 2 is bfloat16, 4 is float32."""
    target_modules: frozenset[str] = ALL_LINEAR
    """`{"all-linear"}`, or names out of PROJECTIONS."""
    micro_batch_size: int = 1
    sequence_length: int = 512
    """Tokens per sequence, padding included."""
    gradient_accumulation_steps: int = 16
    optimizer: Optimizer = "paged_adamw_32bit"
    double_quantization: bool = True
    gradient_checkpointing: bool = True
    dropout: float = 0.0
    loss_chunk_tokens: int | None = 1024
    """Tokens whose logits exist at the same time; None builds those of the whole micro batch."""
    upcast: bool = False
    """PEFT's `prepare_model_for_kbit_training`: embeddings, norms and with them the residual stream in 32 bit."""
    loss_bytes_per_logit: Literal[12, 16] = 12
    """Peak of transformers' cross-entropy: 12 measured with release 5.24, 16 fits figures of 2023 and 2024."""

    def __post_init__(self) -> None:
        counts = ("rank", "micro_batch_size", "sequence_length", "gradient_accumulation_steps", "loss_chunk_tokens")
        for field in counts:
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}: must be at least 1")
        for field, allowed in (
            ("adapter_bytes", (2, 4)),
            ("optimizer", _OPTIMIZERS),
            ("loss_bytes_per_logit", (12, 16)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}: must be one of {', '.join(map(str, allowed))}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: must be at least 0 and below 1")
        unknown = sorted(self.target_modules - set(PROJECTIONS))
        if self.target_modules != ALL_LINEAR and (unknown or not self.target_modules):
            found = ", ".join(unknown) or "empty"
            raise ValueError(
                f"target_modules is {found}: must be all-linear alone, or some of {', '.join(PROJECTIONS)}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch."""
        return self.micro_batch_size * self.sequence_length


@dataclass(frozen=True, slots=True)
class Component:
    """One row of a table of the estimate."""

    name: str
    label: str
    size: int
    """Bytes."""
    at_peak: bool
    """False for what is smaller than something else that it never meets on the card; such a row is not in the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Peak device memory of one GPU in bytes: its components, and what they add up to. See `estimate`."""

    context: int
    base_weights: int
    unquantized_weights: int
    adapters: int
    gradients: int
    optimizer: int
    checkpoints: int
    layer_working_set: int
    logits: int
    pageable_optimizer: int
    """The part of `optimizer` that the driver may move to host memory."""
    absent_at_peak: frozenset[str] = frozenset()
    """Names of components that are freed, or not yet allocated, when the peak is reached."""

    def components(self) -> tuple[Component, ...]:
        """The rows of a table, in a stable order; the sizes of those with `at_peak` add up to `expected`."""
        return tuple(
            Component(name, label, getattr(self, name), name not in self.absent_at_peak)
            for name, label in _LABELS.items()
        )

    @property
    def expected(self) -> int:
        """The formula's peak, with the optimizer's state wholly on the card."""
        return sum(component.size for component in self.components() if component.at_peak)

    @property
    def low(self) -> int:
        """What a run needs at the very least: 0.90 × `expected` after the pageable state has left the card.

        Of the 23 published peaks that test the formula none lies below 0.90 × its estimate.
        """
        return math.floor(_LOW_FACTOR * (self.expected - self.pageable_optimizer))

    @property
    def high(self) -> int:
        """What a run hardly ever exceeds: 1.25 × `expected`, which is above 22 of the 23 published peaks.

        The exception is 1.35 × its estimate, and it is unclear whether it counts reserved or allocated memory.
        """
        return math.ceil(_HIGH_FACTOR * self.expected)


_LABELS: Mapping[str, str] = {
    "context": "CUDA context and libraries",
    "base_weights": "Base weights in 4 bit",
    "unquantized_weights": "Embeddings and output layer",
    "adapters": "Adapter weights",
    "gradients": "Adapter gradients",
    "optimizer": "Optimizer state",
    "checkpoints": "Activation checkpoints",
    "layer_working_set": "Working set of the layers",
    "logits": "Logits and their gradient",
}


def estimate(model: ModelShape, training: TrainingShape) -> MemoryEstimate:
    """Estimate the peak device memory of training `model` with `training` on one GPU.

    With L layers, hidden width h (the attention's width where that is larger), MLP width f, key and value width k,
    vocabulary V, rank r, T tokens per micro batch, N adapter parameters of a bytes each:

        context               0.6 GB, a guess: CUDA context, cuBLAS and bitsandbytes workspaces
        base_weights          4.127 bits per linear parameter, 4.5 without double quantization
        unquantized_weights   2 bytes per embedding and output-layer parameter, 4 with upcast
        adapters, gradients   N·a each
        optimizer             8·N for 32-bit Adam, 2·N for 8-bit Adam, 2·N·a for PyTorch's Adam
        checkpoints           2·T·L·h, one input per layer; 4·T·L·h with upcast; 0 without gradient checkpointing
        layer_working_set     T·x for the one layer being recomputed and differentiated, for all L without
                              gradient checkpointing, plus 2·h·f for one dequantized matrix, where x is
                                21.7h + 12f + 3.7k + 12r   16-bit activations, no dropout
                                49.7h + 12f + 3.7k + 14r   with dropout: each adapted layer keeps its own masked input
                                84.7h + 24f + 7.7k + 27r   with upcast: 32-bit residual stream and adapters
        logits                12·V bytes per token: logits, their 32-bit copy and its gradient; at most a chunk's

        peak = context + base_weights + unquantized_weights + adapters + optimizer
               + (gradients + checkpoints when accumulating, else the larger) + max(layer_working_set, logits)

    Without accumulation the gradients come into being as the checkpoints are freed; the last layer's work begins when
    the loss is done. Without gradient checkpointing everything is counted, a little too much.

    Source: base weights from arXiv 2305.14314, section 3. The coefficients of x and the logits' 12 were fitted to live
    bytes of autograd over six Llama shapes (transformers 5.24, PEFT on all linear layers, bitsandbytes 0.50.2) on CPU.
    The mean absolute error over 23 published GPU peaks is below 8 %, more often too low than too high; a test holds
    the table. Attention must not build its T × T scores. Allocator fragmentation is not in: `verdict` adds a margin.
    """
    adapter_parameters, pageable_parameters = _adapter_parameters(model, training)
    state_bytes = _optimizer_bytes(training)
    layers = model.num_hidden_layers
    wide_bytes = 4 if training.upcast else 2
    bits = _BITS_DOUBLE if training.double_quantization else _BITS_SINGLE
    tokens_in_loss = min(training.tokens, training.loss_chunk_tokens or training.tokens)

    gradients = adapter_parameters * training.adapter_bytes
    checkpoints = wide_bytes * training.tokens * layers * model.hidden_size if training.gradient_checkpointing else 0
    working_layers = 1 if training.gradient_checkpointing else layers
    working_set = round(working_layers * training.tokens * _bytes_per_token_and_layer(model, training))
    working_set += 2 * model.hidden_size * model.intermediate_size
    logits = training.loss_bytes_per_logit * model.vocab_size * tokens_in_loss

    absent: set[str] = set()
    if training.gradient_checkpointing:
        absent.add("logits" if logits <= working_set else "layer_working_set")
        if training.gradient_accumulation_steps == 1:
            absent.add("gradients" if gradients <= checkpoints else "checkpoints")
    return MemoryEstimate(
        context=_CONTEXT_BYTES,
        base_weights=math.ceil(model.linear_parameters * bits / 8),
        unquantized_weights=model.embedding_parameters * wide_bytes,
        adapters=adapter_parameters * training.adapter_bytes,
        gradients=gradients,
        optimizer=adapter_parameters * state_bytes,
        checkpoints=checkpoints,
        layer_working_set=working_set,
        logits=logits,
        pageable_optimizer=pageable_parameters * state_bytes if training.optimizer.startswith("paged_") else 0,
        absent_at_peak=frozenset(absent),
    )


def _adapter_parameters(model: ModelShape, training: TrainingShape) -> tuple[int, int]:
    """Parameters of all adapters, and of those whose tensors are large enough to be paged."""
    targets = PROJECTIONS if training.target_modules == ALL_LINEAR else training.target_modules
    tensors = [training.rank * features for name in targets for features in model.projections[name]]
    pageable = [size for size in tensors if size >= _SMALLEST_PAGED_TENSOR]
    return model.num_hidden_layers * sum(tensors), model.num_hidden_layers * sum(pageable)


def _optimizer_bytes(training: TrainingShape) -> int:
    """Bytes of Adam's two moments per adapter parameter. PyTorch's own have the type of the parameter."""
    if training.optimizer == "adamw":
        return 2 * training.adapter_bytes
    return 2 if training.optimizer == "paged_adamw_8bit" else 8


def _bytes_per_token_and_layer(model: ModelShape, training: TrainingShape) -> float:
    """The x of `estimate`. It was measured with adapters on all linear layers, and is a little high for fewer."""
    hidden = max(model.hidden_size, model.num_attention_heads * model.head_dim)
    mlp, key, rank = model.intermediate_size, model.num_key_value_heads * model.head_dim, training.rank
    if training.upcast:
        return 84.7 * hidden + 24 * mlp + 7.7 * key + 27 * rank
    if training.dropout > 0:
        return 49.7 * hidden + 12 * mlp + 3.7 * key + 14 * rank
    return 21.7 * hidden + 12 * mlp + 3.7 * key + 12 * rank


def budget(card_gib: float) -> int:
    """Bytes that a process can allocate on a card of `card_gib` GiB: 0.98 of it, the rest is the driver's.

    Cards of 24, 48 and 80 GB offer 0.98 to 0.99 of their nominal GiB. On a card that pays for error correction out of
    its memory (a T4 offers 14.6 of 16) give the total that `nvidia-smi` shows. Raises ValueError unless positive.
    """
    if not (math.isfinite(card_gib) and card_gib > 0):
        raise ValueError(f"card_gib is {card_gib}: must be a positive number of GiB")
    return math.floor(_USABLE_SHARE * card_gib * GIB)


def verdict(memory: MemoryEstimate, card_gib: float) -> Verdict:
    """Judge whether a run of this estimate goes on a card of `card_gib` GiB; raises ValueError unless positive.

    `fits`: expected × 1.07, for fragmentation, is within the budget. `exceeds`: even the low bound is beyond it, so
    the run is refused. `tight`: anything between, where the run may start and the user is told.
    """
    available = budget(card_gib)
    if memory.expected * _ADMISSION_MARGIN <= available:
        return "fits"
    return "exceeds" if memory.low > available else "tight"


@dataclass(frozen=True, slots=True)
class Change:
    """One setting of a QLoRAJob to change: its path under `spec`, its value now and the value proposed."""

    setting: str
    current: str
    proposed: str


@dataclass(frozen=True, slots=True)
class Advice:
    """A step that makes a run smaller, taken on top of the steps before it."""

    changes: tuple[Change, ...]
    effect: str
    """What the step costs, in one sentence."""
    training: TrainingShape
    expected: int
    """Bytes after this step and all before it."""
    verdict: Verdict


def advice(model: ModelShape, training: TrainingShape, card_gib: float) -> tuple[Advice, ...]:
    """Settings to change, one after the other, until the run fits a card of `card_gib` GiB.

    First what costs time only, then what costs precision, then what cuts the data or the adapter; each no further than
    needed, and left out where it saves less than 1 %. Empty when the run fits already. When the last step's verdict is
    not `fits`, the model needs a larger card. Raises ValueError unless `card_gib` is positive.
    """
    steps: list[Advice] = []
    for effect, candidates in _REMEDIES:
        before = estimate(model, training)
        if verdict(before, card_gib) == "fits":
            break
        proposal = _mildest_that_fits(model, candidates(training), card_gib)
        if proposal is None:
            continue
        after = estimate(model, proposal)
        judged = verdict(after, card_gib)
        if judged != "fits" and after.expected > before.expected * (1 - _WORTHWHILE_SAVING):
            continue
        steps.append(Advice(_changes(training, proposal), effect, proposal, after.expected, judged))
        training = proposal
    return tuple(steps)


def _mildest_that_fits(model: ModelShape, candidates: Iterator[TrainingShape], card_gib: float) -> TrainingShape | None:
    """The first candidate that fits, else the last one, else None."""
    candidate = None
    for candidate in candidates:
        if verdict(estimate(model, candidate), card_gib) == "fits":
            break
    return candidate


def _set(field: str, value: Any) -> Callable[[TrainingShape], Iterator[TrainingShape]]:
    def candidates(training: TrainingShape) -> Iterator[TrainingShape]:
        if getattr(training, field) != value:
            yield replace(training, **{field: value})

    return candidates


def _halve(field: str, smallest: int) -> Callable[[TrainingShape], Iterator[TrainingShape]]:
    def candidates(training: TrainingShape) -> Iterator[TrainingShape]:
        value = getattr(training, field) // 2
        while value >= smallest:
            yield replace(training, **{field: value})
            value //= 2

    return candidates


def _smaller_micro_batches(training: TrainingShape) -> Iterator[TrainingShape]:
    size = training.micro_batch_size
    for smaller in range(size - 1, 0, -1):
        if size % smaller == 0:
            steps = training.gradient_accumulation_steps * (size // smaller)
            yield replace(training, micro_batch_size=smaller, gradient_accumulation_steps=steps)


_REMEDIES: tuple[tuple[str, Callable[[TrainingShape], Iterator[TrainingShape]]], ...] = (
    ("Activations are computed twice: slower, the same result.", _set("gradient_checkpointing", True)),
    ("The batch stays the same in more, smaller parts: slower, the same result.", _smaller_micro_batches),
    ("The quantization constants are quantized too: no measurable loss.", _set("double_quantization", True)),
    ("Adam's moments are kept in 8 bit: results hardly differ.", _set("optimizer", "paged_adamw_8bit")),
    ("Longer rows are left out of the training.", _halve("sequence_length", _SHORTEST_SEQUENCE)),
    ("The adapter holds less; lower lora.alpha in proportion to keep its scale.", _halve("rank", _SMALLEST_RANK)),
    ("Adapter weights have no 32-bit copy: small updates are lost to rounding.", _set("adapter_bytes", 2)),
)

_SPEC_PATHS: Mapping[str, str] = {
    "gradient_checkpointing": "training.gradientCheckpointing",
    "micro_batch_size": "training.microBatchSize",
    "gradient_accumulation_steps": "training.gradientAccumulationSteps",
    "double_quantization": "quantization.doubleQuant",
    "optimizer": "training.optimizer",
    "sequence_length": "training.maxSequenceLength",
    "rank": "lora.rank",
    "adapter_bytes": "lora.dtype",
}


def _changes(before: TrainingShape, after: TrainingShape) -> tuple[Change, ...]:
    """The settings in which two training shapes differ, as paths and values of a QLoRAJob's spec."""
    changed = [field.name for field in fields(before) if getattr(before, field.name) != getattr(after, field.name)]
    return tuple(
        Change(_SPEC_PATHS[name], _spec_value(name, getattr(before, name)), _spec_value(name, getattr(after, name)))
        for name in changed
    )


def _spec_value(name: str, value: object) -> str:
    if name == "adapter_bytes":
        return "bfloat16" if value == 2 else "float32"
    return str(value).lower()
