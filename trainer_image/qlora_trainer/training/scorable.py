"""Decides which held-out rows are answered for a score, and rejects a score that cannot be measured."""

from collections.abc import Callable
from pathlib import Path

from qlora_api.gate import MAX_PROMPT_TOKENS, GateSpec, ScoreSpec
from qlora_api.status import DatasetStatus
from qlora_trainer.core.answer_check import AnswerChecker
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.training.answers import AnswerTexts, Prompt, scored_prompts


def require_readable(gate: GateSpec | None) -> None:
    """Raise StepFailure BAD_CONFIGURATION for a pattern or schema that cannot be used."""
    if gate is not None and gate.score is not None:
        with AnswerChecker(gate.score):
            pass


def require_scorable(
    gate: GateSpec | None, data_folder: Path, found: DatasetStatus, texts: Callable[[], AnswerTexts]
) -> None:
    """Raise StepFailure BAD_CONFIGURATION for a score that no answer to the prepared rows could have.

    `found` is what the data set is.
    """
    if gate is None or gate.score is None:
        return
    if found.format == "text":
        raise bad_configuration(
            "spec.gate.score answers the prompts of held-out rows, and rows of format text have none: use a format "
            "with answers, or remove gate.score"
        )
    rows = scored_rows(PreparedDataset.open(data_folder, "eval"), gate.score)
    if gate.score.check == "exactMatch":
        return
    decoded = texts()
    with AnswerChecker(gate.score) as checker:
        for row in rows:
            own = decoded.answer(row.answer)
            if checker.passes(own, own):
                return
    raise bad_configuration(
        f"spec.gate.score: not one of the data set's own answers to the {len(rows)} held-out rows passes check "
        f"{gate.score.check}, for example {own.strip()[:80]!r}: an adapter that answers like the data could not pass; "
        "correct the pattern or schema, or the data"
    )


def scored_rows(data: PreparedDataset, spec: ScoreSpec) -> list[Prompt]:
    """The rows that are answered. Raises StepFailure BAD_CONFIGURATION if there is none."""
    prompts = scored_prompts(data, spec.rows)
    if not prompts:
        raise bad_configuration(
            f"spec.gate.score: none of the {data.rows} held-out rows has a prompt of at most {MAX_PROMPT_TOKENS} "
            "tokens, which is what is answered: shorten some, or remove gate.score"
        )
    return prompts
