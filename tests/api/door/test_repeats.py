"""Requests that are repeated, interrupted, or sent to two doors at the same time."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
import yaml

from devcluster.controlplane import ControlPlane
from tests.api.door.conftest import MODELS
from tests.support.door import LARGE, MODEL, ROWS, DoorProcess, Tenant, door_process, upload
from tests.support.servers import ACCESS_KEY, SECRET_KEY, s3_bucket
from tests.support.waiting import eventually


@pytest.fixture
def second(door: DoorProcess, tmp_path: Path) -> Iterator[DoorProcess]:
    """Another door with the same account, which a test may kill."""
    folder = door.log.parent
    settings = yaml.safe_load(door.log.with_suffix(".yaml").read_text())
    credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with door_process(tmp_path, folder / "door.kubeconfig", settings, credentials) as process:
        yield process


def test_a_repeated_request_makes_one_job(door: DoorProcess, second: DoorProcess, alice: Tenant) -> None:
    file, key = upload(door.client(alice.key())), alice.key()

    def create(at: DoorProcess) -> str:
        headers = {"Idempotency-Key": "one"}
        return at.client(key).fine_tuning.jobs.create(model=MODEL, training_file=file, extra_headers=headers).id

    with ThreadPoolExecutor(8) as pool:
        names = set(pool.map(create, [door, second] * 4))
    assert len(names) == 1
    with pytest.raises(openai.ConflictError, match="another request had the same one"):
        second.client(key, max_retries=0).fine_tuning.jobs.create(
            model="automatic", training_file=file, extra_headers={"Idempotency-Key": "one"}
        )


def test_a_door_that_is_killed_leaves_everything_readable(
    door: DoorProcess, second: DoorProcess, alice: Tenant
) -> None:
    client = second.client(alice.key())
    file = upload(client)
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file).id
    second.kill()
    with pytest.raises(openai.APIConnectionError):
        client.with_options(max_retries=0).files.list()
    other = door.client(alice.key())
    assert other.files.content(file).read() == ROWS
    assert other.fine_tuning.jobs.retrieve(job).training_file == file


def _half_an_upload(port: int, key: str) -> socket.socket:
    """Send the beginning of a large upload, and keep the connection."""
    connection = socket.create_connection(("127.0.0.1", port))
    part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + LARGE[:1_500_000]
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: door\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {len(LARGE)}\r\n\r\n"
    )
    connection.sendall(head.encode() + part)
    return connection


def _objects(bucket: str) -> set[str]:
    pages = s3_bucket(bucket.removeprefix("http://")).list()
    return {str(entry["path"]) for page in pages for entry in page}


def test_an_upload_that_breaks_off_leaves_nothing(
    door: DoorProcess, alice: Tenant, bucket: str, plane: ControlPlane
) -> None:
    before, client = _objects(bucket), door.client(alice.key())
    files = {file.id for file in client.files.list()}
    _half_an_upload(door.port, alice.key()).close()
    eventually(lambda: 'route="/v1/files"' in door.get("/metrics")[1], seconds=30, every=0.1, what="the answer")
    assert _objects(bucket) == before
    assert {file.id for file in client.files.list()} == files


def test_a_door_that_is_killed_during_an_upload_leaves_no_file(
    door: DoorProcess, second: DoorProcess, alice: Tenant, bucket: str
) -> None:
    before, client = _objects(bucket), door.client(alice.key())
    files = {file.id for file in client.files.list()}
    connection = _half_an_upload(second.port, alice.key())
    second.kill()
    connection.close()
    assert _objects(bucket) == before
    assert {file.id for file in client.files.list()} == files


def test_only_a_read_is_worth_repeating(plane: ControlPlane, alice: Tenant, tmp_path: Path) -> None:
    kubeconfig = yaml.safe_load(plane.kubeconfig.read_text())
    # Nothing listens there.
    kubeconfig["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig))
    with door_process(tmp_path, path, {"identity": "token", "models": MODELS}) as door:
        headers = {"Authorization": "Bearer key"}
        read = httpx2.get(f"{door.url}/fine_tuning/jobs", headers=headers)
        assert (read.status_code, read.headers["x-should-retry"]) == (503, "true")
        written = httpx2.post(f"{door.url}/fine_tuning/jobs", headers=headers, content=json.dumps({}))
        assert (written.status_code, written.headers["x-should-retry"]) == (503, "false")


def test_a_path_that_is_not_offered_is_explained(door: DoorProcess, alice: Tenant) -> None:
    answer = httpx2.post(f"{door.url}/chat/completions", headers={"Authorization": f"Bearer {alice.key()}"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
