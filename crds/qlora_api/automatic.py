"""Chooses the settings that a job leaves open, from its rows and its model.

A setting of the job is kept, and the others follow it. All functions are pure: the same job, rows and model give the
same numbers in prepare and in `qlora plan --data`. `benchmarks/defaults` measures the rule.

Where it starts from: epochs by the number of rows as OpenAI's cookbook has them (Chat_finetuning_data_prep), the batch
of QLoRA (arXiv 2305.14314, section 5) for large data, and a learning rate that falls with the model's width: measured
at 576, and near the rates that QLoRA published for wide models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import TypeAlias

from qlora_api.choice import Choice
from qlora_api.memory.training_shape import RECOMPUTE_ALL, Recomputation
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.steps import FEW_STEPS, optimizer_steps

SHORTEST, LONGEST = 128, 131_072
"""Tokens of a sequence at least, and at most as the schema allows."""
_COMMON_LENGTH, _LEFT_OUT = 2048, 0.005
"""Above so many tokens, this share of the rows is left out: a single long row would make every step expensive."""
_FEW_ROWS, _MOST_HELD_OUT, _HELD_OUT = 100, 500, 0.1
_EPOCHS = ((8_333, 3), (12_500, 2))
"""Rows up to which so many epochs are made; one above."""
_MOST_EPOCHS = 10
_STEPS = 150
"""Optimizer steps that a run has at least, if the data allow it."""
_LARGEST_BATCH = 16
_MICRO_BATCH_TOKENS = 4096
_RANK, _HIGHEST_RANK = 16, 256
_ALPHA, _RSLORA_ALPHA = 32, 8
"""The adapter's output is multiplied by 2 at rank 16; a learning rate then suits every rank (arXiv 2106.09685, 4.1)."""
_RATE, _WIDTH, _EXPONENT = 3e-4, 4096, 1.1
_PREFERENCE_RATE = 10
"""By this factor lower is the learning rate of an objective that compares answers."""
_WARMUP, _MOST_WARMUP = 0.05, 100
_EVALUATIONS, _MOST_EVALUATIONS = 3, 50
ASSUMED = "assumed; the rows decide"
_OF_MODEL = frozenset({"training.learningRate", "training.scheduler", "lora.alpha"})
"""Settings that do not follow from the rows."""
SIZED = frozenset({"lora.rank", "training.learningRate"})
"""Settings that follow from the sizes of the model."""
_MICRO_BATCH, _ACCUMULATION = "training.microBatchSize", "training.gradientAccumulationSteps"
_HALVING = "training.autoMicroBatch"


@dataclass(frozen=True)
class RowFacts:
    """Counts of the rows that a job trains on."""

    rows: int
    sequences: int
    """Of one epoch, packed where the model can keep rows apart and the job allows it."""
    loss_tokens: int
    """Tokens that are trained on in one epoch."""
    held_out: bool
    """Whether other rows are held out."""


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of the model that decide settings."""

    width: int
    """Of its hidden states."""
    weights_per_rank: int
    """Weights that the adapter has for each unit of its rank."""


@dataclass(frozen=True)
class Limits:
    """Conditions of a run besides its rows and its model."""

    one_row: bool = False
    """Whether a micro batch must have one row."""
    group_size: int = 1
    """How many jobs are trained together in the same passes, itself included."""
    micro_batch: int | None = None
    """Sequences of a pass that the GPU has room for, None for any number."""
    recomputation: Recomputation = RECOMPUTE_ALL
    """Of the blocks whose activations the GPU has no room for, all if that is not known."""
    adapter: Mapping[str, int] | None = None
    """Rank and alpha of the adapter that the run starts from, if it starts from one."""


NO_LIMITS = Limits()
Choose: TypeAlias = Callable[[Limits], tuple[Choice, ...]]
"""Chooses all settings that a job leaves open."""


def choose_length(lengths: Sequence[int], context: int | None) -> Choice:
    """Choose the tokens of a sequence.

    `lengths`: of the rows to train on, in tokens. `context`: the model's positions, None for any number.
    """
    most = min(context or LONGEST, LONGEST)
    ordered = sorted(lengths)
    # No sequence holds the others: they decide nothing.
    usable = [tokens for tokens in ordered if tokens <= most] or ordered
    common = max(_COMMON_LENGTH, usable[ceil(len(usable) * (1 - _LEFT_OUT)) - 1])
    longest = max((tokens for tokens in usable if tokens <= common), default=most)
    length = min(most, max(SHORTEST, _power_of_two(longest)))
    left_out = sum(tokens > length for tokens in ordered)
    reason = f"the longest row has {ordered[-1]} tokens"
    if left_out:
        reason = f"leaves out {left_out} of {len(ordered)} rows, up to {ordered[-1]} tokens"
    return Choice.of("training.maxSequenceLength", length, reason)


def choose_held_out(spec: QLoRAJobSpec, rows: int) -> Choice | None:
    """Choose the share of held-out rows, None for none. `rows`: of all that are usable."""
    training = spec.training
    needed = training.keep == "best" or training.early_stopping is not None or training.eval_every_steps is not None
    if rows < (2 if needed else _FEW_ROWS):
        return None
    wanted = max(1, min(_MOST_HELD_OUT, round(rows * _HELD_OUT)))
    # Rounded for people; hold_out still takes exactly so many rows.
    return Choice.of("dataset.eval.fraction", float(f"{wanted / rows:.4g}"), f"{wanted} of {rows} rows")


def choose(
    spec: QLoRAJobSpec, sequence_length: int, rows: RowFacts, model: ModelFacts, limits: Limits = NO_LIMITS
) -> tuple[Choice, ...]:
    """Choose all other settings that the spec leaves open."""
    packing = _packing(spec, rows, limits)
    if packing is not None and packing.parsed is False:
        rows = replace(rows, sequences=rows.rows)
    epochs, batch = _epochs_and_batch(spec, rows)
    batches = tuple(_batches(spec, sequence_length, spec.training.batch_size or batch, limits))
    of_batch = {each.name: int(each.value) for each in batches if each.name != "autoMicroBatch"}
    per_step = (spec.training.micro_batch_size or of_batch["microBatchSize"]) * (
        spec.training.gradient_accumulation_steps or of_batch["gradientAccumulationSteps"]
    )
    passes = spec.training.epochs or (None if epochs is None else int(epochs.value))
    steps = optimizer_steps(rows.sequences, per_step, passes, spec.training.max_steps)
    return (
        *_lora(spec, rows, model, limits),
        *([] if packing is None else [packing]),
        *([] if epochs is None else [epochs]),
        *batches,
        *_checkpointing(spec, limits),
        *_rates(spec, model, steps),
        *_evaluations(spec, rows, steps, passes),
    )


def assume(spec: QLoRAJobSpec, model: ModelFacts, context: int | None, limits: Limits) -> tuple[Choice, ...]:
    """Assume the settings that a job leaves open for rows that are not known yet.

    `context`: the model's positions, None for any number.
    """
    length = spec.training.max_sequence_length or min(_COMMON_LENGTH, context or _COMMON_LENGTH)
    held_out = spec.dataset.eval is None or spec.dataset.holds_out
    many = RowFacts(_EPOCHS[0][0], _STEPS * _LARGEST_BATCH, loss_tokens=0, held_out=held_out)
    given = [Choice.of("training.maxSequenceLength", length, "")] if spec.training.max_sequence_length is None else []
    chosen = (*given, *choose(spec, length, many, model, limits))
    return tuple(each if each.setting in _OF_MODEL else _assumed(each) for each in chosen)


def _assumed(choice: Choice) -> Choice:
    return Choice(setting=choice.setting, value=choice.value, reason=ASSUMED)


def _lora(spec: QLoRAJobSpec, rows: RowFacts, model: ModelFacts, limits: Limits) -> Iterator[Choice]:
    lora, rank = spec.lora, spec.lora.rank
    if limits.adapter is not None:
        for name, value in limits.adapter.items():
            if getattr(lora, name) is None:
                yield Choice.of(f"lora.{name}", value, "as the adapter of lora.from")
        return
    if lora.initial_adapter is not None:
        # Where that adapter cannot be read yet.
        for name, value in (("rank", rank or _RANK), ("alpha", lora.alpha or _usual_alpha(spec))):
            if getattr(lora, name) is None:
                yield Choice.of(f"lora.{name}", value, "prepare takes that of lora.from")
        return
    if rank is None:
        rank = _RANK
        while rank * model.weights_per_rank < rows.loss_tokens and rank < _HIGHEST_RANK:
            rank *= 2
        yield Choice.of(
            "lora.rank", rank, f"{rank * model.weights_per_rank:,} weights for {rows.loss_tokens:,} trained tokens"
        )
    if lora.alpha is None:
        yield Choice.of("lora.alpha", _usual_alpha(spec), "the learning rate then suits every rank")


def _packing(spec: QLoRAJobSpec, rows: RowFacts, limits: Limits) -> Choice | None:
    """Choose whether sequences have several rows, if it is open. The sequences of `rows` have, where they can."""
    training = spec.training
    if training.packing is not None:
        return None
    if training.batch_size is not None:
        return Choice.of("training.packing", False, "batchSize counts rows")
    if limits.one_row:
        return Choice.of("training.packing", False, "the model cannot keep rows apart")
    passes = training.epochs or _MOST_EPOCHS
    few = training.max_steps is None and passes * _steps_of_epoch(spec, rows.sequences) < FEW_STEPS
    if few and rows.rows > rows.sequences:
        packed = f"{rows.sequences} sequence{'s' * (rows.sequences != 1)}"
        return Choice.of("training.packing", False, f"packed, {rows.rows:,} rows are only {packed}")
    return Choice.of("training.packing", True, "")


def _steps_of_epoch(spec: QLoRAJobSpec, sequences: int) -> int:
    """Count the optimizer steps of an epoch with the smallest batch that the spec allows."""
    training = spec.training
    smallest = (training.micro_batch_size or 1) * (training.gradient_accumulation_steps or spec.resources.gpu_count)
    return optimizer_steps(sequences, training.batch_size or smallest, 1, None)


def _epochs_and_batch(spec: QLoRAJobSpec, rows: RowFacts) -> tuple[Choice | None, int]:
    """Return the epochs, if they are to be chosen, and the sequences of a step, unless batchSize has them."""
    training, usual = spec.training, next((n for most, n in _EPOCHS if rows.rows <= most), 1)
    if training.max_steps is not None:
        return None, max(1, min(_LARGEST_BATCH, usual * rows.sequences // training.max_steps))
    epochs, chosen = training.epochs, None
    if epochs is None:
        of_epoch = _steps_of_epoch(spec, rows.sequences)
        epochs = min(_MOST_EPOCHS, max(usual, ceil(FEW_STEPS / of_epoch)))
        few = f"only {of_epoch} step{'s' * (of_epoch != 1)} in each"
        reason = f"{rows.rows:,} rows" if epochs == usual else few
        chosen = Choice.of("training.epochs", epochs, reason)
    return chosen, max(1, min(_LARGEST_BATCH, epochs * rows.sequences // _STEPS))


def _batches(spec: QLoRAJobSpec, length: int, batch: int, limits: Limits) -> Iterator[Choice]:
    training, gpus = spec.training, spec.resources.gpu_count
    micro, accumulation = training.micro_batch_size, training.gradient_accumulation_steps
    of_gpu, parts = ceil(batch / gpus), 1
    if micro is None:
        full = max(1, _MICRO_BATCH_TOKENS // (length * limits.group_size))
        of_pass = of_gpu if accumulation is None else max(1, batch // accumulation)
        # Equal passes: rounding up the last one would make fewer steps.
        micro, reason = of_pass // ceil(of_pass / full), f"up to {_MICRO_BATCH_TOKENS:,} tokens in a pass"
        if training.batch_size is not None:
            micro, reason = _divisor(batch, full, gpus), f"divides batchSize, {reason}"
        if micro == of_pass:
            reason = "the sequences of a step" if gpus == 1 else "the sequences of a step on each GPU"
        if limits.one_row:
            micro, reason = 1, "the model cannot keep rows apart"
        elif training.sharding == "full":
            micro, reason = 1, "the base is sharded"
        if limits.micro_batch is not None and limits.micro_batch < micro:
            # Without a rest: a step keeps its sequences.
            parts = next(n for n in range(2, micro + 1) if micro % n == 0 and micro // n <= limits.micro_batch)
            micro, reason = micro // parts, "fits the GPU"
        yield Choice.of(_MICRO_BATCH, micro, reason)
    if accumulation is None:
        accumulation = gpus * parts * max(1, batch // (gpus * parts * micro))
        if training.batch_size is not None:
            accumulation = batch // micro
        yield Choice.of(
            _ACCUMULATION,
            accumulation,
            f"sequences a step: {micro * accumulation}",
        )
    if training.auto_micro_batch is None:
        can_halve = training.micro_batch_size is None and micro > 1 and limits.group_size == 1
        yield Choice.of(_HALVING, can_halve, "")


def _divisor(batch: int, most: int, gpus: int) -> int:
    """Return the largest micro batch up to `most` that divides the batch and gives no GPU more rows than it has to."""
    divisors = (size for size in range(min(batch, most), 0, -1) if batch % size == 0)
    return min(divisors, key=lambda size: ceil(batch // size / gpus) * size)


def _checkpointing(spec: QLoRAJobSpec, limits: Limits) -> Iterator[Choice]:
    if spec.training.gradient_checkpointing is None:
        blocks = limits.recomputation.blocks
        reason = "there is room for all activations"
        if limits.recomputation.offloads:
            reason = "inputs of the blocks are held in host memory, too many for the GPU"
        elif blocks is None:
            reason = "room for activations is not known, or too small"
        elif blocks:
            of_first = f"the first {blocks} blocks" if blocks > 1 else "the first block"
            reason = f"{of_first}: there is room for the activations of the others"
        yield Choice.of("training.gradientCheckpointing", blocks != 0, reason)


def _usual_alpha(spec: QLoRAJobSpec) -> int:
    return _RSLORA_ALPHA if spec.lora.use_rslora else _ALPHA


def _rates(spec: QLoRAJobSpec, model: ModelFacts, steps: int) -> Iterator[Choice]:
    training = spec.training
    if training.learning_rate is None:
        rate, reason = _RATE * (_WIDTH / model.width) ** _EXPONENT, f"for a width of {model.width}"
        if training.compares_answers:
            rate /= _PREFERENCE_RATE
        rate = float(f"{rate:.2g}")
        if (factor := training.learning_rate_multiplier) is not None:
            rate, reason = float(f"{factor * rate:.6g}"), f"{factor:g} times {rate:g}, {reason}"
        yield Choice.of("training.learningRate", rate, reason)
    if training.scheduler is None:
        yield Choice.of("training.scheduler", "linear", "falls to 0 at the end")
    if training.warmup_steps is None:
        warmup = max(1, min(_MOST_WARMUP, round(_WARMUP * steps))) if steps > 1 else 0
        reason = f"of {steps} steps" if warmup == _MOST_WARMUP else f"{_WARMUP:.0%} of {steps} steps"
        yield Choice.of("training.warmupSteps", warmup, reason)


def _evaluations(spec: QLoRAJobSpec, rows: RowFacts, steps: int, epochs: int | None) -> Iterator[Choice]:
    training = spec.training
    every = training.eval_every_steps
    if every is None and rows.held_out:
        # With earlyStopping, often enough that it can end the run in its second half.
        stopping = training.early_stopping
        wanted = max(_EVALUATIONS, epochs or 1, 0 if stopping is None else 2 * (stopping.patience + 1))
        every = max(1, steps // min(_MOST_EVALUATIONS, wanted))
        yield Choice.of("training.evalEverySteps", every, f"of {steps} steps")
    if training.keep is None:
        best = rows.held_out and every is not None and every < steps
        yield Choice.of("training.keep", "best" if best else "last", "" if rows.held_out else "no rows are held out")


def _power_of_two(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
