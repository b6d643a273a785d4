"""Errors of unanswered requests: the words at the bottom of the HTTP library's exception."""

import socket
import ssl

import pytest
from urllib3.exceptions import MaxRetryError, NameResolutionError, NewConnectionError, ProtocolError, ReadTimeoutError

from qlora_client.kube.errors import (
    ClusterError,
    ForbiddenError,
    MissingError,
    RejectedError,
    UnreachableError,
    answered,
    unreachable,
)
from qlora_client.kube.resources import JOBS, LOGS, Request


def retried(cause: Exception) -> MaxRetryError:
    return MaxRetryError(None, "/api", cause)  # type: ignore[arg-type]


def refused() -> Exception:
    error = NewConnectionError(None, "Failed to establish a new connection: [Errno 111] Connection refused")  # type: ignore[arg-type]
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    return error


def unresolved() -> Exception:
    cause = socket.gaierror(-2, "Name or service not known")
    error = NameResolutionError("api.example", None, cause)  # type: ignore[arg-type]
    error.__cause__ = cause
    return error


def untrusted() -> Exception:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    error.verify_message = "self-signed certificate"
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (retried(refused()), "Connection refused"),
        (retried(unresolved()), "Name or service not known"),
        (retried(untrusted()), "its certificate is not accepted: self-signed certificate"),
        (ReadTimeoutError(None, "/api", "Read timed out."), "no answer in time"),  # type: ignore[arg-type]
        (ProtocolError("Connection broken", ConnectionResetError(104, "Connection reset by peer")), "Connection reset"),
        (ProtocolError("Response ended prematurely"), "Response ended prematurely"),
    ],
)
def test_the_cause_is_reported_in_a_few_words(error: Exception, words: str) -> None:
    told = str(unreachable("the context work", "https://api.example:6443", error))
    assert told.startswith(f"the context work cannot be reached at https://api.example:6443: {words}")
    assert "object at 0x" not in told


@pytest.mark.parametrize(
    ("request_", "code", "body", "kind", "told"),
    [
        (
            Request("get", LOGS, "team"),
            403,
            '{"message": "pods \\"a\\" is forbidden: User \\"me\\" cannot get resource \\"pods/log\\""}',
            ForbiddenError,
            (
                "you may not get pods/log in the namespace team of work: ask for a Role with the rule "
                '{apiGroups: [""], resources: ["pods/log"], verbs: ["get"]}'
            ),
        ),
        (Request("create", JOBS, "team"), 403, '{"message": "exceeded quota"}', RejectedError, "exceeded quota"),
        (Request("create", JOBS, "team"), 422, b'{"message": "spec: no"}', RejectedError, "spec: no"),
        (
            Request("get", JOBS, "team", "a"),
            404,
            '{"message": "qlorajobs \\"a\\" not found", "details": {"name": "a"}}',
            MissingError,
            'qlorajobs "a" not found in the namespace team of work',
        ),
        (Request("list", JOBS, None), 503, "", UnreachableError, "work answered with HTTP 503: Gone fishing"),
        (
            Request("list", JOBS, None),
            418,
            "<html>",
            ClusterError,
            "work answered with HTTP 418: Gone fishing: '<html>'",
        ),
    ],
)
def test_an_answer_becomes_an_error_with_a_remedy(
    request_: Request, code: int, body: str | bytes, kind: type[ClusterError], told: str
) -> None:
    error = answered("work", request_, code, "Gone fishing", body)
    assert (type(error), str(error)) == (kind, told)
