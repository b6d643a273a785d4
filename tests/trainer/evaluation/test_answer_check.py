"""Answers are checked as in spec.gate.score, and no pattern, schema or answer holds up the step."""

import multiprocessing
import os
import signal
import threading
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.spec.gate import ScoreSpec
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.evaluation import answer_check
from qlora_trainer.evaluation.answer_check import AnswerChecker, Criterion

OBJECT = '{"type": "object", "required": ["city"], "properties": {"city": {"$ref": "#/$defs/name"}}, \
"$defs": {"name": {"type": "string"}}}'


def score(**settings: Any) -> ScoreSpec:
    return ScoreSpec.model_validate(settings)


def passing(spec: ScoreSpec, answers: list[str], own: str = "") -> list[bool]:
    with AnswerChecker(spec) as checker:
        return [checker.passes(answer, own) for answer in answers]


def test_an_exact_match_ignores_white_space_around_the_answer_only() -> None:
    found = passing(score(check="exactMatch"), ["get pods", " get pods\n", "get  pods", "Get pods", ""], "get pods ")
    assert found == [True, True, False, False, False]


def test_a_pattern_is_found_anywhere_unless_it_is_anchored() -> None:
    assert passing(score(check="regex", pattern=r"n\d+"), ["pods of n7", "pods"]) == [True, False]
    assert passing(score(check="regex", pattern=r"^n\d+$"), ["pods of n7", "n7"]) == [False, True]


def test_reasoning_before_an_answer_is_not_checked() -> None:
    own = "<think>\nThe user wants pods.\n</think>\n\nget pods"
    answers = ["<think>\nOther thoughts.\n</think>\n\nget pods", "get pods", "<think>\nget pods\n</think>\n\nget"]
    assert passing(score(check="exactMatch"), answers, own) == [True, True, False]
    assert passing(score(check="jsonSchema", schema=OBJECT), ['<think>{}</think>{"city": "Bonn"}']) == [True]


def test_an_answer_whose_reasoning_is_cut_off_has_not_passed() -> None:
    anything, exact = score(check="regex", pattern="pods"), score(check="exactMatch")
    cut = ["<think>\nThey want pods", "<think>a</think>pods<think>pods"]
    assert passing(anything, cut) == passing(exact, cut, "<think>\nThey want pods") == [False, False]
    with AnswerChecker(anything) as checker:
        assert not checker.passes("They want pods", "", begun=True)
        assert checker.passes("They want something</think>pods", "", begun=True)
        assert checker.passes("pods", "")


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ('{"enum": [{"$ref": "abc"}]}', '{"$ref": "abc"}', "{}"),
        (
            '{"$id": "https://example.org/a", "$ref": "/b", "$defs": {"b": {"$id": "/b", "required": ["x"], \
"properties": {"x": {"$ref": "#/$defs/c"}}, "$defs": {"c": {"type": "string"}}}}}',
            '{"x": "y"}',
            '{"x": 1}',
        ),
        ('{"multipleOf": 0.1}', "7", "1e400"),
    ],
    ids=["a $ref that is data", "a $ref relative to an $id", "a number that is too large"],
)
def test_a_valid_schema_is_used_and_an_error_in_its_check_does_not_end_the_process(
    schema: str, good: str, bad: str
) -> None:
    with AnswerChecker(score(check="jsonSchema", schema=schema)) as checker:
        workers = multiprocessing.active_children()
        assert not checker.passes(bad, "")
        assert checker.passes(good, "")
        assert multiprocessing.active_children() == workers


def test_an_answer_must_be_json_that_the_schema_allows_and_nothing_else() -> None:
    answers = {
        '{"city": "Bonn"}': True,
        ' {"city": "Bonn"}\n': True,
        '{"city": 7}': False,
        "{}": False,
        '```json\n{"city": "Bonn"}\n```': False,
        '{"city": "Bonn", "x": NaN}': False,
        "[" * 100_000: False,
        "": False,
    }
    assert passing(score(check="jsonSchema", schema=OBJECT), list(answers)) == list(answers.values())


DOUBLING = ", ".join(
    f'"d{n + 1}": {{"allOf": [{{"$ref": "#/$defs/d{n}"}}, {{"$ref": "#/$defs/d{n}"}}]}}' for n in range(40)
)
HANGING = {
    "a pattern": (score(check="regex", pattern="^(a+)+$"), "a" * 60 + "b", "aaa"),
    "a pattern in a schema": (
        score(check="jsonSchema", schema='{"pattern": "^(a+)+$"}'),
        '"' + "a" * 60 + 'b"',
        '"aaa"',
    ),
    "references that double": (
        score(
            check="jsonSchema",
            schema='{"properties": {"x": {"$ref": "#/$defs/d40"}}, "$defs": {"d0": true, ' + DOUBLING + "}}",
        ),
        '{"x": 1}',
        "{}",
    ),
}


@pytest.mark.parametrize(("spec", "evil", "good"), HANGING.values(), ids=HANGING)
def test_an_answer_that_takes_too_long_fails_and_the_next_one_is_checked(spec: ScoreSpec, evil: str, good: str) -> None:
    with AnswerChecker(spec, seconds=0.5) as checker:
        assert not checker.passes(evil, "")
        assert checker.passes(good, "")


def test_the_checks_of_rows_are_used_in_turn_and_none_holds_up_the_next() -> None:
    evil, digits = (Criterion("regex", text, f"line {text}: 'check'") for text in ("^(a+)+$", r"^\d+$"))
    with AnswerChecker(score(check="regex"), seconds=0.5) as checker:
        assert checker.passes("7", "", digits)
        assert not checker.passes("a" * 60 + "b", "", evil)
        assert checker.passes("<think>a</think>7", "", digits)
        assert checker.passes("aaa", "", evil)
        # Prepare rejects it; if it still occurs, one answer has not passed.
        assert not checker.passes("aaa", "", Criterion("regex", "(", "line 3: 'check'"))
        assert checker.passes("8", "", digits)


def test_the_time_limit_of_an_answer_is_processor_time() -> None:
    with AnswerChecker(score(check="regex", pattern="pods"), seconds=0.3) as checker:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGSTOP)
        wake = threading.Timer(0.5, os.kill, (worker.pid, signal.SIGCONT))
        wake.start()
        assert checker.passes("get pods", "")
        wake.join()


def test_a_process_that_ends_is_replaced_until_it_has_ended_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()

    monkeypatch.setattr(answer_check, "_MOST_RESTARTS", 1)
    with AnswerChecker(score(check="regex", pattern="pods")) as checker:
        kill()
        assert not checker.passes("get pods", "")
        assert checker.passes("get pods", "")
        kill()
        with pytest.raises(StepFailure, match="the last time because its process ended with exit code -9: simplify it"):
            checker.passes("get pods", "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"check": "regex", "pattern": "(a"}, "pattern is no regular expression of Python: missing )"),
        ({"check": "jsonSchema", "schema": "{"}, "schema is no JSON schema"),
        ({"check": "jsonSchema", "schema": '{"type": 5}'}, "schema is no JSON schema"),
        ({"check": "jsonSchema", "schema": "[]"}, "schema is no JSON schema: it is [], and must be an object"),
        ({"check": "jsonSchema", "schema": "null"}, "schema is no JSON schema: it is null, and must be an object"),
        ({"check": "jsonSchema", "schema": '{"$schema": []}'}, "schema is no JSON schema"),
        (
            {"check": "jsonSchema", "schema": '{"$dynamicRef": "#none"}'},
            "a $ref must lead to a part of the same schema",
        ),
        (
            {"check": "jsonSchema", "schema": '{"$ref": "#/$defs/none"}'},
            "a $ref must lead to a part of the same schema",
        ),
        ({"check": "jsonSchema", "schema": '{"$ref": "http://127.0.0.1:9/s.json"}'}, "a $ref must lead to a part"),
    ],
)
def test_a_check_that_cannot_be_used_is_rejected(settings: dict[str, str], words: str) -> None:
    with pytest.raises(StepFailure) as failure, AnswerChecker(score(**settings)):
        pass
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert failure.value.message.startswith("spec.gate.score.")
    assert words in failure.value.message


@pytest.mark.parametrize(
    ("check", "text", "words"),
    [
        ("regex", "(a", "is no regular expression of Python: missing )"),
        ("jsonSchema", '{"$ref": "http://127.0.0.1:9/s.json"}', "a $ref must lead to a part"),
    ],
)
def test_a_row_whose_check_cannot_be_used_is_rejected(check: Any, text: str, words: str) -> None:
    with AnswerChecker(score(check=check)) as checker, pytest.raises(StepFailure) as failure:
        checker.require_usable(Criterion(check, text, "a.jsonl line 3: 'check'"))
    assert failure.value.exit_code is ExitCode.BAD_DATASET
    assert failure.value.message.startswith("a.jsonl line 3: 'check' ")
    assert words in failure.value.message


def test_a_schema_that_refers_to_itself_without_end_lets_nothing_pass() -> None:
    assert passing(score(check="jsonSchema", schema='{"$ref": "#"}'), ["{}", "7"]) == [False, False]
