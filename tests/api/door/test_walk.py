"""The way of a user of OpenAI's client, from the upload to the finished model."""

from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning.job_create_params import Hyperparameters

from devcluster.controlplane import ControlPlane
from qlora_api.status import Condition, QLoRAJobStatus
from tests.support.door import LARGE, MODEL, NOW, ROWS, SHA256, DoorProcess, Tenant, end_well, upload, write_status


@pytest.fixture(params=["impersonate", "token"])
def client(request: pytest.FixtureRequest, alice: Tenant) -> OpenAI:
    """Of a tenant, in each mode."""
    if request.param == "token":
        passing: DoorProcess = request.getfixturevalue("passing_door")
        return passing.client(alice.key("--duration=1h"))
    door: DoorProcess = request.getfixturevalue("door")
    return door.client(alice.key())


def stored(plane: ControlPlane, name: str) -> dict[str, Any]:
    return plane.kubectl.get("qlorajob", name, "--namespace=team-a")


def test_files_are_kept_as_they_were_uploaded(client: OpenAI) -> None:
    name = upload(client)
    assert client.files.content(name).read() == ROWS
    assert client.files.retrieve(name).bytes == len(ROWS)
    assert client.files.wait_for_processing(name).status == "processed"
    assert name in {file.id for file in client.files.list(purpose="fine-tune")}
    assert client.files.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(name)


def test_a_job_has_the_hyperparameters_of_the_request(client: OpenAI, plane: ControlPlane) -> None:
    name = upload(client)
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=name,
        validation_file=name,
        suffix="My bot!",
        seed=7,
        metadata={"team": "support"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5}},
        },
    )
    assert job.id.startswith("ftjob-my-bot-")
    assert job.status == "validating_files"
    assert job.metadata == {"team": "support"}
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.n_epochs == 2
    spec = stored(plane, job.id)["spec"]
    assert spec["training"]["epochs"] == 2
    assert spec["training"]["learningRate"] == 0.001
    assert spec["training"]["seed"] == job.seed == 7
    assert spec["training"]["trainOn"] == "weighted"
    assert spec["dataset"]["source"] == spec["dataset"]["eval"]["source"] == f"configMap://{name}/data.jsonl"
    assert spec["dataset"]["sha256"] == spec["dataset"]["eval"]["sha256"]


def test_a_batch_size_and_a_multiplier_guide_the_automatic_settings(client: OpenAI, plane: ControlPlane) -> None:
    asked: Hyperparameters = {"batch_size": 8, "learning_rate_multiplier": 2}
    job = client.fine_tuning.jobs.create(model="automatic", training_file=upload(client), hyperparameters=asked)
    training = stored(plane, job.id)["spec"]["training"]
    assert (training["batchSize"], training["learningRateMultiplier"]) == (8, 2)
    assert (job.hyperparameters.batch_size, job.hyperparameters.learning_rate_multiplier) == (8, 2)


def test_preferences_are_trained_with_dpo(client: OpenAI, plane: ControlPlane) -> None:
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=upload(client),
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}},
        integrations=[{"type": "wandb", "wandb": {"project": "support"}}],
    )
    spec = stored(plane, job.id)["spec"]
    assert spec["training"]["objective"] == "dpo"
    assert spec["training"]["preference"]["beta"] == 0.3
    assert spec["training"]["reportTo"] == ["wandb"]
    assert spec["output"]["tracking"]["experiment"] == "support"
    assert job.integrations is not None
    assert job.integrations[0].wandb.project == "support"


def test_a_finished_job_names_its_model_results_and_events(client: OpenAI, plane: ControlPlane) -> None:
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client))
    end_well(plane, "team-a", job.id)
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert ended.status == "succeeded"
    assert ended.fine_tuned_model == f"team-a/{job.id}@sha256:{SHA256}"
    assert ended.trained_tokens == 200
    assert ended.finished_at
    (results,) = ended.result_files
    assert client.files.retrieve(results).purpose == "fine-tune-results"
    assert client.files.content(results).text.splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "4,2.5,,,",
        "8,1.5,,1.25,",
    ]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert len(events) == 5
    assert {event.data["step"] for event in events if event.type == "metrics"} == {4, 8}  # type: ignore[index]
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == ended.fine_tuned_model
    assert checkpoint.step_number == 8
    assert client.models.retrieve(ended.fine_tuned_model).owned_by == "team-a"
    assert {MODEL, ended.fine_tuned_model} <= {model.id for model in client.models.list()}
    assert client.models.delete(ended.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(job.id)


def test_a_job_is_paused_resumed_and_canceled(client: OpenAI, plane: ControlPlane) -> None:
    # The client's own models do not have the status "paused", although the API does.
    lenient = client.copy()
    lenient._strict_response_validation = False
    name = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client)).id
    assert str(lenient.fine_tuning.jobs.pause(name).status) == "paused"
    assert stored(plane, name)["spec"]["suspend"] is True
    assert client.fine_tuning.jobs.resume(name).status == "validating_files"
    assert stored(plane, name)["spec"]["suspend"] is False
    plane.kubectl("patch", "qlorajob", name, "--namespace=team-a", "--type=merge", '-p={"spec": {"suspend": true}}')
    assert client.fine_tuning.jobs.retrieve(name).status == "queued"
    assert client.fine_tuning.jobs.cancel(name).status == "cancelled"
    assert stored(plane, name)["spec"]["cancel"] is True
    with pytest.raises(openai.BadRequestError, match="has ended"):
        client.fine_tuning.jobs.cancel(name)


def test_a_failed_job_has_the_reason_and_the_field(client: OpenAI, plane: ControlPlane) -> None:
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client))
    failed = Condition(
        type="Failed", status="True", reason="BadDataset", message="row 3 is empty", last_transition_time=NOW
    )
    status = QLoRAJobStatus(phase="Failed", conditions=(failed,), completion_time=NOW)
    write_status(plane, "team-a", job.id, status)
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert found.status == "failed"
    assert found.error is not None
    assert (found.error.code, found.error.message, found.error.param) == (
        "BadDataset",
        "row 3 is empty",
        "training_file",
    )


def test_lists_have_pages_and_are_limited_by_metadata(client: OpenAI) -> None:
    name, mark = upload(client), {"walk": client.api_key[-12:]}
    made = [client.fine_tuning.jobs.create(model=MODEL, training_file=name, metadata=mark).id for _ in range(3)]
    assert sorted(job.id for job in client.fine_tuning.jobs.list(limit=2, metadata=mark)) == sorted(made)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.fine_tuning.jobs.list(after="ftjob-gone")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "gpt-4o"}, "must be one of: automatic, smollm2-135m"),
        ({"training_file": "file-none"}, "training_file: file file-none was not found"),
        ({"training_file": "../../secrets"}, "was not found"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs: found 0"),
        ({"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs"),
        ({"method": {"type": "reinforcement"}}, "must be supervised or dpo"),
        ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, "in two places"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p", "entity": "e"}}]}, "only wandb's project"),
        ({"top_p": 1}, "top_p: unknown"),
    ],
)
def test_a_bad_request_is_explained(door: DoorProcess, alice: Tenant, change: dict[str, Any], words: str) -> None:
    client = door.client(alice.key())
    body = {"model": MODEL, "training_file": upload(client), **change}
    with pytest.raises(openai.BadRequestError, match=words):
        client.post("/fine_tuning/jobs", cast_to=object, body=body)


def test_a_field_of_the_resource_is_checked_by_the_api_server(door: DoorProcess, alice: Tenant) -> None:
    client = door.client(alice.key())
    with pytest.raises(openai.BadRequestError, match="learningRate"):
        client.fine_tuning.jobs.create(
            model=MODEL, training_file=upload(client), hyperparameters={"learning_rate_multiplier": 1000}
        )


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"", "it has no rows"),
        (b'{"a": 1}\n[1]\n', "line 2 is not a JSON object"),
        (b'{"a": "\xff"}\n', "line 1 is not a JSON object in UTF-8"),
        (b'{"a": "' + b"x" * 2**20 + b'"}\n', "line 1 has more than 1048576 bytes"),
    ],
)
def test_a_file_with_bad_rows_is_refused(door: DoorProcess, alice: Tenant, rows: bytes, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        upload(door.client(alice.key()), rows)


def test_a_large_file_is_kept_in_the_bucket(door: DoorProcess, alice: Tenant, plane: ControlPlane) -> None:
    client = door.client(alice.key())
    name = upload(client, LARGE)
    assert client.files.content(name).read() == LARGE
    job = client.fine_tuning.jobs.create(model="automatic", training_file=name)
    assert stored(plane, job.id)["spec"]["dataset"]["source"] == f"s3://team/files/team-a/{name}.jsonl"
    with pytest.raises(openai.ConflictError, match=f"job {job.id} reads file {name}"):
        client.files.delete(name)
    plane.kubectl("delete", "qlorajob", job.id, "--namespace=team-a")
    assert client.files.delete(name).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(name)


def test_a_file_above_the_limit_is_refused(door: DoorProcess, passing_door: DoorProcess, alice: Tenant) -> None:
    with pytest.raises(openai.APIStatusError, match="3000000 bytes") as refused:
        upload(door.client(alice.key()), LARGE * 2)
    assert refused.value.status_code == 413
    with pytest.raises(openai.APIStatusError, match="no bucket") as refused:
        upload(passing_door.client(alice.key("--duration=1h")), LARGE)
    assert refused.value.status_code == 413


def test_the_purpose_may_come_after_the_file(door: DoorProcess, alice: Tenant) -> None:
    headers = {"Authorization": f"Bearer {alice.key()}"}
    after: dict[str, Any] = {"file": ("a.jsonl", ROWS), "purpose": (None, "fine-tune")}
    answer = httpx2.post(f"{door.url}/files", headers=headers, files=after)
    assert answer.status_code == 200, answer.text
    wrong: dict[str, Any] = {"file": ("a.jsonl", LARGE), "purpose": (None, "assistants")}
    before = len(list(door.client(alice.key()).files.list()))
    answer = httpx2.post(f"{door.url}/files", headers=headers, files=wrong)
    assert answer.status_code == 400
    assert "must be fine-tune" in answer.text
    assert len(list(door.client(alice.key()).files.list())) == before
