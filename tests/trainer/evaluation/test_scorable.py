"""Before training, a job reports the held-out rows behind its score, and their answers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.spec.gate import GateSpec, ScoreSpec
from qlora_api.status import DatasetStatus
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.data.examples.row_check import RowCheck
from qlora_trainer.evaluation import prompts, scorable
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.evaluation.prompts import Prompt
from qlora_trainer.evaluation.scorable import require_scorable, row_criterion
from tests.support.training import write_data, write_held_out

CHATS = DatasetStatus(format="messages", rows=20, used_rows=16)


def remarks(
    folder: Path,
    model: Path,
    *,
    pairs: bool = False,
    checks: Sequence[str] | None = None,
    positions: int | None = None,
    **score: Any,
) -> tuple[str, ...]:
    """Check four rows, with prompts of 2 to 10 tokens and answers of 3 to 11."""
    if not folder.exists():
        write_data(folder, packed=False, pairs=pairs, checks=checks)
    gate = GateSpec.model_validate({"score": {"check": "exactMatch", **score}})
    return require_scorable(gate, folder, CHATS, partial(AnswerTexts, model, None), fixed_positions=positions)


def rejection(folder: Path, model: Path, *, pairs: bool = False, positions: int | None = None, **score: Any) -> str:
    with pytest.raises(StepFailure) as failure:
        remarks(folder, model, pairs=pairs, positions=positions, **score)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    return failure.value.message


def longest_prompt(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    for module in (prompts, scorable):
        monkeypatch.setattr(module, "MAX_PROMPT_TOKENS", tokens)


def test_rows_whose_reference_answer_is_too_long_are_counted(tmp_path: Path, tiny_llama: Path) -> None:
    data = tmp_path / "data"
    assert remarks(data, tiny_llama) == ()
    assert remarks(data, tiny_llama, maxNewTokens=11) == ()
    (remark,) = remarks(data, tiny_llama, maxNewTokens=6)
    assert remark == (
        "spec.gate.score: the data set's own answers to 2 of the 4 rows do not pass check exactMatch within 6 tokens "
        "(maxNewTokens), so an adapter that reproduces the data would score 0.5"
    )
    message = rejection(data, tiny_llama, maxNewTokens=2)
    assert "not one of the data set's own answers to the 4 held-out rows passes check exactMatch" in message
    assert "within 2 tokens (maxNewTokens)" in message


def test_rows_whose_prompt_is_too_long_are_counted(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest_prompt(monkeypatch, 4)
    (remark,) = remarks(tmp_path / "data", tiny_llama)
    assert remark == (
        "spec.gate.score is decided on 2 rows: 2 of the 4 held-out rows have a prompt of more than 4 tokens, which is "
        "not answered"
    )


def test_an_answer_beyond_the_models_positions_is_rejected(tmp_path: Path, tiny_llama: Path) -> None:
    assert remarks(tmp_path / "data", tiny_llama, positions=40, maxNewTokens=30) == ()
    assert rejection(tmp_path / "data", tiny_llama, positions=40, maxNewTokens=31) == (
        "spec.gate.score.maxNewTokens is 31, and the longest prompt that is answered has 10 tokens, but the model has "
        "positions for 40 (max_position_embeddings) and computes no longer row: set maxNewTokens to 30 or less, "
        "shorten the prompts, or name a model with a longer context"
    )


def test_a_row_whose_reference_answer_fails_its_check_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    (remark,) = remarks(tmp_path / "data", tiny_llama, check="regex", checks=["^", "^", "^(?!)", "^"])
    assert "own answers to 1 of the 4 rows do not pass check regex within 128 tokens" in remark
    assert "(the first: row 2)" in remark


def test_rows_whose_reference_reasoning_is_too_long_are_counted(tmp_path: Path, tiny_llama: Path) -> None:
    assert remarks(tmp_path / "data", tiny_llama) == ()
    long, short = "the pods of the namespace web" * 4 + "</think>pods", "a</think>pods"
    write_held_out(tmp_path / "data", tiny_llama, [("List<think>\n", long), ("Show<think>\n", short)])
    (remark,) = remarks(tmp_path / "data", tiny_llama, check="regex", pattern="pods", maxNewTokens=20)
    assert "own answers to 1 of the 2 rows do not pass check regex within 20 tokens" in remark


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"type": "object"}, "line 3: 'check' is a JSON schema, and spec.gate.score.check is regex"),
        ("a" * 1025, "line 3: 'check' has 1025 characters: a regular expression has at most 1024"),
    ],
)
def test_a_row_without_a_regular_expression_is_named(value: Any, words: str) -> None:
    row, spec = Prompt((1,), (2,), RowCheck("a.jsonl line 3: 'check'", value)), ScoreSpec(check="regex")
    with pytest.raises(StepFailure) as failure:
        row_criterion(spec, row)
    assert failure.value.exit_code is ExitCode.BAD_DATASET
    assert words in failure.value.message


def test_a_pair_is_one_row(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest_prompt(monkeypatch, 1)
    message = rejection(tmp_path / "data", tiny_llama, pairs=True)
    assert "none of the 4 held-out rows has a prompt of at most 1 tokens" in message
