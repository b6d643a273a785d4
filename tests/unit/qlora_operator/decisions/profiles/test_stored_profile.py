"""Stored profiles: valid ones, invalid ones, and the namespaces that they admit."""

from typing import Any

import pytest

from qlora_operator.decisions.profiles.stored_profile import judged, parse_profile, with_selected
from tests.support.builders import NOW, present, profile_body

LABELS = {"team-a": {"tier": "gold", "zone": "1"}, "team-b": {"tier": "gold"}, "team-c": {"tier": "free"}, "team-d": {}}


@pytest.mark.parametrize(
    ("allowed", "admitted"),
    [
        (None, ["team-a", "team-b", "team-c", "team-d"]),
        ({"names": ["team-d"]}, ["team-d"]),
        ({"selector": {"matchLabels": {"tier": "gold"}}}, ["team-a", "team-b"]),
        ({"selector": {"matchLabels": {"tier": "gold", "zone": "1"}}, "names": ["team-c"]}, ["team-a", "team-c"]),
        ({"selector": {"matchLabels": {"tier": "none"}}}, []),
    ],
)
def test_namespaces_are_admitted_by_their_name_or_their_labels(allowed: Any, admitted: list[str]) -> None:
    stored = parse_profile(profile_body(**({} if allowed is None else {"allowedNamespaces": allowed})))
    profile = with_selected(present(stored.profile), LABELS)
    assert [name for name in LABELS if profile.admits(name)] == admitted


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"image": None}, "image: Input should be a valid string"),
        ({"gpus": 2}, "gpus: Extra inputs are not permitted"),
        ({"device": "tpu"}, "device: Input should be 'cuda' or 'cpu'"),
        ({"allowedNamespaces": {}}, "allowedNamespaces: Value error, set names, selector, or both"),
    ],
)
def test_a_profile_of_another_schema_is_not_ready_and_names_the_field(changed: dict[str, Any], words: str) -> None:
    stored = parse_profile(profile_body(**changed))
    (found,) = judged(stored, NOW).conditions
    assert (stored.profile, found.status, found.reason) == (None, "False", "InvalidSpec")
    assert words in found.message


def test_a_valid_profile_is_ready_and_its_status_is_written_once() -> None:
    body = profile_body(generation=3)
    status = judged(parse_profile(body), NOW)
    assert (status.observed_generation, [each.status for each in status.conditions]) == (3, ["True"])
    again = parse_profile(body | {"status": status.dump()})
    assert judged(again, NOW) == again.status


def test_a_status_of_another_schema_is_kept_and_no_job_starts() -> None:
    """It has the GPU hours of jobs that were deleted."""
    stored = parse_profile(profile_body() | {"status": {"conditions": 7}})
    assert (stored.has_status, stored.profile) == (False, None)
    assert "cannot read the status, which has the GPU hours: conditions: " in stored.problem


def test_a_selector_that_cannot_be_evaluated_is_reported() -> None:
    selecting = profile_body(allowedNamespaces={"selector": {"matchLabels": {"tier": "gold"}}})
    for body, reason in ((profile_body(), "Valid"), (selecting, "NamespacesNotReadable")):
        assert [each.reason for each in judged(parse_profile(body), NOW, "forbidden").conditions] == [reason]
