"""The arms: settings by this project's rule, by the rules of others, and by hand. All functions are pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.defaults.tasks import Task
from qlora_api.automatic import ModelFacts, RowFacts, choose, choose_held_out, choose_length
from qlora_api.choice import Choice
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedLora, ResolvedTraining, fill, resolve

HAND, AUTOMATIC = "hand-tuned", "automatic"
SHORT = 128
"""Tokens of the sequences of the tuner by hand."""
_MOST_EPOCHS = 32


@dataclass(frozen=True)
class Settings:
    """The settings of a run that differ between arms."""

    epochs: int
    batch: int
    """Sequences of an optimizer step: rows, if they are not packed."""
    packed: bool
    length: int
    learning_rate: float
    scheduler: str
    warmup_steps: int
    rank: int
    alpha: int
    dropout: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 0.3
    held_out_rows: int = 0
    """Of the training rows, to keep the best adapter of those evaluated."""
    eval_every_steps: int | None = None

    def lora(self) -> ResolvedLora:
        """The adapter."""
        return ResolvedLora(rank=self.rank, alpha=self.alpha, dropout=self.dropout)

    def training(self, task: Task) -> ResolvedTraining:
        """The run, with one seed for all arms."""
        content: dict[str, Any] = {
            "objective": "dpo" if task.compares_answers else None,
            "epochs": self.epochs,
            "microBatchSize": self.batch,
            "gradientAccumulationSteps": 1,
            "autoMicroBatch": False,
            "learningRate": self.learning_rate,
            "scheduler": self.scheduler,
            "warmupSteps": self.warmup_steps,
            "weightDecay": self.weight_decay,
            "maxGradNorm": self.max_grad_norm,
            "maxSequenceLength": self.length,
            "gradientCheckpointing": False,
            "optimizer": "adamw",
        }
        return ResolvedTraining.model_validate({name: value for name, value in content.items() if value is not None})


@dataclass(frozen=True)
class Facts:
    """What a rule may look at, besides the task."""

    lengths: Sequence[int]
    """Tokens of each row."""
    count: Callable[[int, int], RowFacts]
    """Counts the rows of an epoch, given the tokens of a sequence and the held-out rows."""
    model: ModelFacts

    def steps(self, epochs: int, batch: int) -> int:
        """Count the optimizer steps of the tuner by hand."""
        return epochs * -(-self.count(SHORT, 0).sequences // batch)


def automatic(task: Task, facts: Facts) -> tuple[Settings, tuple[Choice, ...]]:
    """Return the settings of a job that leaves all of them open, and the choices."""
    objective = {"training": {"objective": "dpo"}} if task.compares_answers else {}
    spec = QLoRAJobSpec.model_validate(
        {"model": {"source": "hf://a/model"}, "dataset": {"source": "hf://a/rows"}, **objective}
    )
    of_length, share = choose_length(facts.lengths, None), choose_held_out(spec, len(facts.lengths))
    first = (of_length,) if share is None else (of_length, share)
    held_out = 0 if share is None else round(float(share.value) * len(facts.lengths))
    length = int(of_length.value)
    choices = (*first, *choose(fill(spec, first), length, facts.count(length, held_out), facts.model))
    found = resolve(spec, choices)
    training, best = found.training, found.training.keep == "best"
    return Settings(
        epochs=training.epochs or 1,
        batch=training.micro_batch_size * training.gradient_accumulation_steps,
        packed=training.packing,
        length=length,
        learning_rate=training.learning_rate,
        scheduler=training.scheduler,
        warmup_steps=training.warmup_steps,
        rank=found.lora.rank,
        alpha=found.lora.alpha,
        held_out_rows=held_out,
        eval_every_steps=training.eval_every_steps if best else None,
    ), choices


def openai(task: Task) -> Settings:
    """OpenAI's: epochs of its cookbook, batch of its API's reference.

    It publishes multipliers of a rate that it does not: the rate is Unsloth's.
    """
    rows, epochs = task.train_rows, 3
    if rows * epochs < 100:
        epochs = min(25, 100 // rows)
    elif rows * epochs > 25_000:
        epochs = max(1, 25_000 // rows)
    return replace(unsloth(task), epochs=epochs, batch=min(256, max(1, round(rows * 0.002))))


def unsloth(task: Task) -> Settings:
    """Unsloth's: its notebooks for Llama 3.1 8B and Zephyr (DPO), three epochs of its guide."""
    batch, epochs = 8, 3
    if task.compares_answers:
        warmup = max(1, round(0.1 * epochs * -(-task.train_rows // batch)))
        return Settings(epochs, batch, False, 4096, 5e-6, "linear", warmup, 64, 64, max_grad_norm=1.0)
    return Settings(epochs, batch, False, 2048, 2e-4, "linear", 5, 16, 16, weight_decay=0.001, max_grad_norm=1.0)


def trl(task: Task) -> Settings:
    """TRL 1.16: defaults of its trainers and of `--use_peft`, and the rate that they advise for adapters."""
    rate = 1e-5 if task.compares_answers else 1e-4
    return Settings(3, 8, False, 1024, rate, "linear", 0, 16, 32, dropout=0.05, max_grad_norm=1.0)


def former(task: Task) -> Settings:
    """This project's fixed settings before the rule, those of the QLoRA paper."""
    return Settings(1, 16, True, 512, 2e-4, "constant", 0, 64, 16)


FIXED: Mapping[str, Callable[[Task], Settings]] = {
    "former": former,
    "unsloth": unsloth,
    "trl": trl,
    "openai": openai,
}
"""Arms whose settings follow from the task alone."""


def by_hand(task: Task, steps: Callable[[int, int], int], tried: Mapping[Settings, float]) -> Settings | None:
    """Return the next settings that the tuner tries, or None at the end.

    `steps`: of a run, by epochs and batch; `tried`: the loss on the validation rows. Each rate is tried until the best
    has worse ones on both sides, in factors of two; then epochs, at that rate, in the same way.
    """

    def settings(epochs: int, rate: float) -> Settings:
        warmup = max(1, round(0.05 * steps(epochs, task.start.batch)))
        return Settings(epochs, task.start.batch, True, SHORT, rate, "linear", warmup, 16, 32)

    first = settings(task.start.epochs, task.start.learning_rate)
    best = min((each for each in tried if each.epochs == first.epochs), key=tried.__getitem__, default=first)
    rates = [settings(first.epochs, best.learning_rate * factor) for factor in (1, 2, 0.5)]
    same_rate = (each for each in tried if each.learning_rate == best.learning_rate)
    best = min(same_rate, key=tried.__getitem__, default=first)
    epochs = {best.epochs * 2, max(1, best.epochs // 2)}
    more = [settings(number, best.learning_rate) for number in sorted(epochs) if number <= _MOST_EPOCHS]
    return next((each for each in (*rates, *more) if each not in tried), None)
