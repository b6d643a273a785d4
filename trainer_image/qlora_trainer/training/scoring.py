"""Scores a finished adapter and its base: both answer the same held-out rows, and each answer is checked.

The rows are those with the lowest SHA-256 of their tokens, so that neither seed nor packing chooses them. Their batches
follow from the rows and the job's sizes, so that base and adapter, and a later attempt, answer in the same ones. The
answers of a batch are written before the next, so an interrupted scoring continues.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

from pydantic import Field, ValidationError

from qlora_api.contract import ExitCode
from qlora_api.printable import first_line
from qlora_api.schema import ObservedModel
from qlora_api.spec.gate import ScoreSpec
from qlora_trainer.core.completion import Score, score_settings
from qlora_trainer.core.failures import Interrupted, StepFailure, bad_configuration, damaged, is_out_of_gpu_memory
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.evaluation.answer_batches import AnswerRoom, batches
from qlora_trainer.evaluation.answer_check import AnswerChecker
from qlora_trainer.evaluation.answers import Answering, AnswerTexts
from qlora_trainer.evaluation.prompts import Prompt
from qlora_trainer.evaluation.scorable import row_criterion, scored_rows
from qlora_trainer.model.memory.answer_bytes import answer_bytes
from qlora_trainer.training.distributed.device import free_memory
from qlora_trainer.training.prepared_job import PreparedJob
from qlora_trainer.training.progress.run_state import RunState
from qlora_trainer.training.run import Run, report

logger = logging.getLogger(__name__)


class Answers(ObservedModel):
    """The answers to one held-out row, a line of `report/answers.jsonl`."""

    prompt_sha256: str = Field(description="SHA-256 of the row's tokens.")
    prompt: str
    reference: str = Field(description="The answer in the data.")
    base: str = Field(description="The answer of the base model.")
    adapter: str = Field(description="The answer with the adapter.")
    check: str | None = Field(None, description="The row's own regular expression or schema; not set without one.")
    base_passed: bool
    adapter_passed: bool


class _Heading(ObservedModel):
    """The first line of the file: whose answers these are."""

    adapter_sha256: str
    settings: str = Field(description="SHA-256 of how they are checked.")


class AnswerLog:
    """The answers so far, on disk after each: a stopped attempt continues there."""

    def __init__(self, file: IO[bytes], known: dict[str, Answers]) -> None:
        self._file, self._known = file, known

    @classmethod
    @contextmanager
    def open(cls, path: Path, adapter_sha256: str, settings: str) -> Iterator[Self]:
        """Open the log of this adapter and settings. Drops others, and torn lines."""
        heading = _Heading(adapter_sha256=adapter_sha256, settings=settings)
        known = _read(path, heading)
        write_atomically(path, b"".join(_line(entry) for entry in (heading, *known)))
        with path.open("ab") as file:
            yield cls(file, {answers.prompt_sha256: answers for answers in known})

    def get(self, prompt: Prompt) -> Answers | None:
        """The answers to this prompt, if they are known."""
        return self._known.get(prompt.sha256)

    def add(self, answers: Answers) -> None:
        """Write the answers to another row. Raises OSError."""
        if answers.prompt_sha256 not in self._known:
            self._file.write(_line(answers))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._known[answers.prompt_sha256] = answers


def _line(entry: ObservedModel) -> bytes:
    return json.dumps(entry.dump(), sort_keys=True).encode() + b"\n"


def _read(path: Path, heading: _Heading) -> list[Answers]:
    """The answers of a file with this heading, up to the first line that is not whole."""
    try:
        first, *lines = path.read_bytes().splitlines(keepends=True)
        if first != _line(heading):
            return []
    except (FileNotFoundError, ValueError):
        return []
    answers = []
    for line in lines:
        try:
            answers.append(Answers.model_validate_json(line))
        except ValidationError:
            break
    return answers


BaseAnswers = dict[str, list[str]]
"""The base's answers by their batch and what ends them, for jobs that share a base in memory."""


def measure_score(
    run: Run,
    state: RunState,
    spec: ScoreSpec,
    adapter_sha256: str,
    base_answers: BaseAnswers,
    data: PreparedDataset,
    answers_file: str,
) -> Score:
    """Return the score of the adapter, whose file has this checksum, and of its base, after the last step.

    Adds to `base_answers`, and continues `answers_file` of the report. Raises Interrupted when a stop is requested,
    StepFailure for a model that cannot generate or runs out of memory.
    """
    # Gradients are gone, and what the optimizer holds is not needed any more: answers need memory.
    run.optimizer.state.clear()
    job, stop = run.job, run.runtime.stop
    path = job.workspace.report / answers_file
    settings = score_settings(spec, job.prepared.fingerprint)
    scored = scored_rows(data, spec)
    count, done = len(scored.chosen), 0
    answering = Answering(run.model, answer_texts(job), lambda: stop.is_requested, run.device)
    base = adapter = 0
    with AnswerLog.open(path, adapter_sha256, settings) as log, AnswerChecker(spec) as checker:
        for batch in _batches(run, scored.chosen, spec):
            report(run, state, f"scoring answers {done + 1} to {done + len(batch)} of {count}")
            known = [log.get(prompt) for prompt in batch]
            if None in known:
                texts = _answer_batch(answering, batch, spec, job.name, base_answers)
                new = (_checked(answering.texts, checker, spec, *each) for each in zip(batch, *texts, strict=True))
                known = [earlier or answers for earlier, answers in zip(known, new, strict=True)]
            if stop.is_requested:
                raise Interrupted(state.step, run.progress.schedule.total_steps, run.progress.checkpoint_step or 0)
            for answers in filter(None, known):
                log.add(answers)
                base, adapter = base + answers.base_passed, adapter + answers.adapter_passed
            done += len(batch)
    return Score(
        settings=settings,
        adapter_sha256=adapter_sha256,
        rows=count,
        too_long_rows=scored.too_long,
        adapter=adapter / count,
        base=base / count,
    )


def answer_texts(job: PreparedJob) -> AnswerTexts:
    """Return what converts the job's tokens. Raises StepFailure for a damaged tokenizer."""
    try:
        return job.texts()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(
            f"the tokenizer in {job.model_folder} cannot be loaded to score answers ({first_line(error)}): check the "
            "volume. The adapter is in trained/ of the workspace"
        ) from error


def _batches(run: Run, rows: Sequence[Prompt], spec: ScoreSpec) -> list[tuple[Prompt, ...]]:
    config = run.model.config.get_text_config(decoder=True)
    room = AnswerRoom.after_training(
        sum(parameter.nbytes for parameter in run.parameters.values()),
        run.progress.schedule.micro_batch_size * run.training.max_sequence_length,
        hidden_size=config.hidden_size,
        # Inputs in host memory leave no room on the GPU.
        blocks=0 if run.progress.recomputation.offloads else config.num_hidden_layers,
    )
    return batches(rows, spec.max_new_tokens, answer_bytes(config), room)


def _answer_batch(
    answering: Answering, batch: Sequence[Prompt], spec: ScoreSpec, name: str, base_answers: BaseAnswers
) -> tuple[list[str], list[str]]:
    """The answers of base and adapter, one by one if the GPU has no memory for the batch.

    `name`: the job, whose adapter others can continue from.
    """
    texts = answering.texts
    asked = [(prompt.sha256, texts.last_tokens(prompt)) for prompt in batch]
    key = repr((asked, texts.stop_strings, spec.max_new_tokens))
    try:
        if key not in base_answers:
            base_answers[key] = answering.answers(batch, adapter=False, max_new_tokens=spec.max_new_tokens)
        return base_answers[key], answering.answers(batch, adapter=True, max_new_tokens=spec.max_new_tokens)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        if not is_out_of_gpu_memory(error) or len(batch) == 1:
            raise _cannot_answer(error, name) from error
        logger.warning("no GPU memory for %d answers at a time: they are generated one by one", len(batch))
    # Outside of the handler, whose error holds what was allocated.
    free_memory(answering.device)
    alone = [_answer_batch(answering, [prompt], spec, name, base_answers) for prompt in batch]
    return [base for (base,), _ in alone], [adapter for _, (adapter,) in alone]


def _cannot_answer(error: Exception, name: str) -> StepFailure:
    if is_out_of_gpu_memory(error):
        return StepFailure(
            ExitCode.GPU_OUT_OF_MEMORY,
            f"the GPU ran out of memory while answers were scored ({first_line(error)}): the adapter is in "
            "trained/ of the workspace. Use a GPU with more memory and set a new spec.retry.request, or create a "
            f"job with continues: {name} and a lower gate.score.maxNewTokens, which trains no further step",
        )
    return bad_configuration(
        f"spec.gate.score: the model could not answer ({first_line(error)}). The adapter is in trained/ of the "
        f"workspace: create a job with continues: {name} and without gate.score and gate.minScore (if gate has "
        "nothing else, without it), which publishes the adapter and trains no further step"
    )


def _checked(
    texts: AnswerTexts, checker: AnswerChecker, spec: ScoreSpec, prompt: Prompt, base: str, adapter: str
) -> Answers:
    criterion = row_criterion(spec, prompt)
    reference, begun = texts.answer(prompt.answer), texts.asks_for_reasoning(prompt)
    return Answers(
        prompt_sha256=prompt.sha256,
        prompt=texts.prompt(prompt.tokens),
        reference=reference,
        base=base,
        adapter=adapter,
        check=None if criterion is None else criterion.text,
        base_passed=checker.passes(base, reference, criterion, begun=begun),
        adapter_passed=checker.passes(adapter, reference, criterion, begun=begun),
    )
