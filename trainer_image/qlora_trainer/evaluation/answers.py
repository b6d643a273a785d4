"""Generates answers with and without the adapter, as samples and for scores."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from qlora_api.printable import first_line
from qlora_trainer.core.completion import EndOfTurn
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.protocols import FastTokenizer
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.data.render.answer_span import asks_for_reasoning
from qlora_trainer.evaluation.prompts import Prompt, choose_prompts
from qlora_trainer.history.samples import MAX_NEW_TOKENS, Sample, Samples
from qlora_trainer.model.nf4.computation import computing
from qlora_trainer.model.protocols import AdaptedModel

logger = logging.getLogger(__name__)


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
    """A trained PEFT model that answers prompts greedily.

    It must not be trained any further: its attention is transformers' own, for one token at a time.
    """

    def __init__(self, model: AdaptedModel, texts: AnswerTexts, stopped: Stopped, device: torch.device) -> None:
        """Answers in progress when `stopped` turns true are cut off there."""
        self._model, self.texts, self.device, self._stopped = model, texts, device, stopped
        base = model.get_base_model()
        base.activation_checkpointing_disable()
        base.set_attn_implementation("eager")
        model.eval()
        ids = base.generation_config.eos_token_id
        self._ends = frozenset([ids] if isinstance(ids, int) else ids or ())

    def answers(self, prompts: Sequence[Prompt], *, adapter: bool, max_new_tokens: int) -> list[str]:
        """Generate the answers to a batch, with or without adapter, each up to its end, if it has one.

        Padding and the number of rows change the order of 16-bit sums, so that of two tokens that are almost equally
        likely another one may be chosen: the same batch always has the same answers, and another one may not.
        """
        stopped, ends = self._stopped, [self._ends.union(self.texts.last_tokens(prompt)) for prompt in prompts]

        class Stopping(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
                last = input_ids[:, -1].tolist()
                done = [stopped() or token in own for token, own in zip(last, ends, strict=True)]
                return torch.tensor(done, device=input_ids.device)

        longest = max(len(prompt.tokens) for prompt in prompts)
        padded = [((0,) * (longest - len(prompt.tokens)), prompt.tokens) for prompt in prompts]
        input_ids = torch.tensor([padding + tokens for padding, tokens in padded], device=self.device)
        is_token = torch.tensor([(0,) * len(padding) + (1,) * len(tokens) for padding, tokens in padded])
        without = nullcontext() if adapter else self._model.disable_adapter()
        with without, torch.no_grad(), computing(self._model, self.device.type, cache=True):
            output = self._model.generate(
                input_ids=input_ids,
                attention_mask=is_token.to(self.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([Stopping()]),
                stop_strings=self.texts.stop_strings,
                tokenizer=self.texts.tokenizer,
            )
        return [
            self.texts.answer(_up_to_end(tokens, own))
            for tokens, own in zip(output[:, longest:].tolist(), ends, strict=True)
        ]


def _up_to_end(tokens: Sequence[int], ends: Collection[int]) -> Sequence[int]:
    """Return the tokens before the first end: a row continues until the last of its batch has ended."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def _samples(answering: Answering, prompts: Iterable[Prompt], stopped: Stopped, fixed_positions: int | None) -> Samples:
    """Generate samples until `stopped` turns true. Drops the one in progress."""
    samples = []
    for prompt in prompts:
        # A prompt is shorter than its row, which has positions: at least one token can be answered.
        positions = MAX_NEW_TOKENS if fixed_positions is None else fixed_positions - len(prompt.tokens)
        most = min(MAX_NEW_TOKENS, positions)
        (before,), (after,) = (
            answering.answers([prompt], adapter=adapter, max_new_tokens=most) for adapter in (False, True)
        )
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
