"""Records come at a bounded rate, and none shows a credential that a library has quoted."""

import io
import json

import pytest

from qlora_api.contract import ProgressRecord
from qlora_trainer.core.records import RecordWriter, redact


@pytest.mark.parametrize(
    "text",
    [
        "401 for hf_canaryCANARY",
        "Authorization: Bearer canary",
        "Authorization: Basic canary==",
        "{'Authorization': 'Bearer canary', 'Accept': '*/*'}",
        "bearer canary",
        "https://reader:canary@hub.example.org/api",
        "504 for url: https://cdn.example.org/x?X-Amz-Algorithm=AWS4&X-Amz-Signature=canary&X-Amz-Expires=60",
        "https://storage.example.org/x?X-Goog-Algorithm=GOOG4&X-Goog-Credential=canary&X-Goog-Signature=canary",
        "https://cdn.example.org/x?Policy=canary&Signature=canary~&Key-Pair-Id=canary'",
        "https://account.blob.example.org/x?sv=2024&sig=canary%3D",
        "Authorization: SharedKey account:canary=",
        "DefaultEndpointsProtocol=https;AccountName=account;AccountKey=canary==;EndpointSuffix=core.windows.net",
        "the assertion eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJjYW5hcnkifQ.canary was rejected",
        '{"private_key": "-----BEGIN PRIVATE KEY-----\\ncanary\\n-----END PRIVATE KEY-----"}',
        "http://team:canary%2Fpassword@proxy.example.org:3128",
    ],
)
def test_a_credential_is_redacted(text: str) -> None:
    assert "canary" not in redact(text).lower()
    assert "[redacted]" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "GET https://hub.example.org/acme/tiny/resolve/main/config.json?download=true",
        "HTTP 401 for s3://bucket/models with the credentials of spec.model.secretRef",
        "the policy of retries and the signature of a function",
    ],
)
def test_other_text_is_not_redacted(text: str) -> None:
    assert redact(text) == text


def test_progress_comes_every_five_seconds_and_a_checkpoint_at_once() -> None:
    """The operator reads a log from its end: more would push other lines out of it."""
    stream, clock = io.StringIO(), [0.0]
    writer = RecordWriter(stream, lambda: clock[0])
    # The second of each step's report; that of step 4 is forced.
    for step, clock[0] in enumerate((0.0, 1.0, 4.9, 5.0, 6.0, 9.0, 11.0)):
        record = ProgressRecord(job_uid="j", pod_uid="p", step="train", time="2026-01-02T03:04:05Z", training_step=step)
        writer.progress(record, force=step == 4)
    assert [json.loads(line)["trainingStep"] for line in stream.getvalue().splitlines()] == [0, 3, 4, 6]
    assert writer.findings.progress == record
