"""Generates answers to some prompts without and with the adapter, for the report."""

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from qlora_api.printable import first_line
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.data.prepared import IGNORED_LABEL, PreparedDataset
from qlora_trainer.model.four_bit import COMPUTE_DTYPE
from qlora_trainer.report.samples import MAX_NEW_TOKENS, Sample, Samples

_MAX_PROMPT_TOKENS = 1024
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """The tokens of a row up to its first answer, and that answer."""

    tokens: tuple[int, ...]
    answer: tuple[int, ...]


def choose_prompts(data: PreparedDataset, count: int) -> list[Prompt]:
    """The prompts of `count` sequences at equal distances in `data`, each from the sequence's first row."""
    every = max(1, len(data) // max(1, count))
    prompts = (_first_prompt(data, index) for index in range(0, len(data), every))
    fitting = [prompt for prompt in prompts if len(prompt.tokens) <= _MAX_PROMPT_TOKENS]
    return fitting[:count]


def _first_prompt(data: PreparedDataset, index: int) -> Prompt:
    sequence = data[index]
    length = sequence.row_lengths[0]
    tokens, is_target = sequence.input_ids[:length].tolist(), (sequence.labels[:length] != IGNORED_LABEL).tolist()
    first = is_target.index(True)
    if first <= 1:
        # Plain text is trained on from its second token on: its first half is the prompt.
        first = max(1, length // 2)
    end = next((position for position in range(first, length) if not is_target[position]), length)
    return Prompt(tuple(tokens[:first]), tuple(tokens[first:end]))


def write_answers(
    model: Any, tokenizer_folder: Path, prompts: Iterable[Prompt], stopped: Callable[[], bool], device: torch.device
) -> Samples:
    """The samples of a trained PEFT model: greedy, so that the same model gives the same words.

    The model must not be trained any further: its attention is transformers' own from here on, because answers are
    generated one token at a time. A sample in progress when `stopped` turns true is dropped, with those after it.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    base = model.get_base_model()
    base.activation_checkpointing_disable()
    base.set_attn_implementation("eager")
    model.eval()
    samples = []
    for prompt in prompts:
        before = _answer(model, prompt, model.disable_adapter(), stopped, device)
        after = _answer(model, prompt, nullcontext(), stopped, device)
        if stopped():
            break
        text = tokenizer.batch_decode([list(ids) for ids in (prompt.answer, before, after)], skip_special_tokens=True)
        question = tokenizer.decode(list(prompt.tokens))
        samples.append(Sample(prompt=question, reference=text[0], before=text[1], after=text[2]))
    return Samples(samples=tuple(samples), missing="" if samples else "the run was stopped")


def _answer(
    model: Any, prompt: Prompt, adapter: AbstractContextManager[Any], stopped: Callable[[], bool], device: torch.device
) -> list[int]:
    class Stopped(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stopped(), device=input_ids.device)

    input_ids = torch.tensor([prompt.tokens], device=device)
    with adapter, torch.no_grad(), torch.autocast(device.type, dtype=COMPUTE_DTYPE):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([Stopped()]),
        )
    generated: list[int] = output[0, len(prompt.tokens) :].tolist()
    return generated


def leave_samples(
    path: Path,
    model: Any,
    tokenizer_folder: Path,
    data: PreparedDataset,
    count: int,
    stopped: Callable[[], bool],
    device: torch.device,
) -> None:
    """Write the samples of a trained model to `path`, or why there are none.

    The adapter is finished by then: a model that cannot generate must not fail the run, so the cause is recorded.
    """
    if not count:
        samples = Samples(missing="spec.training.samples is 0, or spec.training.sharding is full")
    else:
        try:
            samples = write_answers(model, tokenizer_folder, choose_prompts(data, count), stopped, device)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            logger.exception("no samples for the report")
            samples = Samples(missing=f"the model could not generate: {first_line(error)}")
    write_atomically(path, json.dumps(samples.dump(), indent=2, ensure_ascii=False).encode() + b"\n")
