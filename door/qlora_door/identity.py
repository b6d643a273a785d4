"""Finds the user of an API key, and acts as that user towards the API server.

A key is a token of the cluster: of a ServiceAccount, or of an OIDC user.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from qlora_door.errors import ApiError, denied, invalid_key, unavailable
from qlora_operator.decisions.observed.objects import Object
from qlora_operator.kube.api import Api
from qlora_operator.kube.errors import ClusterError, ForbiddenError, UnauthorizedError, UnavailableError
from qlora_operator.kube.transport import Headers, Transport

_AUTHENTICATION = "authentication.k8s.io/v1"
_SERVICE_ACCOUNT = re.compile(r"system:serviceaccount:([a-z0-9-]+):[a-z0-9.-]+")
# The API server adds it to every user that is impersonated.
_AUTHENTICATED = "system:authenticated"
CONSTRAINED_SINCE = (1, 36)
"""The release of Kubernetes that constrains impersonation by default (KEP-5284)."""


@dataclass(frozen=True)
class User:
    """A user of the cluster."""

    name: str
    groups: tuple[str, ...] = ()

    @property
    def own_namespace(self) -> str | None:
        """The namespace of a ServiceAccount; None for other users."""
        found = _SERVICE_ACCOUNT.fullmatch(self.name)
        return found[1] if found else None


@dataclass(frozen=True)
class Session:
    """A user, and how to make requests with that user's rights."""

    user: User
    transport: Transport
    unauthorized: ApiError
    """If the API server does not accept the credentials of such a request."""


Identify = Callable[[str], Awaitable[Session]]
"""Finds the user of a key. Raises ApiError or ClusterError."""


class Impersonation(Api):
    """Reviews each key, and impersonates its user."""

    def __init__(self, transport: Transport, audience: str) -> None:
        super().__init__(transport)
        self._audience = audience

    async def check(self) -> None:
        """Check that the API server constrains impersonation. Raises ClusterError."""
        version = await self._document("GET", "/version")
        found = tuple(int(re.sub(r"[^0-9].*", "", str(version.get(part))) or 0) for part in ("major", "minor"))
        if found < CONSTRAINED_SINCE:
            raise ClusterError(
                f"identity: impersonate needs Kubernetes {'.'.join(map(str, CONSTRAINED_SINCE))} or later, which "
                f"constrains impersonation to the rights of the chart; found {'.'.join(map(str, found))}: set identity "
                "to token"
            )

    async def identify(self, key: str) -> Session:
        """Return the user whose token the key is, for the audience."""
        spec = {"token": key, "audiences": [self._audience]}
        review = {"apiVersion": _AUTHENTICATION, "kind": "TokenReview", "spec": spec}
        try:
            answer = await self._json("POST", f"/apis/{_AUTHENTICATION}/tokenreviews", body=review)
        except ForbiddenError as error:
            # Also if the door's credentials are not accepted.
            raise unavailable(f"the door cannot review API keys: {error}") from error
        status = answer.get("status") or {}
        if not status.get("authenticated") or self._audience not in (status.get("audiences") or ()):
            raise invalid_key(
                f"the API key is no valid token of this cluster for the audience {self._audience}: create one with "
                f"kubectl create token SERVICEACCOUNT --audience {self._audience}"
            )
        user = user_of(status, "TokenReview")
        unauthorized = unavailable("the API server does not accept the door's own credentials")
        return Session(user, self._transport.impersonating(headers_of(user)), unauthorized)


class PassedToken:
    """Makes each request with the key itself."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def identify(self, key: str) -> Session:
        """Return the user whose token the key is, as the API server reads it."""
        transport, unauthorized = (
            self._transport.with_token(key),
            invalid_key(
                "the API key is no valid token of this cluster: create one with kubectl create token SERVICEACCOUNT"
            ),
        )
        try:
            user = await _SelfReview(transport).user()
        except UnauthorizedError:
            raise unauthorized from None
        return Session(user, transport, unauthorized)


class _SelfReview(Api):
    async def user(self) -> User:
        review = {"apiVersion": _AUTHENTICATION, "kind": "SelfSubjectReview"}
        answer = await self._json("POST", f"/apis/{_AUTHENTICATION}/selfsubjectreviews", body=review)
        return user_of(answer.get("status") or {}, "SelfSubjectReview")


def user_of(status: Object, kind: str) -> User:
    """Return the user of a review's status. Raises ApiError for a name that a header would change."""
    found = status.get("user") or status.get("userInfo") or {}
    name, groups = found.get("username"), tuple(map(str, found.get("groups") or ()))
    if not name:
        raise UnavailableError(f"the answer to the {kind} names no user")
    for text in (name, *groups):
        # A header drops white space at its ends, so that another user would be impersonated.
        if text != text.strip() or not text.isprintable():
            raise denied(f"the user or group {text!r} has white space or control characters, and cannot use the door")
    return User(name, groups)


def headers_of(user: User) -> Headers:
    """Return the headers that impersonate the user. The API server adds the groups of a ServiceAccount."""
    groups = () if user.own_namespace else [group for group in user.groups if group != _AUTHENTICATED]
    return [("Impersonate-User", user.name), *(("Impersonate-Group", group) for group in groups)]
