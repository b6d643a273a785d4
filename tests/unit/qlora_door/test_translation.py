"""Requests, names, pages and rows, without a server."""

import json
from typing import Any

import pytest

from qlora_api.spec.job import MAX_NAME_LENGTH, QLoRAJobDocument
from qlora_door.content import JsonLines
from qlora_door.errors import ApiError
from qlora_door.history import events_of
from qlora_door.identity import User, headers_of, user_of
from qlora_door.job import Job, Note, job_name, manifest_of, spec_of
from qlora_door.paging import page
from qlora_door.request import parse_request
from qlora_door.settings import DoorSettings

FILE = {"source": "configMap://file-a/data.jsonl", "sha256": "0" * 64}
NOW = "2026-01-02T03:04:05Z"


def request(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "training_file": "file-a", **fields}).encode()


def spec(template: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return spec_of({"model": {"source": "hf://a/b"}, **template}, parse_request(request(**fields)), FILE, None)


def stored(status: dict[str, Any], **spec: Any) -> Job:
    annotations = {"qlora.dev/openai": Note(model="m", training_file="file-a").model_dump_json()}
    metadata = {"name": "ftjob-a", "namespace": "n", "creationTimestamp": NOW, "annotations": annotations}
    return Job({"metadata": metadata, "spec": {"training": {}, **spec}, "status": status})


@pytest.mark.parametrize("suffix", [None, "", "My Bot!", "--", "ü", "x" * 64, "a-" * 30])
def test_a_name_is_one_of_a_job(suffix: str | None) -> None:
    name = job_name("user", suffix, None, "0" * 12)
    document = manifest_of(name, spec({}), Note(model="m", training_file="f"))
    assert QLoRAJobDocument.model_validate(document).metadata.name == name
    assert len(name) <= MAX_NAME_LENGTH


def test_an_idempotency_key_is_of_one_user() -> None:
    assert job_name("a", "x", "key", "1" * 12) == job_name("a", None, "key", "2" * 12)
    assert job_name("a", None, "key", "1" * 12) != job_name("b", None, "key", "1" * 12)


def test_hyperparameters_replace_those_of_the_template() -> None:
    template = {"training": {"maxSteps": 5, "microBatchSize": 2, "packing": True, "weightDecay": 0.1}}
    asked = {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 2}
    training = spec(template, hyperparameters=asked)["training"]
    assert training == {
        "epochs": 2,
        "batchSize": 8,
        "learningRateMultiplier": 2,
        "weightDecay": 0.1,
        "trainOn": "weighted",
    }


def test_auto_leaves_the_template_as_it_is() -> None:
    template = {"training": {"epochs": 4, "learningRate": 0.1, "trainOn": "last"}}
    asked = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    for fields in ({}, {"hyperparameters": asked}, {"method": {"type": "supervised"}}, {"validation_file": None}):
        assert spec(template, **fields)["training"] == template["training"]
    assert template == {"training": {"epochs": 4, "learningRate": 0.1, "trainOn": "last"}}


@pytest.mark.parametrize(
    ("status", "spec", "state"),
    [
        ({}, {}, "validating_files"),
        ({"phase": "Queued"}, {}, "queued"),
        ({"phase": "Publishing"}, {}, "running"),
        ({"phase": "Suspended"}, {}, "queued"),
        ({"phase": "Training"}, {"suspend": True}, "queued"),
        ({"phase": "Training"}, {"cancel": True}, "cancelled"),
        ({"phase": "Succeeded"}, {"cancel": True}, "succeeded"),
        ({"phase": "Failed"}, {"suspend": True}, "failed"),
    ],
)
def test_a_state_is_one_of_the_client(status: dict[str, Any], spec: dict[str, Any], state: str) -> None:
    assert stored(status, **spec).state == state


def test_a_job_that_waits_for_a_limit_is_queued() -> None:
    waiting = {"type": "Succeeded", "status": "Unknown", "reason": "JobLimitReached", "lastTransitionTime": NOW}
    assert stored({"phase": "Pending", "conditions": [waiting]}).state == "queued"


def test_events_keep_their_ids_while_the_job_runs() -> None:
    table = "step,train_loss,valid_loss\n1,2.5,\n2,2.25,2.4"
    early = stored({"history": table, "progress": {"step": 2, "totalSteps": 9, "updatedAt": NOW}})
    late = stored({"history": f"{table}\n3,2.1,", "progress": {"step": 3, "totalSteps": 9, "updatedAt": NOW}})
    ids = [event["id"] for event in events_of(early)]
    assert [event["id"] for event in events_of(late)][1:] == ids
    assert events_of(early)[0]["message"] == "Step 2/9: training loss=2.25, validation loss=2.40"


def test_a_page_follows_the_id() -> None:
    items = [{"id": str(number)} for number in range(5)]
    found = page(items, {"after": "1", "limit": "2"}, default=20, most=100)
    assert [each["id"] for each in found["data"]] == ["2", "3"]
    assert found["has_more"]
    assert not page(items, {"after": "3"}, default=20, most=100)["has_more"]
    assert page([], {}, default=20, most=100)["last_id"] is None


@pytest.mark.parametrize("limit", ["0", "-1", "101", "x", "1.5", "٣", "9" * 40])
def test_a_limit_is_a_number(limit: str) -> None:
    with pytest.raises(ApiError, match="limit"):
        page([], {"limit": limit}, default=20, most=100)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_rows_are_checked_however_they_arrive(size: int) -> None:
    content = b'\xef\xbb\xbf{"a": "\xc3\xbc"}\r\n\n{"b": 2}'
    lines = JsonLines(1000)
    for start in range(0, len(content), size):
        lines.add(content[start : start + size])
    assert len(lines.finish()) == 64
    assert lines.size == len(content)


@pytest.mark.parametrize("name", [" admin", "admin ", "a\nb", "a\x00"])
def test_a_name_that_a_header_would_change_is_denied(name: str) -> None:
    with pytest.raises(ApiError, match="white space"):
        user_of({"user": {"username": name}}, "TokenReview")
    with pytest.raises(ApiError, match="white space"):
        user_of({"user": {"username": "a", "groups": [name]}}, "TokenReview")


def test_groups_are_those_of_an_oidc_user_only() -> None:
    account = User("system:serviceaccount:team-a:trainer", ("system:serviceaccounts", "system:authenticated"))
    assert account.own_namespace == "team-a"
    assert headers_of(account) == [("Impersonate-User", account.name)]
    user = User("oidc:alice", ("oidc:team-a", "oidc:team-b", "system:authenticated"))
    assert user.own_namespace is None
    assert [value for _, value in headers_of(user)] == ["oidc:alice", "oidc:team-a", "oidc:team-b"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"model": {"source": "nowhere"}}, "model"),
        ({"model": {"source": "hf://a/b"}, "dataset": {"source": "hf://c/d"}}, "remove dataset.source"),
        ({"model": {"source": "hf://a/b"}, "trainin": {}}, "trainin"),
    ],
)
def test_a_bad_template_is_found_at_the_start(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DoorSettings.model_validate({"models": {"m": {"spec": spec}}})
