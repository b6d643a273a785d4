"""Answers are checked as spec.gate.score says, and no pattern, schema or answer holds up the step."""

from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_api.gate import ScoreSpec
from qlora_trainer.core.answer_check import AnswerChecker
from qlora_trainer.core.failures import StepFailure

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
def test_an_answer_that_takes_too_long_has_not_passed_and_the_next_one_is_checked(
    spec: ScoreSpec, evil: str, good: str
) -> None:
    with AnswerChecker(spec, seconds=0.5) as checker:
        assert not checker.passes(evil, "")
        assert checker.passes(good, "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"check": "regex", "pattern": "(a"}, "pattern is no regular expression of Python: missing )"),
        ({"check": "jsonSchema", "schema": "{"}, "schema is no JSON schema"),
        ({"check": "jsonSchema", "schema": '{"type": 5}'}, "schema is no JSON schema"),
        ({"check": "jsonSchema", "schema": "[]"}, "schema is no JSON schema"),
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


def test_a_schema_that_refers_to_itself_without_end_lets_nothing_pass() -> None:
    assert passing(score(check="jsonSchema", schema='{"$ref": "#"}'), ["{}", "7"]) == [False, False]
