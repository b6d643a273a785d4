"""Every error of the hub's client becomes a failure of the step."""

import errno

import httpx2 as client
import pytest
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.stores.hub import Hub, HubRequest

REQUEST = client.Request("GET", "https://hub.example.org/api/models/acme/tiny")
ENDPOINT = "https://hub.example.org"
READS = Hub("hf_reads", endpoint=ENDPOINT)
WRITES = Hub("hf_writes", endpoint=ENDPOINT, field="spec.output.secretRef", writes=True)
MODEL = HubRequest(READS, "model", "acme/tiny", "v1")
DATASET = HubRequest(Hub(None, endpoint=ENDPOINT), "dataset", "acme/rows", None)
DESTINATION = HubRequest(WRITES, "model", "acme/tuned", None)


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    return kind(f"{status} for {REQUEST.url}", response=client.Response(status, request=REQUEST))


def wrapped(error: Exception) -> Exception:
    """As the client does with the answer to its first request for a file."""
    outer = LocalEntryNotFoundError("not found in the cache, and the hub cannot be asked")
    outer.__cause__ = error
    return outer


def failure(request: HubRequest, error: Exception) -> StepFailure:
    with pytest.raises(StepFailure) as caught, request.errors():
        raise error
    return caught.value


UNREACHABLE = {
    "no connection": client.ConnectError("refused"),
    "no answer": client.ReadTimeout("timed out"),
    "an answer that breaks off": client.RemoteProtocolError("peer closed the connection"),
    **{f"HTTP {status}": answered(status) for status in (408, 409, 412, 425, 429, 500, 502, 503, 504)},
    "HTTP 503 to the first request": wrapped(answered(503)),
    "no connection for the first request": wrapped(client.ConnectError("refused")),
    "nothing in the cache": LocalEntryNotFoundError("not found"),
    "no metadata": FileMetadataError("no size"),
    "a connection reset": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "the accelerated transfer": RuntimeError("CAS service error"),
    "no JSON": ValueError("Expecting value: line 1 column 1 (char 0)"),
}
PERMANENT = {
    "gated": answered(403, GatedRepoError),
    "absent": answered(404, RepositoryNotFoundError),
    "no such revision": answered(404, RevisionNotFoundError),
    "no such file": answered(404, RemoteEntryNotFoundError),
    "disabled": answered(403, DisabledRepoError),
    "HTTP 400": answered(400, BadRequestError),
    **{f"HTTP {status}": answered(status) for status in (401, 403, 404, 410, 416)},
    "HTTP 401 to the first request": wrapped(answered(401)),
}
CONFIGURATION = {
    "no name of a repository": HFValidationError("Repo id must use alphanumeric chars"),
    "offline": OfflineModeIsEnabled("offline mode"),
}


@pytest.mark.parametrize("error", UNREACHABLE.values(), ids=UNREACHABLE)
@pytest.mark.parametrize("request_", [MODEL, DATASET, DESTINATION], ids=("model", "dataset", "destination"))
def test_server_errors_are_retryable(request_: HubRequest, error: Exception) -> None:
    assert failure(request_, error).exit_code is ExitCode.UNREACHABLE


@pytest.mark.parametrize("error", PERMANENT.values(), ids=PERMANENT)
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (MODEL, ExitCode.MODEL_UNAVAILABLE),
        (DATASET, ExitCode.BAD_DATASET),
        (DESTINATION, ExitCode.BAD_CONFIGURATION),
    ],
    ids=("model", "dataset", "destination"),
)
def test_a_rejection_is_permanent(request_: HubRequest, code: ExitCode, error: Exception) -> None:
    found = failure(request_, error)
    assert found.exit_code is code
    assert found.message.startswith(f"{request_.kind} hf://{request_.repository} ")


@pytest.mark.parametrize("error", CONFIGURATION.values(), ids=CONFIGURATION)
def test_a_request_that_is_never_sent_is_a_wrong_configuration(error: Exception) -> None:
    found = failure(DATASET, error)
    assert found.exit_code is ExitCode.BAD_CONFIGURATION
    assert "hf://acme/rows" in found.message


def test_a_full_disk_is_distinguished_from_a_broken_transfer() -> None:
    with pytest.raises(OSError, match="No space left"), MODEL.errors():
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_missing_entry_has_no_class_that_escapes() -> None:
    """All derive from HfHubHTTPError or OSError. Add others to HubRequest.errors."""
    assert {kind.__name__ for kind in EntryNotFoundError.__subclasses__()} == {
        RemoteEntryNotFoundError.__name__,
        LocalEntryNotFoundError.__name__,
    }


def test_the_message_names_the_token_the_revision_and_the_remedy() -> None:
    gated = failure(MODEL, answered(403, GatedRepoError)).message
    assert "with the token of spec.model.tokenSecretRef: accept its terms at https://hub.example.org/acme/tiny" in gated
    assert "has no revision 'v1'" in failure(MODEL, answered(404, RevisionNotFoundError)).message
    absent = failure(DATASET, answered(404, RepositoryNotFoundError)).message
    assert "may not be read with no token (spec.model.tokenSecretRef) (HTTP 404)" in absent
    assert "may not be written with the token" in failure(DESTINATION, answered(403)).message
