"""Adds up the GPU memory of a QLoRA training run from weights and activations.

Weights are counted, activations are measured. Pure arithmetic: sizes are bytes unless a name has another unit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from qlora_api.memory.training_shape import TrainingShape
from qlora_api.memory.weights import WeightCounts

GIB = 2**30
_CONTEXT_BYTES, _LEAST_CONTEXT_BYTES = 600_000_000, 350_000_000
UNSURE_CONTEXT_BYTES = _CONTEXT_BYTES - _LEAST_CONTEXT_BYTES
"""The part of the context that a GPU may need less of."""
# Of a communicator and its channels: 544 MB between two A100 and 688 MB between four (NVIDIA/nccl, issue 964), 1.06 GB
# between eight H100 (issue 1685).
_NCCL_BYTES, _NCCL_BYTES_OF_TWO = 1_060_000_000, 544_000_000
# NF4 with one 32-bit constant per block of 64; double quantization makes it an 8-bit constant plus a 32-bit one per
# 256 blocks (arXiv 2305.14314, section 3): 4.5 and 4.127 bits per parameter.
_WEIGHT_BITS = 4
# Two values a byte and a scale of one byte per group of 32 (OCP Microscaling Formats 1.0).
_MXFP4_BITS = 4 + 8 / 32
_CONSTANT_BITS_SINGLE = 32 / 64
_CONSTANT_BITS_DOUBLE, _OUTER_BITS = 8 / 64, 32 / (64 * 256)
# Sharded blocks that are whole on a GPU at the same time: the one at work, and the next one, fetched ahead.
_GATHERED_BLOCKS = 2
_LEAST_WORK = 0.80
"""The least share of the activations that a run needs: rows may be shorter, and experts have fewer tokens."""
_HIGH_FACTOR = 1.25


@dataclass(frozen=True, slots=True)
class Component:
    """One row of a table of the estimate."""

    name: str
    label: str
    size: int
    """Bytes."""
    at_peak: bool
    """False for a component smaller than one that is never on the GPU at the same time; not in the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Peak device memory of one GPU in bytes: its components, and their sum.

    See `combine`.
    """

    context: int
    base_weights: int
    gathered_blocks: int
    unquantized_weights: int
    adapters: int
    gradients: int
    optimizer: int
    checkpoints: int
    layer_working_set: int
    logits: int
    answers: int = 0
    pageable_optimizer: int
    """The part of `optimizer` that the driver may move to host memory."""
    absent_at_peak: frozenset[str] = frozenset()
    """Names of components that are freed, or not yet allocated, when the peak is reached."""

    def components(self) -> tuple[Component, ...]:
        """Return the rows of a table, in a stable order.

        The sizes of those with `at_peak` add up to `expected`.
        """
        return tuple(
            Component(name, label, getattr(self, name), name not in self.absent_at_peak)
            for name, label in _LABELS.items()
        )

    @property
    def expected(self) -> int:
        """The peak, with all of the optimizer's state on the GPU."""
        return sum(component.size for component in self.components() if component.at_peak)

    @property
    def low(self) -> int:
        """The lower bound: pages on the host, 0.35 GB of context, 0.80 × activations, and all weights and gradients."""
        work = sum(each.size for each in self.components() if each.at_peak and each.name in _WORK)
        unsure = self.context - _LEAST_CONTEXT_BYTES
        fixed = self.expected - self.pageable_optimizer - work - unsure
        # If they are not in the sum, the activations at the peak may be less than they are.
        gradients = self.gradients if "gradients" in self.absent_at_peak else 0
        return math.floor(fixed + max(_LEAST_WORK * work, gradients))

    @property
    def high(self) -> int:
        """The upper bound: 1.25 × `expected`, by the published peaks of docs/trainer/measurements.md."""
        return math.ceil(_HIGH_FACTOR * self.expected)


_LABELS: Mapping[str, str] = {
    "context": "CUDA context and libraries",
    "base_weights": "Base weights in 4-bit",
    "gathered_blocks": "Blocks gathered from the other GPUs",
    "unquantized_weights": "Embeddings and output layer",
    "adapters": "Trained weights",
    "gradients": "Gradients",
    "optimizer": "Optimizer state",
    "checkpoints": "Activation checkpoints",
    "layer_working_set": "Working set of the layers",
    "logits": "Logits and their gradient",
    "answers": "Answers that are scored",
}
_WORK = frozenset({"checkpoints", "layer_working_set", "logits", "answers"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes:
    """Bytes of one pass of the model, beyond weights and gradients."""

    checkpoints: int
    """Inputs of the blocks; 0 unless all are recomputed."""
    kept: int
    """What the blocks have kept when the loss is computed; 0 if all are recomputed."""
    layers: int
    """The most that the blocks take in the backward pass, `kept` included and `checkpoints` not."""
    logits: int
    """The most that the loss takes."""

    @classmethod
    def from_pass(cls, kept: int, loss: int, work: int, *, recomputes_all: bool) -> Self:
        """Count a pass by its bytes kept for backward, and more in loss and layers."""
        return cls(
            checkpoints=kept if recomputes_all else 0,
            kept=0 if recomputes_all else kept,
            layers=work if recomputes_all else kept + work,
            logits=loss,
        )


@dataclass(frozen=True, slots=True)
class AnswerBytes:
    """Bytes that an answer to a prompt takes beyond the weights, by its tokens."""

    per_token: int
    """Keys and values of all blocks, which are kept."""
    per_pair: int
    """Scores of one block's attention, for each pair of the prompt's tokens."""

    @classmethod
    def from_sizes(cls, blocks: int, heads: int, *, keys_and_values: int) -> Self:
        """Count for a model with these attention heads, and keys and values of a token in a block.

        transformers' attention builds the scores in 16 bit, their softmax in 32 bit, and that in 16 bit again.
        """
        return cls(per_token=2 * blocks * keys_and_values, per_pair=8 * heads)

    def of_longest(self, tokens: tuple[int, int] | None) -> int:
        """Return bytes of the longest answer by tokens: prompt, and both. 0 for None."""
        if tokens is None:
            return 0
        prompt, both = tokens
        return both * self.per_token + prompt**2 * self.per_pair


@dataclass(frozen=True, slots=True)
class CountedRun:
    """A run: what its model and adapter consist of, and its settings."""

    weights: WeightCounts
    training: TrainingShape


def combine(
    runs: Sequence[CountedRun], activations: Callable[[Sequence[TrainingShape]], ActivationBytes], answers: AnswerBytes
) -> MemoryEstimate:
    """The peak device memory of each GPU of one run, or of several runs on one base.

    `activations` gives those of a pass with a micro batch of each of some runs. In a step's first pass all take part,
    and there are no gradients yet. In later ones are those that accumulate, with the gradients of all. With N adapter
    parameters of a bytes each:

        context               0.6 GB, a guess: CUDA context, cuBLAS and bitsandbytes workspaces; with several GPUs,
                              NCCL's buffers too
        base_weights          4.127 bits per linear parameter, 4.5 without double quantization (arXiv 2305.14314,
                              section 3), 4.25 in MXFP4; when sharded, divided by the GPUs but for 0.002 bits of
                              the constants
        gathered_blocks       when sharded: what is divided of two blocks, the one at work and the next, with all of
                              their experts
        unquantized_weights   2 bytes per embedding and output-layer parameter; when sharded, divided by the GPUs unless
                              trained whole
        adapters, gradients   N·a each; modules trained whole, with their frozen originals, 2 bytes a parameter each
        optimizer             8·N for 32-bit Adam, 2·N for 8-bit Adam, 2·N·a for PyTorch's Adam
        checkpoints, layer_working_set, logits
                              `activations`
        answers               with gate.score, after training. Gradients and activations are gone then: the larger of
                              both counts

        peak = context + base_weights + gathered_blocks + unquantized_weights + adapters + optimizer
               + (gradients + checkpoints when accumulating, else the larger) + max(layer_working_set, logits)

    Without accumulation gradients appear as checkpoints are freed; the last layer's work begins after the loss.
    Allocator fragmentation is not in: `verdict` adds a margin.
    """
    trainings = [run.training for run in runs]
    accumulating = [training for training in trainings if training.gradient_accumulation_steps > 1]
    answering = max(answers.of_longest(training.answer_tokens) for training in trainings)
    passes = [_at_peak(runs, activations(trainings), answering, accumulated=False)]
    if accumulating:
        passes.insert(0, _at_peak(runs, activations(accumulating), answering, accumulated=True))
    return max(passes, key=lambda memory: memory.expected)


def without_activations(weights: WeightCounts, training: TrainingShape) -> MemoryEstimate:
    """Add up a run's weights, gradients and optimizer, less than its peak."""
    none = ActivationBytes(checkpoints=0, kept=0, layers=0, logits=0)
    return combine([CountedRun(weights, training)], lambda _: none, AnswerBytes(per_token=0, per_pair=0))


def _at_peak(
    runs: Sequence[CountedRun], activations: ActivationBytes, answering: int, *, accumulated: bool
) -> MemoryEstimate:
    """Return the peak of a pass. `accumulated`: with the gradients of earlier ones."""
    first, trained = runs[0], [_trained_bytes(run) for run in runs]
    gradients, optimizer, pageable = (sum(sizes) for sizes in zip(*trained, strict=True))
    base_weights, gathered_blocks = _base_weights(first.weights, first.training)
    layers, checkpointing = activations.layers, first.training.recomputed_blocks is None

    absent: set[str] = set()
    if activations.logits <= layers - activations.kept:
        absent.add("logits")
    elif checkpointing:
        absent.add("layer_working_set")
    else:
        layers = activations.kept
    if checkpointing and not accumulated:
        absent.add("gradients" if gradients <= activations.checkpoints else "checkpoints")
    works = {
        "gradients": gradients,
        "checkpoints": activations.checkpoints,
        "layer_working_set": layers,
        "logits": activations.logits,
    }
    if answering > sum(size for name, size in works.items() if name not in absent):
        absent |= works.keys()
    elif answering:
        absent.add("answers")
    return MemoryEstimate(
        context=_context_bytes(first.training.gpus),
        base_weights=base_weights,
        gathered_blocks=gathered_blocks,
        unquantized_weights=_unquantized_weights(first.weights, first.training),
        adapters=gradients,
        gradients=gradients,
        optimizer=optimizer,
        checkpoints=activations.checkpoints,
        layer_working_set=layers,
        logits=activations.logits,
        answers=answering,
        pageable_optimizer=pageable,
        absent_at_peak=frozenset(absent),
    )


def _context_bytes(gpus: int) -> int:
    """Return the bytes of libraries, with NCCL's buffers among several GPUs."""
    return _CONTEXT_BYTES + (0 if gpus == 1 else _NCCL_BYTES_OF_TWO if gpus == 2 else _NCCL_BYTES)


def _trained_bytes(run: CountedRun) -> tuple[int, int, int]:
    """The bytes of gradients, optimizer, and the optimizer's pageable part."""
    weights, training = run.weights, run.training
    state, whole_state = (_optimizer_bytes(training, size) for size in (training.adapter_bytes, 2))
    gradients = weights.adapter_parameters * training.adapter_bytes + weights.whole_parameters * 2
    whole = weights.whole_parameters * whole_state
    pageable = weights.pageable_parameters * state + whole if training.optimizer.startswith("paged_") else 0
    return gradients, weights.adapter_parameters * state + whole, pageable


def _base_weights(weights: WeightCounts, training: TrainingShape) -> tuple[int, int]:
    """Return bytes of quantized layers that stay on a GPU, and of gathered ones."""
    constant_bits = _CONSTANT_BITS_DOUBLE if training.double_quantization else _CONSTANT_BITS_SINGLE
    divided = weights.quantized_parameters * (_WEIGHT_BITS + constant_bits) / 8
    divided += weights.mxfp4_parameters * _MXFP4_BITS / 8
    whole = weights.quantized_parameters * _OUTER_BITS / 8 if training.double_quantization else 0
    if not _is_sharded(training):
        return math.ceil(divided + whole), 0
    share = weights.two_blocks or min(_GATHERED_BLOCKS / weights.blocks, 1)
    return math.ceil(divided / training.gpus + whole), math.ceil(share * divided)


def _unquantized_weights(weights: WeightCounts, training: TrainingShape) -> int:
    if not _is_sharded(training):
        return weights.unquantized_bytes
    return weights.unquantized_bytes - weights.vocabulary_bytes + math.ceil(weights.vocabulary_bytes / training.gpus)


def _is_sharded(training: TrainingShape) -> bool:
    return training.sharding == "full" and training.gpus > 1


def _optimizer_bytes(training: TrainingShape, parameter_bytes: int) -> int:
    """Return bytes of Adam's two moments per parameter, in PyTorch of its type."""
    if training.optimizer == "adamw":
        return 2 * parameter_bytes
    return 2 if training.optimizer == "paged_adamw_8bit" else 8
