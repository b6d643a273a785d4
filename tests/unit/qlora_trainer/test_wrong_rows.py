"""Messages about wrong rows: the first of them, and the number of all."""

import pytest

from qlora_api.contract import ExitCode
from qlora_api.status import MAX_MESSAGE_LENGTH
from qlora_trainer.core.failures import StepFailure, bad_configuration, bad_dataset
from qlora_trainer.data.examples.wrong_rows import WrongRows


def collected(*messages: str) -> WrongRows:
    """Rows from line 1 with these messages after their location."""
    wrong = WrongRows()
    for line, message in enumerate(messages, 1):
        with wrong.collecting(f"rows.jsonl line {line}"):
            raise bad_dataset(f"rows.jsonl line {line}{message}")
    return wrong


def message_of_all(wrong: WrongRows, rows: int) -> str:
    with pytest.raises(StepFailure) as raised:
        wrong.require_none_of(rows)
    assert raised.value.exit_code == ExitCode.BAD_DATASET
    return raised.value.message


def message_of_step(wrong: WrongRows, rows: int) -> str:
    with pytest.raises(StepFailure) as raised:
        wrong.require_none(rows)
    assert raised.value.exit_code == ExitCode.BAD_DATASET
    return raised.value.message


def test_twenty_messages_are_followed_by_totals_of_all_by_kind() -> None:
    empty, roles = [": 'messages' is empty"] * 22, [f": 'messages[{turn}].role' is 'me'" for turn in range(3)]
    first, *lines = message_of_all(collected(*empty, *roles), 40).splitlines()
    assert first == "25 of the 40 rows that were read are wrong:"
    assert lines[:20] == [f"rows.jsonl line {line}: 'messages' is empty" for line in range(1, 21)]
    assert lines[20:] == [
        "… and 5 more",
        "Wrong rows by kind:",
        "22: 'messages' is empty",
        "3: 'messages[…].role' is 'me'",
    ]


def test_the_message_of_a_step_has_those_that_fit_and_the_number_of_all() -> None:
    message = message_of_step(collected(": empty", *[f": {'long ' * 60}"] * 5), 7)
    assert message.startswith(
        "rows.jsonl line 1: empty; in all, 6 of the 7 rows around it are wrong: rows.jsonl line 2: "
    )
    assert "; rows.jsonl line 3: " in message
    assert "line 6" not in message
    assert len(message) <= MAX_MESSAGE_LENGTH


def test_rows_that_are_wrong_in_different_ways_have_no_totals() -> None:
    message = message_of_all(collected(": empty", ": null"), 3)
    assert message.endswith("are wrong:\nrows.jsonl line 1: empty\nrows.jsonl line 2: null")


def test_a_single_wrong_row_has_only_its_message() -> None:
    assert message_of_all(collected(": empty"), 40) == "rows.jsonl line 1: empty"
    assert message_of_step(collected(": empty"), 40) == "rows.jsonl line 1: empty"


def test_valid_rows_and_other_failures_are_not_collected() -> None:
    wrong = WrongRows()
    wrong.require_none(3)
    wrong.require_none_of(3)
    with pytest.raises(StepFailure, match="remove it"), wrong.collecting("rows.jsonl line 1"):
        raise bad_configuration("remove it")
    assert not wrong.count
