"""Parsers of data, models and steps' files: each reads any file, or rejects it as documented."""

import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.paths import confine, require_regular
from qlora_trainer.training.checkpoints.attempts import ATTEMPTS_FILE, read_attempts
from tests.fuzz.answers import ANSWERS
from tests.fuzz.files import FILES
from tests.fuzz.inputs import BOUNDED, inputs
from tests.fuzz.target import Target, shown_message
from tests.support.rejected.parsed import Parsed, parsed

TARGETS = {**FILES, **{f"answer: {name}": target for name, target in ANSWERS.items()}}
# A model is built from each, or a tokenizer loaded.
SLOW = ("family", "answer: template")


def check(target: Target, data: st.DataObject) -> None:
    """Draw an input, and check that the target reads or rejects it."""
    logging.disable()
    try:
        with tempfile.TemporaryDirectory() as folder:
            target.check(data.draw(inputs(target.seeds)), Path(folder))
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in SLOW])
@settings(BOUNDED, max_examples=100)
@given(data=st.data())
def test_a_file_or_an_answer_is_read_or_rejected_as_documented(name: str, data: st.DataObject) -> None:
    check(TARGETS[name], data)


@pytest.mark.parametrize("name", SLOW)
@settings(BOUNDED, max_examples=20)
@given(data=st.data())
def test_a_models_files_are_read_or_rejected_as_documented(name: str, data: st.DataObject) -> None:
    check(TARGETS[name], data)


@pytest.mark.parametrize("case", [*parsed("files"), *parsed("answers")], ids=str)
def test_a_wrong_file_or_answer_is_rejected_in_words(case: Parsed) -> None:
    case.require_rejection(FILES | ANSWERS)


def test_a_line_of_attempts_that_is_not_text_is_left_out(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS_FILE).write_bytes(
        b'\xff\xfe\n{"podUid": "a", "startedAt": "2026-01-02T12:00:00Z", "fromStep": 3}\n'
    )
    assert [attempt.from_step for attempt in read_attempts(tmp_path)] == [3]


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A link that leads to itself."""
    link = tmp_path / "claim" / "train.jsonl"
    link.parent.mkdir()
    link.symlink_to(link)
    return link


def test_a_link_that_leads_to_itself_is_rejected_wherever_it_is_followed(endless: Path) -> None:
    for follow in (
        lambda: require_regular(endless, endless.parent, "pvc://claim/train.jsonl"),
        lambda: confine(endless, endless.parent),
    ):
        with pytest.raises(StepFailure, match="is a link that leads to itself") as failure:
            follow()
        assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT


def test_a_failures_message_cannot_control_a_terminal() -> None:
    failure = StepFailure(ExitCode.BAD_DATASET, "row \x1b[31m1\n\u202eis \ud800 bad")
    assert shown_message(failure) == "row \\x1b[31m1 \\u202eis \\ud800 bad"
