"""Stands in for dry runs: computes the activations of a Llama's blocks by arithmetic."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import GPU_LOSS_CHUNK_TOKENS
from qlora_api.memory.estimate import ActivationBytes, AnswerBytes, CountedRun, MemoryEstimate, combine
from qlora_api.memory.model_shape import ModelShape, mixes_experts
from qlora_api.memory.one_row import ONE_ROW_MODEL_TYPES
from qlora_api.memory.training_shape import TrainingShape
from qlora_api.memory.weights import count_weights
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.measured_memory import MeasuredMemory, MeasuredStep
from qlora_trainer.model.families import admission
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.memory import dry_run
from qlora_trainer.model.memory.dry_run import StepSize
from qlora_trainer.model.memory.fit import read_shape, training_shape, type_of_model
from qlora_trainer.steps.planned import listed_sizes


def estimate(model: ModelShape, training: TrainingShape) -> MemoryEstimate:
    """The estimate of one job."""
    return estimate_together(model, [training])


def estimate_together(model: ModelShape, trainings: Sequence[TrainingShape]) -> MemoryEstimate:
    """The estimate of jobs that are trained together."""
    runs = [CountedRun(count_weights(model, training), training) for training in trainings]
    return combine(runs, lambda passing: activations(model, passing), _answers(model))


def activations(model: ModelShape, trainings: Sequence[TrainingShape]) -> ActivationBytes:
    """Of a pass with a micro batch of each job."""
    recomputes = trainings[0].recomputed_blocks is None
    kept, loss, work = _pass(
        model,
        sum(training.tokens for training in trainings),
        max(min(training.tokens, GPU_LOSS_CHUNK_TOKENS) for training in trainings),
        recomputes,
    )
    return ActivationBytes.from_pass(kept, loss, work, recomputes_all=recomputes)


def _pass(model: ModelShape, tokens: int, tokens_of_chunk: int, checkpointing: bool) -> tuple[int, int, int]:
    """Bytes kept for the backward pass, of the loss, and of the block at work."""
    hidden, query, key, mlp = model.widths
    rest = 8 * hidden + 4 * query + 4 * key
    each = 2 * hidden if checkpointing else rest + 8 * mlp
    loss = 6 * model.vocab_size * tokens_of_chunk + 8 * hidden * tokens
    return model.num_hidden_layers * each * tokens, loss, (rest + 12 * mlp) * tokens


def _answers(model: ModelShape) -> AnswerBytes:
    layers, heads = model.num_hidden_layers, model.num_attention_heads
    return AnswerBytes.from_sizes(layers, heads, keys_and_values=2 * model.widths.key)


def measure(config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
    """A dry run of a model whose layers are listed."""
    model, training = _shape(config), training_shape(spec, spec.lora.target_modules)
    weights, answers = count_weights(model, training), _answers(model)
    steps = []
    for size in sizes:
        tokens = size.sequences * size.sequence_tokens
        kept, loss, work = _pass(model, tokens, min(tokens, GPU_LOSS_CHUNK_TOKENS), size.gradient_checkpointing)
        blocks = (kept // model.num_hidden_layers,) * model.num_hidden_layers
        steps.append(MeasuredStep(**asdict(size), kept=kept, loss=loss, work=work, blocks=blocks))
    return MeasuredMemory(
        **asdict(weights),
        digest=digest,
        rank=training.rank,
        answer_bytes_per_token=answers.per_token,
        answer_bytes_per_pair=answers.per_pair,
        steps=tuple(steps),
    )


def measure_passes(
    config: Path, specs: Sequence[ResolvedSpec], passes: Sequence[tuple[int, ...]]
) -> tuple[ActivationBytes, ...]:
    """Joint dry runs of some of the jobs each."""
    model, trainings = _shape(config), [training_shape(spec, spec.lora.target_modules) for spec in specs]
    return tuple(activations(model, [trainings[number] for number in numbers]) for numbers in passes)


def _shape(config: Path) -> ModelShape:
    model = read_shape(config)
    assert model is not None
    return model


def inspect(folder: Path, lora: LoraSpec) -> Family:
    """The traits of the listed family in the folder."""
    model_type = type_of_model(folder / "config.json")
    config = json.loads((folder / "config.json").read_bytes())
    return Family(
        model_type=model_type,
        one_row=model_type in ONE_ROW_MODEL_TYPES,
        mixture_of_experts=mixes_experts(config),
        target_modules=(),
        vocabulary=config.get("vocab_size", 1),
        quantized_fraction=1.0,
        attention="",
        auto_class="",
        sizes=listed_sizes(folder / "config.json", lora),
    )


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have commands use these instead of inspections and dry runs."""

    def within_limits(_function: Any, arguments: tuple[Any, ...], **_limits: Any) -> Any:
        *given, _family = arguments
        return measure_passes(*given) if len(given) == 3 else measure(*given)

    monkeypatch.setattr(dry_run, "_require_trainer", lambda: None)
    monkeypatch.setattr(dry_run, "within_limits", within_limits)
    monkeypatch.setattr(admission, "within_limits", lambda _function, arguments, **_limits: inspect(*arguments))
