"""Chooses the held-out rows for a score, and rejects an unmeasurable score."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_api.spec.gate import MAX_PATTERN_CHARACTERS, MAX_PROMPT_TOKENS, GateSpec, ScoreSpec
from qlora_api.status import DatasetStatus
from qlora_trainer.core.failures import bad_configuration, bad_dataset
from qlora_trainer.data.examples.formats import PLAIN
from qlora_trainer.data.prepared import PreparedDataset, guard_split
from qlora_trainer.evaluation.answer_check import AnswerChecker, Criterion
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.evaluation.prompts import Prompt, ScoredPrompts

SCORE = "spec.gate.score"
logger = logging.getLogger(__name__)


def require_readable(gate: GateSpec | None) -> None:
    """Raise StepFailure BAD_CONFIGURATION for a pattern or schema that cannot be used."""
    if gate is not None and gate.score is not None:
        with AnswerChecker(gate.score):
            pass


def require_scorable(
    gate: GateSpec | None,
    data_folder: Path,
    found: DatasetStatus,
    texts: Callable[[], AnswerTexts],
    *,
    fixed_positions: int | None,
) -> tuple[str, ...]:
    """Remarks for the user on the rows that are scored. `found` is what the data set is.

    `fixed_positions`: tokens of the longest prompt and answer that it computes, or None. Raises StepFailure:
    BAD_CONFIGURATION for a score that no answer could have, BAD_DATASET for a row whose check cannot be used.
    """
    if gate is None or gate.score is None:
        return ()
    if found.format in PLAIN:
        raise bad_configuration(
            f"{SCORE} answers the prompts of held-out rows, and rows of format {found.format} have none: use a format "
            "with answers, or remove gate.score"
        )
    guards = (guard for guard in gate.guards or () if guard.min_score is not None)
    sets = {"": "eval", **{f" of guards[{guard.name}]": guard_split(guard.name) for guard in guards}}
    remarks, answers = list[str](), texts()
    for of, split in sets.items():
        data = PreparedDataset.open(data_folder, split)
        remarks += _require_scorable(f"{SCORE}{of}", data, gate.score, answers, fixed_positions)
    for remark in remarks:
        logger.warning("%s", remark)
    return tuple(remarks)


def _require_scorable(
    score: str, data: PreparedDataset, spec: ScoreSpec, texts: AnswerTexts, fixed_positions: int | None
) -> Iterator[str]:
    """Remarks on one set of held-out rows. `score`: the field, for messages."""
    scored = scored_rows(data, spec, score)
    if fixed_positions is not None:
        _require_positions(scored, spec, fixed_positions)
    failed = _own_answers_that_fail(scored, spec, texts)
    # The row is only known of a check that it brings.
    first = f" (the first: {failed[0].source})" if failed and failed[0].source else ""
    if len(failed) == len(scored.chosen):
        raise bad_configuration(
            f"{score}: not one of the data set's own answers to the {len(failed)} held-out rows passes check "
            f"{spec.check} within {spec.max_new_tokens} tokens (maxNewTokens), for example "
            f"{failed[0].answer.strip()[:80]!r}{first}: an adapter that answers like the data could not pass; raise "
            "maxNewTokens, or correct the pattern or schema, or the data"
        )
    if scored.too_long:
        yield (
            f"{score} is decided on {len(scored.chosen)} rows: {scored.too_long} of the "
            f"{scored.fitting + scored.too_long} held-out rows have a prompt of more than {MAX_PROMPT_TOKENS} tokens, "
            "which is not answered"
        )
    if failed:
        yield (
            f"{score}: the data set's own answers to {len(failed)} of the {len(scored.chosen)} rows do not pass check "
            f"{spec.check} within {spec.max_new_tokens} tokens (maxNewTokens){first}, so an adapter that reproduces "
            f"the data would score {1 - len(failed) / len(scored.chosen):.3g}"
        )


def _require_positions(scored: ScoredPrompts, spec: ScoreSpec, positions: int) -> None:
    """Reject prompts that leave too few positions, before training rather than after."""
    longest = max(len(prompt.tokens) for prompt in scored.chosen)
    if longest + spec.max_new_tokens > positions:
        raise bad_configuration(
            f"{SCORE}.maxNewTokens is {spec.max_new_tokens}, and the longest prompt that is answered has {longest} "
            f"tokens, but the model has positions for {positions} (max_position_embeddings) and computes no longer "
            f"row: set maxNewTokens to {positions - longest} or less, shorten the prompts, or name a model with a "
            "longer context"
        )


@dataclass(frozen=True)
class _Failed:
    """An answer of the data that would not pass."""

    answer: str
    source: str
    """Where its row's check was read, or an empty string without one."""


def _own_answers_that_fail(scored: ScoredPrompts, spec: ScoreSpec, texts: AnswerTexts) -> list[_Failed]:
    """The data's answers that fail. Raises StepFailure for an unusable check."""
    failed = []
    with AnswerChecker(spec) as checker:
        for row in scored.chosen:
            own, criterion = texts.answer(row.answer), row_criterion(spec, row)
            if criterion is not None:
                checker.require_usable(criterion)
            cut, begun = texts.answer(row.answer[: spec.max_new_tokens]), texts.asks_for_reasoning(row)
            if not checker.passes(cut, own, criterion, begun=begun):
                failed.append(_Failed(own, "" if criterion is None else criterion.source))
    return failed


def row_criterion(spec: ScoreSpec, row: Prompt) -> Criterion | None:
    """The row's criterion, or None. Raises StepFailure BAD_DATASET for a wrong kind."""
    if not spec.of_rows or spec.check == "exactMatch":
        return None
    if row.check is None:
        raise AssertionError("a job whose rows bring no check was rejected, and its data are prepared with the column")
    brought, regex = row.check, spec.check == "regex"
    if regex and not isinstance(brought.value, str):
        raise bad_dataset(
            f"{brought.source} is a JSON schema, and {SCORE}.check is regex: write a regular expression as text, or "
            "create the job with check: jsonSchema"
        )
    if regex and len(brought.text) > MAX_PATTERN_CHARACTERS:
        raise bad_dataset(
            f"{brought.source} has {len(brought.text)} characters: a regular expression has at most "
            f"{MAX_PATTERN_CHARACTERS}"
        )
    return Criterion(spec.check, brought.text, brought.source)


def scored_rows(data: PreparedDataset, spec: ScoreSpec, score: str = SCORE) -> ScoredPrompts:
    """The rows to answer. Raises StepFailure BAD_CONFIGURATION if there is none. `score`: the field, for messages."""
    scored = ScoredPrompts.from_data(data, spec.rows)
    if not scored.chosen:
        raise bad_configuration(
            f"{score}: none of the {scored.too_long} held-out rows has a prompt of at most {MAX_PROMPT_TOKENS} "
            "tokens, which is what is answered: shorten some, or remove gate.score"
        )
    return scored
