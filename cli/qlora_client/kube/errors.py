"""Errors between a user and a cluster: each message is one sentence, with the remedy."""

import json
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_client.kube.resources import JOBS, Request


class ClusterError(RuntimeError):
    """The cluster could not be reached, or its answer is unusable."""


class UnreachableError(ClusterError):
    """No answer, or a temporary error of the API server: a retry may succeed."""


class MissingError(ClusterError):
    """There is no such object."""


class ForbiddenError(ClusterError):
    """The user lacks a right; the message names the RBAC rule to ask for."""


class RejectedError(ClusterError):
    """The API server does not accept the object; the message has its reasons."""


_LATER = frozenset({429, 500, 502, 503, 504})


def answered(cluster: str, request: Request, code: int, reason: str, body: bytes | str) -> ClusterError:
    """Return the error for an HTTP status and body of the API server `cluster`."""
    message, details = _status(body, reason)
    if code == 401:
        return ClusterError(f"{cluster} does not accept your credentials: log in again, or choose another context")
    # Admission, such as a quota or a policy, answers with the same status, but not in these words.
    if code == 403 and f"cannot {request.verb} resource" in message:
        return ForbiddenError(
            f"you may not {request.verb} {request.resource.in_rules} {request.place} of {cluster}: ask for a "
            f"{request.role} with the rule {request.rule}"
        )
    if code == 404 and request.resource.group == JOBS.group and "name" not in details:
        return ClusterError(
            f"{cluster} does not know QLoRAJobs: install the operator there, or choose another with --context"
        )
    if code == 404:
        return MissingError(f"{message} {request.place} of {cluster}")
    if code in (400, 403, 409, 422):
        return RejectedError(message)
    kind = UnreachableError if code in _LATER else ClusterError
    return kind(f"{cluster} answered with HTTP {code}: {message}")


def unreachable(cluster: str, host: str, error: BaseException) -> UnreachableError:
    """The error for a request that got no answer, or only the beginning of one."""
    return UnreachableError(f"{cluster} cannot be reached at {host}: {_cause(error)}")


def deleted(cluster: str, request: Request, name: str) -> MissingError:
    """The error for an object that is deleted while it is watched."""
    return MissingError(f"{name} has been deleted {request.place} of {cluster}")


def _status(body: bytes | str, reason: str) -> tuple[str, Mapping[str, Any]]:
    """Return message and details of the answer's Status, or quote any other answer."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        answer = json.loads(text)
        return str(answer["message"]), answer.get("details") or {}
    except (ValueError, LookupError, TypeError):
        return f"{reason}: {text[:200]!r}" if text else reason, {}


def _cause(error: BaseException) -> str:
    """Return the innermost cause of the HTTP library's error, of the system or of TLS."""
    for inner in reversed(tuple(_chain(error))):
        if isinstance(inner, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted: {inner.verify_message}"
        if isinstance(inner, socket.timeout | TimeoutError) or "timed out" in str(inner):
            return "no answer in time"
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
    return str(getattr(error, "reason", None) or error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then its cause, and so on: the library stores causes in three ways."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = [part for part in (getattr(error, "reason", None), *error.args) if isinstance(part, BaseException)]
        error = next(iter(inner), None) or error.__cause__ or error.__context__
