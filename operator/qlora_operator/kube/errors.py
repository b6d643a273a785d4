"""Errors of calls to the API server: each class is a reaction, to wait, to read again or to report."""

import json


class ClusterError(Exception):
    """A call has failed."""


class UnavailableError(ClusterError):
    """The API server was not reached, or could not answer: try again later."""


class ExpiredError(UnavailableError):
    """The token of a list's next page is older than five minutes. `next_token`: to continue, if offered."""

    def __init__(self, message: str, next_token: str) -> None:
        super().__init__(message)
        self.next_token = next_token


class NotFoundError(ClusterError):
    """The object does not exist."""


class ConflictError(ClusterError):
    """The object or its quota has changed, or the name has another object (UID)."""


class AlreadyExistsError(ConflictError):
    """An object of that name exists."""


class RejectedError(ClusterError):
    """The API server rejects the request as it is; the message is the server's own."""


class ForbiddenError(RejectedError):
    """The API server does not allow this to the user, whatever exactly is written."""


class UnauthorizedError(ForbiddenError):
    """The API server does not accept the credentials."""


def error_for_status(status: int, request: str, data: bytes) -> ClusterError:
    """Return the error of an answer with this HTTP status."""
    text, reason, metadata = "", "", None
    try:
        answer = json.loads(data)
        if isinstance(answer, dict):
            text, reason = str(answer.get("message", "")), answer.get("reason", "")
            metadata = answer.get("metadata")
    except ValueError:
        text = first_characters(data)
    if status == 404:
        return NotFoundError(f"{request}: {text}")
    if status == 409:
        # The server also answers so if a quota has changed while it counted the new object.
        return (AlreadyExistsError if reason == "AlreadyExists" else ConflictError)(f"{request}: {text}")
    if status == 410:
        # A proxy may answer with anything.
        token = metadata.get("continue") if isinstance(metadata, dict) else None
        return ExpiredError(f"{request}: {text}", str(token or ""))
    if status in (401, 403):
        return (UnauthorizedError if status == 401 else ForbiddenError)(text)
    # The server answers with 500 if a webhook of the kind cannot be reached.
    if status in (400, 422) or (status == 500 and "failed calling webhook" in text):
        return RejectedError(text)
    return UnavailableError(f"{request}: status {status}: {text}")


def unusable_answer(request: str, found: str) -> UnavailableError:
    """Return the error of an answer that no API server gives."""
    return UnavailableError(f"{request}: the answer is not the API server's: {found}")


def first_characters(data: bytes) -> str:
    """Return the beginning of an answer, for a message."""
    return data[:200].decode(errors="replace")
