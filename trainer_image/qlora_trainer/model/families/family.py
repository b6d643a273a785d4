"""The findings about a base model, and the settings that they exclude. Loads no torch."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from qlora_api.automatic import SIZED, ModelFacts
from qlora_api.spec.output import OutputSpec
from qlora_api.spec.training import TrainingSpec
from qlora_trainer.core.failures import StepFailure, bad_configuration

ALTERNATIVE = (
    "choose a model of a family that is trained, such as Llama, Mistral, Qwen3, Gemma, Phi-3, OLMo 2 or Granite"
)


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The findings that decide which settings a job may have."""

    model_type: str
    one_row: bool
    """Whether a sequence must have one row, as others had an effect in a small model."""
    mixture_of_experts: bool = False
    """Whether tokens are routed to experts. These are in 4-bit, without an adapter."""
    longest_row: int | None = None
    """Tokens that the model has positions for, None if its configuration has no limit."""
    same_rotation_up_to: int | None = None
    """Tokens of a row beyond which all rows of its sequence rotate differently."""
    sizes: ModelFacts | None = None
    """Those that decide settings; None if they are not known without the trainer."""

    def keeps_rows_apart(self, row_tokens: int | None) -> bool:
        """Whether rows of up to `row_tokens` tokens can share a sequence without effect.

        None for a length that the rows will decide: whether rows of any length can.
        """
        return not self.one_row and (row_tokens is None or row_tokens <= (self.same_rotation_up_to or row_tokens))

    def packs(self, training: TrainingSpec) -> bool:
        """Whether the job packs rows or leaves it open, and they have no effect on each other."""
        return training.may_pack and self.keeps_rows_apart(training.max_sequence_length)

    def require_sizes(self, left_open: Collection[str]) -> ModelFacts:
        """Return the sizes that decide these settings. Raises StepFailure if they are not known."""
        if self.sizes is not None:
            return self.sizes
        if not SIZED.isdisjoint(left_open):
            raise bad_configuration(
                f"the sizes of model_type {self.model_type!r} are not known without the trainer, and "
                "spec.training.learningRate follows from them: set it and spec.lora.rank, or install the trainer"
            )
        # No other setting follows them.
        return ModelFacts(width=1, weights_per_rank=1)

    def parameters_of_token(self, parameters: int | None) -> int | None:
        """Weights that each token is multiplied by, out of all; None if unknown."""
        return None if self.mixture_of_experts else parameters

    def context_for(self, training: TrainingSpec) -> int | None:
        """Return the most tokens of a row that the run can train on, None for any number.

        Both answers of a pair are in one sequence, apart.
        """
        limits = (self.longest_row, self.same_rotation_up_to if training.compares_answers else None)
        return min((limit for limit in limits if limit is not None), default=None)

    def require(self, training: TrainingSpec, output: OutputSpec) -> None:
        """Raise StepFailure if the model cannot be trained and published so."""
        if training.max_sequence_length is not None:
            self._require_positions(training.max_sequence_length)
        if not self.keeps_rows_apart(training.max_sequence_length):
            if training.compares_answers:
                raise cannot_compare_answers(self.model_type)
            if training.micro_batch_size is not None and training.micro_batch_size > 1:
                raise cannot_keep_rows_apart(self.model_type)
        if self.mixture_of_experts:
            _require_unmerged(self.model_type, output)
        _require_possible_rate(training)

    def remarks(self, training: TrainingSpec) -> Iterator[str]:
        """Yield what is done otherwise than the job asks."""
        if training.may_pack and not self.packs(training):
            yield (
                f"no packing: rows in one sequence would affect each other in this {self.model_type} model; each is a "
                "separate sequence, so that short rows take more steps for the same tokens"
            )

    def _require_positions(self, row_tokens: int) -> None:
        if self.longest_row is not None and row_tokens > self.longest_row:
            raise bad_configuration(
                f"spec.training.maxSequenceLength is {row_tokens}, but the model (model_type {self.model_type!r}) has "
                f"positions for {self.longest_row} tokens (max_position_embeddings): set it to {self.longest_row} or "
                "less, or name a model with a longer context"
            )


@dataclass(frozen=True, kw_only=True)
class Family(Traits):
    """The findings about a base model before any of its weights is read."""

    target_modules: tuple[str, ...]
    """Exact, sorted module names that get an adapter."""
    vocabulary: int
    """Tokens that it has embeddings for."""
    quantized_fraction: float
    """Share of 4-bit layers in the parameters outside embeddings and head."""
    attention: str
    """The model's `attn_implementation`: ours, or transformers' for single rows."""
    auto_class: str
    """The transformers class whose layers have the adapter's names."""
    fixed_positions: int | None = None
    """Tokens beyond which it computes no row, or None, as with rotary positions."""
    without_adapter: tuple[str, ...] = ()
    """Linear layers that get no adapter: no gradient reaches it, or PEFT rejects them."""
    experts_in_mxfp4: bool = False
    """Whether these are in MXFP4, as they were published, and stay so."""
    idle_parameters: int | None = 0
    """Weights of the experts that a token is not routed to; None if unknown."""
    without_dora: tuple[str, ...] = ()
    """Linear layers without an adapter, since PEFT with DoRA takes them for experts."""

    def parameters_of_token(self, parameters: int | None) -> int | None:
        """Weights that each token is multiplied by, out of all; None if unknown."""
        if parameters is None or self.idle_parameters is None:
            return None
        return parameters - self.idle_parameters

    def remarks(self, training: TrainingSpec) -> Iterator[str]:
        """Yield what is done otherwise than the job asks."""
        if self.without_adapter:
            counts = Counter(name.rpartition(".")[2] for name in self.without_adapter)
            adapted = _last_parts(self.target_modules)
            # With a count where others have an adapter.
            names = (f"{name} of {counts[name]} blocks" if name in adapted else name for name in sorted(counts))
            yield f"no adapter on {', '.join(names)}: no gradient reaches it, or PEFT rejects it"
        if self.without_dora:
            yield (
                f"no adapter on {', '.join(_last_parts(self.without_dora))}: with spec.lora.useDora, PEFT cannot "
                "distinguish these layers from routed experts"
            )
        yield from Traits.remarks(self, training)


def cannot_keep_rows_apart(model_type: str) -> StepFailure:
    """The failure of a job with several rows a micro batch, of a model that needs one."""
    return bad_configuration(
        f"model_type {model_type!r} cannot keep the rows of a batch apart: set spec.training.microBatchSize to 1, and "
        "set batchSize or raise gradientAccumulationSteps instead"
    )


def cannot_compare_answers(model_type: str) -> StepFailure:
    """The failure of a job that compares two answers, of a model that needs one row."""
    return bad_configuration(
        f"model_type {model_type!r} cannot keep the rows of a batch apart, and spec.training.objective compares two "
        "answers in one pass: set objective to supervised, or use a model whose rows can share a sequence"
    )


def _require_possible_rate(training: TrainingSpec) -> None:
    rate, factor = training.learning_rate, training.learning_rate_multiplier
    if rate is not None and factor is not None and rate > 1:
        raise bad_configuration(
            f"spec.training.learningRateMultiplier is {factor:g}, which makes a learning rate of {rate:g} for this "
            f"model, and the highest is 1: set it to {int(factor / rate)} or less"
        )


def _require_unmerged(model_type: str, output: OutputSpec) -> None:
    mixture = f"the model (model_type {model_type!r}) is a mixture of experts"
    if output.merged is not None:
        raise bad_configuration(
            f"spec.output.merged: {mixture}, and no adapter is merged into these: leave it out, and serve the "
            "adapter with its base"
        )
    if output.base is not None:
        raise bad_configuration(
            f"spec.output.base: {mixture}, and no server reads experts as they are in its 4-bit base: leave it out"
            if output.base.written_type == "quantized"
            else f"spec.output.base: {mixture}, whose experts are not dequantized: leave it out"
        )


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
