"""Generates answers with and without the adapter, as samples and for scores."""

import hashlib
import heapq
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from qlora_api.printable import first_line
from qlora_api.spec.gate import MAX_PROMPT_TOKENS
from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.protocols import FastTokenizer
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset
from qlora_trainer.data.render.answer_span import asks_for_reasoning
from qlora_trainer.history.samples import MAX_NEW_TOKENS, Sample, Samples
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.protocols import AdaptedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """The tokens of a row up to its first answer, and that answer."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    check: RowCheck | None = None
    """The one that the row brings for its answer."""

    @property
    def sha256(self) -> str:
        """SHA-256 of prompt, answer and check, in hexadecimal, without the row's place."""
        brought = () if self.check is None else (self.check.value,)
        return hashlib.sha256(json.dumps([self.tokens, self.answer, *brought], sort_keys=True).encode()).hexdigest()


def choose_prompts(data: PreparedDataset, count: int) -> list[Prompt]:
    """The prompts of the first rows of `count` evenly spaced sequences in `data`."""
    every = max(1, len(data) // max(1, count))
    prompts = (next(_prompts(data, index)) for index in range(0, len(data), every))
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= MAX_PROMPT_TOKENS]
    return fitting[:count]


@dataclass(frozen=True)
class ScoredPrompts:
    """The prompts to answer for a score."""

    chosen: tuple[Prompt, ...]
    fitting: int
    """Rows whose prompt is short enough."""
    too_long: int
    """Rows whose prompt is not."""

    @classmethod
    def from_data(cls, data: PreparedDataset, count: int) -> Self:
        """The `count` rows with the lowest SHA-256, for every seed and packing."""
        fitting = rows = 0

        def short_enough() -> Iterator[Prompt]:
            nonlocal fitting, rows
            for prompt in (prompt for index in range(len(data)) for prompt in _prompts(data, index)):
                rows += 1
                if len(prompt.tokens) <= MAX_PROMPT_TOKENS:
                    fitting += 1
                    yield prompt

        chosen = heapq.nsmallest(count, short_enough(), key=lambda prompt: prompt.sha256)
        return cls(tuple(chosen), fitting, rows - fitting)


def _prompts(data: PreparedDataset, index: int) -> Iterator[Prompt]:
    """The prompt of each row of a sequence. A pair counts with its chosen answer."""
    sequence, start, answers = data[index], 0, 2 if data.pairs else 1
    for number, length in zip(data.row_numbers(index), sequence.row_lengths, strict=True):
        ids, labels = sequence.input_ids[start : start + length], sequence.labels[start : start + length]
        if number % answers == 0:
            yield _prompt(ids.tolist(), (labels != IGNORED_LABEL).tolist(), data.check(number // answers))
        start += length


def _prompt(tokens: list[int], is_target: list[bool], check: RowCheck | None) -> Prompt:
    length, first = len(tokens), is_target.index(True)
    if first <= 1:
        # Plain text is trained on from its second token on: its first half is the prompt.
        first = max(1, length // 2)
    end = next((position for position in range(first, length) if not is_target[position]), length)
    return Prompt(tuple(tokens[:first]), tuple(tokens[first:end]), check)


Stopped = Callable[[], bool]


class AnswerTexts:
    """Turns tokens into the texts of prompts and answers."""

    def __init__(self, tokenizer_folder: Path, end: EndOfTurn | None) -> None:
        """Create. `end`: the mark that ends answers, if the configuration lacks it."""
        self.tokenizer = cast(
            "FastTokenizer",
            AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False),
        )
        self._end = end

    def prompt(self, tokens: Iterable[int]) -> str:
        """The text of a prompt, with special tokens."""
        return str(self.tokenizer.decode(list(tokens)))

    def answer(self, tokens: Iterable[int]) -> str:
        """The text of an answer up to its end, without special tokens."""
        text = str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))
        return text.partition(self._end.text)[0] if self._end is not None and self._end.text else text

    def asks_for_reasoning(self, prompt: Prompt) -> bool:
        """Whether the prompt has begun the reasoning that an answer starts with."""
        return asks_for_reasoning(self.prompt(prompt.tokens))

    def last_tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens that end an answer: the special one after the row's, as a turn's end."""
        own = prompt.answer[-1]
        ends = (own if own in self.tokenizer.all_special_ids else None, None if self._end is None else self._end.token)
        return tuple(token for token in ends if token is not None)

    @property
    def stop_strings(self) -> list[str] | None:
        """Texts that end an answer, if they are several tokens."""
        return [self._end.text] if self._end is not None and self._end.text and self._end.token is None else None


class Answering:
    """A trained PEFT model that answers prompts greedily, one at a time: padding changes the last bits of sums.

    It must not be trained any further: its attention is transformers' own, for one token at a time.
    """

    def __init__(self, model: AdaptedModel, texts: AnswerTexts, stopped: Stopped, device: torch.device) -> None:
        """An answer in progress when `stopped` turns true is cut off there."""
        self._model, self.texts, self._device, self._stopped = model, texts, device, stopped
        base = model.get_base_model()
        base.activation_checkpointing_disable()
        base.set_attn_implementation("eager")
        model.eval()

    def answer(self, prompt: Prompt, *, adapter: bool, max_new_tokens: int) -> str:
        """Generate the answer, with or without adapter, up to its end, if it has one."""
        stopped = self._stopped
        ends = torch.tensor(self.texts.last_tokens(prompt), dtype=torch.int64, device=self._device)

        class Stopping(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
                return torch.isin(input_ids[:, -1], ends) | stopped()

        input_ids = torch.tensor([prompt.tokens], device=self._device)
        without = nullcontext() if adapter else self._model.disable_adapter()
        with without, torch.no_grad(), computing(self._model, self._device.type, cache=True):
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Stopping()]),
                stop_strings=self.texts.stop_strings,
                tokenizer=self.texts.tokenizer,
            )
        return self.texts.answer(output[0, len(prompt.tokens) :].tolist())


def _samples(answering: Answering, prompts: Iterable[Prompt], stopped: Stopped, fixed_positions: int | None) -> Samples:
    """Generate samples until `stopped` turns true. Drops the one in progress."""
    samples = []
    for prompt in prompts:
        # A prompt is shorter than its row, which has positions: at least one token can be answered.
        positions = MAX_NEW_TOKENS if fixed_positions is None else fixed_positions - len(prompt.tokens)
        most = min(MAX_NEW_TOKENS, positions)
        before, after = (answering.answer(prompt, adapter=adapter, max_new_tokens=most) for adapter in (False, True))
        if stopped():
            break
        question, reference = answering.texts.prompt(prompt.tokens), answering.texts.answer(prompt.answer)
        samples.append(Sample(prompt=question, reference=reference, before=before, after=after))
    return Samples(samples=tuple(samples), missing="" if samples else "the run was stopped")


def leave_samples(
    path: Path,
    model: AdaptedModel,
    texts: Callable[[], AnswerTexts],
    data: PreparedDataset,
    count: int,
    stopped: Stopped,
    device: torch.device,
    *,
    fixed_positions: int | None,
) -> None:
    """Write the samples of a trained model to `path`, or why there are none: the adapter is finished by then.

    `fixed_positions`: tokens of the longest prompt and answer that it computes; None if it has no limit.
    """
    if not count:
        samples = Samples(missing="spec.training.samples is 0, or spec.training.sharding is full")
    else:
        try:
            answering = Answering(model, texts(), stopped, device)
            samples = _samples(answering, choose_prompts(data, count), stopped, fixed_positions)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            logger.exception("no samples for the report")
            samples = Samples(missing=f"the model could not generate: {first_line(error)}")
    write_atomically(path, json.dumps(samples.dump(), indent=2, ensure_ascii=False).encode() + b"\n")
