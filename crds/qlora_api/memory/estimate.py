"""Estimates the GPU memory of a QLoRA training run from a model's configuration, before any weight is downloaded.

Pure arithmetic: sizes are bytes unless a name says otherwise, and one GB of a published figure is 1e9 bytes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from qlora_api.memory.answers import AnswerBytes
from qlora_api.memory.families import BlockBytes
from qlora_api.memory.model_shape import ModelShape
from qlora_api.memory.training_shape import TrainingShape

GIB = 2**30
_CONTEXT_BYTES = 600_000_000
# NF4 with one 32-bit constant per block of 64; double quantization makes it an 8-bit constant plus a 32-bit one per
# 256 blocks (arXiv 2305.14314, section 3): 4.5 and 4.127 bits per parameter.
_WEIGHT_BITS = 4
# Two values a byte and a scale of one byte per group of 32 (OCP Microscaling Formats 1.0).
_MXFP4_BITS = 4 + 8 / 32
_CONSTANT_BITS_SINGLE = 32 / 64
_CONSTANT_BITS_DOUBLE = 8 / 64 + 32 / (64 * 256)
SMALLEST_PAGED_TENSOR = 100_000
"""Parameters. bitsandbytes keeps the state of smaller tensors in ordinary device memory."""
# Sharded blocks that are whole on a GPU at the same time: the one at work, and the next one, fetched ahead.
_GATHERED_BLOCKS = 2
# Queries whose capped scores exist at the same time (qlora_trainer.model.kernels.attention), and bytes of each score.
_CAPPED_QUERIES = 256
_BYTES_PER_CAPPED_SCORE = 26
LOW_FACTOR = 0.80
"""Share of the expected peak, without what can be paged, below which no published peak is."""
_HIGH_FACTOR = 1.25


@dataclass(frozen=True, slots=True)
class Component:
    """One row of a table of the estimate."""

    name: str
    label: str
    size: int
    """Bytes."""
    at_peak: bool
    """False for what is smaller than something else that is never on the GPU at the same time; not in the sum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Peak device memory of one GPU in bytes: its components, and what they add up to. See `estimate`."""

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
        """The rows of a table, in a stable order; the sizes of those with `at_peak` add up to `expected`."""
        return tuple(
            Component(name, label, getattr(self, name), name not in self.absent_at_peak)
            for name, label in _LABELS.items()
        )

    @property
    def expected(self) -> int:
        """The formula's peak, with all of the optimizer's state on the GPU."""
        return sum(component.size for component in self.components() if component.at_peak)

    @property
    def low(self) -> int:
        """What a run needs at the very least: 0.80 × `expected` after the pageable state has moved to host memory.

        None of 46 published peaks of one GPU is below 0.80 × its estimate.
        """
        return math.floor(LOW_FACTOR * (self.expected - self.pageable_optimizer))

    @property
    def high(self) -> int:
        """What a run hardly ever exceeds: 1.25 × `expected`, which is above 45 of the 46 published peaks.

        The exception is 1.37 × its estimate, and it is unclear whether it counts reserved or allocated memory.
        """
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCounts:
    """What a model and its adapter consist of, whatever is trained on."""

    blocks: int
    quantized_parameters: int
    """In 4-bit layers."""
    unquantized_bytes: int
    """Of frozen weights that are not in 4-bit."""
    adapter_parameters: int
    pageable_parameters: int
    """Those of the adapter in tensors that are large enough to be paged."""
    whole_parameters: int
    """Of modules that are trained whole."""
    mxfp4_parameters: int = 0
    """Of experts in MXFP4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationBytes:
    """Bytes of one pass of the model, beyond weights and gradients."""

    checkpoints: int
    """Inputs of the blocks; 0 without gradient checkpointing."""
    kept: int
    """What the blocks have kept when the loss is computed; 0 with gradient checkpointing."""
    layers: int
    """The most that the blocks take in the backward pass, `kept` included and `checkpoints` not."""
    logits: int
    """The most that the loss takes."""

    @classmethod
    def of_measured(cls, *, kept: int, loss: int, work: int, gradient_checkpointing: bool) -> Self:
        """Of a pass that keeps so many bytes for the backward pass, and takes more for the loss, and in the layers."""
        return cls(
            checkpoints=kept if gradient_checkpointing else 0,
            kept=0 if gradient_checkpointing else kept,
            layers=work if gradient_checkpointing else kept + work,
            logits=loss,
        )


def estimate(model: ModelShape, training: TrainingShape) -> MemoryEstimate:
    """Estimate the peak device memory of training `model` with `training` on each of its GPUs.

    With L layers, hidden width h, vocabulary V, T tokens per micro batch, N adapter parameters of a bytes each:

        context               0.6 GB, a guess: CUDA context, cuBLAS and bitsandbytes workspaces
        base_weights          4.127 bits per linear parameter, 4.5 without double quantization; when sharded, the 4 bits
                              are divided by the GPUs, the constants are not (bitsandbytes keeps them outside)
        gathered_blocks       when sharded: the 4 bits of two blocks, the one at work and the next
        unquantized_weights   2 bytes per embedding and output-layer parameter, 4 with upcast
        adapters, gradients   N·a each; modules trained whole, beside their frozen originals, 2 bytes a parameter each
        optimizer             8·N for 32-bit Adam, 2·N for 8-bit Adam, 2·N·a for PyTorch's Adam
        checkpoints           2·T·L·h, one input per layer; 4·T·L·h with upcast; 0 without gradient checkpointing
        layer_working_set     T·x for the one layer being recomputed and differentiated, or T·y and its largest linear
                              layer dequantized; without gradient checkpointing T·y more for each of the other layers
        answers               with gate.score, after training: 2 bytes for each key and value of prompt and answer, and
                              8 bytes per attention head for each pair of the prompt's tokens. Gradients and what
                              training works with are gone then: the larger of both counts
        logits                6·V bytes per token of a chunk: the logits in 16-bit, and in 32-bit what becomes their
                              gradient; plus the last states with their gradient and what the final norm keeps, 8·T·h.
                              In other trainers 12·V: log-probabilities in 32-bit and two gradients; plus 6·T·h, 9·T·h
                              with upcast, 10·T·h with a chunked loss

        peak = context + base_weights + gathered_blocks + unquantized_weights + adapters + optimizer
               + (gradients + checkpoints when accumulating, else the larger) + max(layer_working_set, logits)

    x and y are the family's bytes per token (FAMILIES), plus 12 per rank, 14 with dropout. Without accumulation
    gradients appear as checkpoints are freed; the last layer's work begins after the loss.
    Source: arXiv 2305.14314, section 3, for base weights; dry runs of the real layers for x and y, which
    benchmarks.memory_table reads off. test_memory_points.py compares it with published GPU peaks. Allocator
    fragmentation is not in: `verdict` adds a margin. Nor is what FlashAttention takes for each row: a Llama's MLP
    takes more unless rows are very short.
    """
    return estimate_together(model, [training])


def estimate_together(model: ModelShape, trainings: Sequence[TrainingShape]) -> MemoryEstimate:
    """Estimate the peak of runs that are trained together on one base, as `estimate` does for one.

    Base and context are there once. Each run adds its adapter, gradients and optimizer state. The micro batches of all
    go through the model in one pass, so checkpoints and working set are those of the sum of their tokens. Of the
    logits, those of one run's chunk exist at a time, and the last states of all.
    """
    runs = [CountedRun(_counted(model, training), training) for training in trainings]
    answers = AnswerBytes.of(model.num_hidden_layers, model.num_attention_heads, keys_and_values=2 * model.widths.key)
    return combined(runs, lambda passing: _activations(model, passing), answers)


def _counted(model: ModelShape, training: TrainingShape) -> WeightCounts:
    adapter, whole, pageable = _trained_parameters(model, training)
    return WeightCounts(
        blocks=model.num_hidden_layers,
        quantized_parameters=model.linear_parameters,
        unquantized_bytes=model.embedding_parameters * (4 if training.upcast else 2),
        adapter_parameters=adapter,
        pageable_parameters=pageable,
        whole_parameters=whole,
    )


def _activations(model: ModelShape, trainings: Sequence[TrainingShape]) -> ActivationBytes:
    """Of a pass with a micro batch of each run."""
    first = trainings[0]
    inputs = model.num_hidden_layers if first.gradient_checkpointing else 0
    layers, kept = _layer_working_set(model, trainings)
    return ActivationBytes(
        checkpoints=(4 if first.upcast else 2) * _tokens(trainings) * inputs * model.hidden_size,
        kept=kept,
        layers=layers,
        logits=_loss_working_set(model, trainings),
    )


def _tokens(trainings: Sequence[TrainingShape]) -> int:
    return sum(training.tokens for training in trainings)


@dataclass(frozen=True, slots=True)
class CountedRun:
    """A run: what its model and adapter consist of, and its settings."""

    weights: WeightCounts
    training: TrainingShape


def combined(
    runs: Sequence[CountedRun],
    activations: Callable[[Sequence[TrainingShape]], ActivationBytes],
    answers: AnswerBytes,
) -> MemoryEstimate:
    """The peak of one run, or of several on one base: what is on the GPU at the same time. See `estimate`.

    `activations` gives those of a pass with a micro batch of each of some runs. In a step's first pass all take part,
    and there are no gradients yet. In later ones are those that accumulate, beside the gradients of all.
    """
    trainings = [run.training for run in runs]
    accumulating = [training for training in trainings if training.gradient_accumulation_steps > 1]
    answering = max(answers.of_longest(training.answer_tokens) for training in trainings)
    passes = [_at_peak(runs, activations(trainings), answering, accumulated=False)]
    if accumulating:
        passes.insert(0, _at_peak(runs, activations(accumulating), answering, accumulated=True))
    return max(passes, key=lambda memory: memory.expected)


def _at_peak(
    runs: Sequence[CountedRun], activations: ActivationBytes, answering: int, *, accumulated: bool
) -> MemoryEstimate:
    """The peak of a pass; `accumulated`: with the gradients of earlier ones."""
    first, trained = runs[0], [_trained_bytes(run) for run in runs]
    gradients, optimizer, pageable = (sum(sizes) for sizes in zip(*trained, strict=True))
    base_weights, gathered_blocks = _base_weights(first.weights, first.training)
    layers, checkpointing = activations.layers, first.training.gradient_checkpointing

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
        context=_CONTEXT_BYTES,
        base_weights=base_weights,
        gathered_blocks=gathered_blocks,
        unquantized_weights=first.weights.unquantized_bytes,
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


def _trained_bytes(run: CountedRun) -> tuple[int, int, int]:
    """Bytes of a run's gradients, which its trained weights take too, of its optimizer, and of what of it can page."""
    weights, training = run.weights, run.training
    state, whole_state = (_optimizer_bytes(training, size) for size in (training.adapter_bytes, 2))
    gradients = weights.adapter_parameters * training.adapter_bytes + weights.whole_parameters * 2
    whole = weights.whole_parameters * whole_state
    pageable = weights.pageable_parameters * state + whole if training.optimizer.startswith("paged_") else 0
    return gradients, weights.adapter_parameters * state + whole, pageable


def _base_weights(weights: WeightCounts, training: TrainingShape) -> tuple[int, int]:
    """Bytes of the quantized layers that stay on a GPU, and of those gathered from other GPUs for a while."""
    constant_bits = _CONSTANT_BITS_DOUBLE if training.double_quantization else _CONSTANT_BITS_SINGLE
    constants = weights.quantized_parameters * constant_bits / 8
    packed = weights.quantized_parameters * _WEIGHT_BITS / 8
    experts = weights.mxfp4_parameters * _MXFP4_BITS / 8
    if training.sharding == "none" or training.gpus == 1:
        return math.ceil(packed + constants + experts), 0
    gathered = min(_GATHERED_BLOCKS, weights.blocks) * packed / weights.blocks
    return math.ceil(packed / training.gpus + constants + experts), math.ceil(gathered)


def _trained_parameters(model: ModelShape, training: TrainingShape) -> tuple[int, int, int]:
    """Parameters of the adapter, of modules trained whole, and of the adapter's tensors large enough to be paged."""
    shapes = [model.projections[name] for name in training.targets(model)]
    tensors = [training.rank * features for shape in shapes for features in shape]
    if training.use_dora:
        tensors += [outputs for _, outputs in shapes]
    layers = min(training.adapted_layers or model.num_hidden_layers, model.num_hidden_layers)
    pageable = [size for size in tensors if size >= SMALLEST_PAGED_TENSOR]
    whole = len(training.whole_modules) * model.vocab_size * model.hidden_size
    return layers * sum(tensors), whole, layers * sum(pageable)


def _optimizer_bytes(training: TrainingShape, parameter_bytes: int) -> int:
    """Bytes of Adam's two moments per trained parameter. PyTorch's own have the type of the parameter."""
    if training.optimizer == "adamw":
        return 2 * parameter_bytes
    return 2 if training.optimizer == "paged_adamw_8bit" else 8


def _layer_working_set(model: ModelShape, trainings: Sequence[TrainingShape]) -> tuple[int, int]:
    """Bytes of the layers at the peak of the backward pass, and when it begins. Counted as if all were adapted.

    The layer at work takes the most of some moments: between two matmuls, in the matmul of each of its linear
    layers, whose weight is dequantized for it, and in attention if its scores have to be built. Without gradient
    checkpointing each layer keeps something from the forward pass on. With upcast the numbers are a fit over Llamas.
    """
    training, tokens = trainings[0], _tokens(trainings)
    ranks = sum(each.tokens * each.rank for each in trainings)
    block, widths = _block(model, training), model.widths
    layers = 0 if training.gradient_checkpointing else model.num_hidden_layers
    if training.upcast:
        hidden = max(widths.hidden, widths.query)
        size = tokens * (84.7 * hidden + 24 * widths.mlp + 7.7 * widths.key) + 27 * ranks
        dequantized = max(inputs * outputs for inputs, outputs in model.projections.values())
        return round(max(layers, 1) * size) + 2 * dequantized, round(layers * size)
    moments = block.backward_with_dropout if training.dropout else block.backward
    inners = (14 if training.dropout else 12) * ranks
    *_, last = model.projections
    adapted = training.targets(model) if training.dropout else frozenset[str]()
    # In 16-bit with a byte of mask; other trainers cast it to 32-bit.
    masked_bytes = 4 if training.composed else 3
    masked = {name: masked_bytes * inputs if name in adapted else 0 for name, (inputs, _) in model.projections.items()}
    kept = block.kept.at(widths) + sum(masked.values())
    # The backward pass begins with the MLP's last layer; what was kept inside the MLP is gone before the others' turn.
    at_work = {name: kept - masked[last] - (0 if name == last else block.kept.mlp * widths.mlp) for name in masked}
    largest = inners + max(
        tokens * max(moment.at(widths) for moment in moments),
        _capped_scores(model, trainings) + tokens * (kept - block.kept.mlp * widths.mlp),
        *(
            tokens * (at_work[name] + 2 * (widths.hidden + inputs + outputs)) + 2 * inputs * outputs
            for name, (inputs, outputs) in model.projections.items()
        ),
    )
    of_layer = tokens * kept + inners
    return max(layers - 1, 0) * of_layer + largest, layers * of_layer


def _block(model: ModelShape, training: TrainingShape) -> BlockBytes:
    if not training.composed:
        return model.family.block
    if model.family.composed is None:
        raise ValueError(
            f"composed is true: there are no numbers for the norms of a {model.model_type} in other trainers"
        )
    return model.family.composed


def _capped_scores(model: ModelShape, trainings: Sequence[TrainingShape]) -> int:
    """Bytes of the scores of a block of queries, for a family that caps them; a sequence is taken as one row."""
    if model.attn_logit_softcapping is None:
        return 0
    longest = max(training.sequence_length for training in trainings)
    queries = min(_CAPPED_QUERIES, longest)
    return _BYTES_PER_CAPPED_SCORE * model.num_attention_heads * queries * longest


def _loss_working_set(model: ModelShape, trainings: Sequence[TrainingShape]) -> int:
    """Bytes of the logits of a chunk, or of all tokens, and of the hidden states that are kept for the final norm."""
    training, tokens = trainings[0], _tokens(trainings)
    tokens_at_once = max(min(each.tokens, each.loss_chunk_tokens or each.tokens) for each in trainings)
    capped = model.final_logit_softcapping is not None
    if not training.composed:
        # In 16-bit and in 32-bit; a cap makes two more in 16-bit; a head that is trained has autograd's own loss.
        per_logit = (12 if "lm_head" in training.whole_modules else 6) + (4 if capped else 0)
        return per_logit * model.vocab_size * tokens_at_once + 8 * model.hidden_size * tokens
    # The cap keeps the output of its hyperbolic tangent, in 16-bit.
    per_logit = training.loss_bytes_per_logit + (2 if capped else 0)
    kept = 9 if training.upcast else 6
    whole = (per_logit * model.vocab_size + kept * model.hidden_size) * tokens
    kept = 9 if training.upcast else 10
    chunked = per_logit * model.vocab_size * tokens_at_once + kept * model.hidden_size * tokens
    return min(whole, chunked)
