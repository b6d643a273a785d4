"""Describes errors in the form of OpenAI's API."""

from aiohttp import web

from qlora_operator.kube.errors import (
    ClusterError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    RejectedError,
)

_QUOTA = "exceeded quota"


class ApiError(Exception):
    """An error that the client is answered with."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param

    def response(self, method: str) -> web.Response:
        """Return the answer.

        OpenAI's clients repeat every 408, 409, 429 and 5xx by themselves: only a read that found no server is worth it.
        """
        body = {"message": self.message, "type": self.kind, "code": self.code, "param": self.param}
        repeat = method == "GET" and self.status == 503
        headers = {"x-should-retry": "true" if repeat else "false"}
        return web.json_response({"error": body}, status=self.status, headers=headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a field that `param` names."""
    return ApiError(400, message, param=param, code=code)


def not_found(what: str) -> ApiError:
    """Return the error of an object that does not exist, or not in this namespace."""
    return ApiError(404, f"{what} was not found", code="not_found")


def invalid_key(message: str) -> ApiError:
    """Return the error of a request without a valid API key."""
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key")


def denied(message: str) -> ApiError:
    """Return the error of a user without the right."""
    return ApiError(403, message, kind="permission_error", code="insufficient_permissions")


def unavailable(message: str) -> ApiError:
    """Return the error of a door that cannot do its work."""
    return ApiError(503, message, kind="server_error", code="unavailable")


def api_error_of(error: ClusterError) -> ApiError:
    """Return the error of a request to the API server that has failed."""
    text = str(error)
    if isinstance(error, ForbiddenError) and _QUOTA in text:
        return ApiError(429, text, kind="insufficient_quota", code="insufficient_quota")
    if isinstance(error, ForbiddenError):
        return denied(text)
    if isinstance(error, NotFoundError):
        return ApiError(404, text, code="not_found")
    if isinstance(error, ConflictError):
        return ApiError(409, f"another request has changed it meanwhile: {text}", code="conflict")
    if isinstance(error, RejectedError):
        return bad_request(text, code="rejected")
    return unavailable(f"the Kubernetes API did not answer: {text}")
