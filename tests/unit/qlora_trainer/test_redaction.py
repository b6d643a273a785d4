"""No message, record or traceback shows a credential that a library has quoted."""

import pytest

from qlora_trainer.core.records import redact


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
