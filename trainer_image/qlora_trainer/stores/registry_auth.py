"""Opens a registry for a client: allowed registries, logins, tokens, redirects."""

import json
import os
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import parse_dict_header
from urllib3.util import Retry

from qlora_api.sources import RegistrySource
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, unreachable
from qlora_trainer.core.network import Proxy, https_proxy
from qlora_trainer.stores.retry import RETRYABLE_STATUS, is_retryable

_DOCKER_CONFIG = ".dockerconfigjson"
_PLAIN = "http://"
_TIMEOUTS = (10, 60)
"""Seconds, for a connection and for each piece of an answer."""
_RETRY = Retry(
    total=4,
    backoff_factor=0.5,
    backoff_max=8,
    # A registry may ask for hours; then the step is tried again instead.
    retry_after_max=30,
    status_forcelist=(*RETRYABLE_STATUS, 500, 502, 503, 504),
    allowed_methods=("GET", "HEAD"),
    raise_on_status=False,
)


class RegistrySession(requests.Session):
    """A session with one registry that the administrator allows, which answers the registry's challenges.

    Credentials, and the tokens that are got for them, are sent to the allowed registries only, with TLS unless the
    administrator says otherwise, and never after a redirect.
    """

    def __init__(self, source: RegistrySource, secret: Secret, allowed: tuple[str, ...]) -> None:
        """Create. `allowed`: HOST:PORT, with http:// without TLS. Raises StepFailure."""
        super().__init__()
        scheme = "http" if require_allowed(source, allowed) else "https"
        self.base = f"{scheme}://{source.registry}/v2"
        """Address of the registry's API."""
        # No .netrc and no proxies for plain HTTP: they would bring other credentials and hosts.
        self.trust_env = False
        self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        guard = _Guard(frozenset(map(_origin, allowed)), secret.field, https_proxy(os.environ))
        self.mount("https://", guard)
        self.mount("http://", guard)
        self._registry = source.registry
        self._login = docker_login(secret, source.registry)
        self._authorization: dict[str, str] = {}

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        """The answer's redirect address. Raises InvalidURL, and not ValueError."""
        target = super().get_redirect_target(resp)
        try:
            urlsplit(target or "")
        except ValueError:
            raise requests.exceptions.InvalidURL(f"redirects to {target!r}, which is not an address") from None
        return target

    def ask(self, method: str, url: str, **options: Any) -> requests.Response:
        """Send a request, and once more with credentials or a token if the registry asks for them.

        `options` are those of requests. Raises StepFailure, or RequestException if there is no answer.
        """
        answer = self._send(method, url, options)
        if answer.status_code != 401 or not self._authenticate(answer):
            return answer
        answer.close()
        body = options.get("data")
        if body is not None and hasattr(body, "seek"):
            body.seek(0)
        return self._send(method, url, options)

    def _send(self, method: str, url: str, options: dict[str, Any]) -> requests.Response:
        headers = {**options.get("headers", {}), **self._authorization}
        return self.request(method, url, **{**options, "headers": headers, "timeout": _TIMEOUTS})

    def _authenticate(self, challenge: requests.Response) -> bool:
        """Whether there is a new answer to the challenge: credentials, or their token."""
        before, wanted = self._authorization, challenge.headers.get("WWW-Authenticate", "")
        if wanted.lower().startswith("basic"):
            self._authorization = self._basic()
        else:
            token = self._token(wanted)
            self._authorization = {"Authorization": f"Bearer {token}"} if token else {}
        return self._authorization not in ({}, before)

    def _basic(self) -> dict[str, str]:
        return {"Authorization": f"Basic {self._login}"} if self._login else {}

    def _token(self, challenge: str) -> str | None:
        """The token of the challenge's server, with or without credentials, or None."""
        wanted = parse_dict_header(challenge.partition(" ")[2])
        realm = wanted.get("realm") or ""
        server = _server(realm)
        if server is None:
            return None
        parameters = {name: wanted.get(name) for name in ("service", "scope")}
        answer = self.get(realm, params=parameters, headers=self._basic(), timeout=_TIMEOUTS)
        if is_retryable(answer.status_code):
            raise unreachable(f"{server} answered HTTP {answer.status_code} for a token")
        if answer.status_code != 200:
            return None
        token = parse_token(answer.content)
        if token is None:
            raise unreachable(
                f"{server} answered HTTP 200 for a token of {self._registry}, but not with a JSON object that has one"
            )
        return token


class _Guard(HTTPAdapter):
    """Sends requests, with credentials to some origins only, without on redirects."""

    def __init__(self, origins: frozenset[str], field: str, proxy: Proxy | None) -> None:
        """Create. `origins`: scheme and host, as in https://ghcr.io.

        `field` names the credentials, for the message.
        """
        super().__init__(max_retries=_RETRY)
        self._origins = origins
        self._field = field
        self._proxy = proxy

    def send(self, request: requests.PreparedRequest, *args: Any, **options: Any) -> requests.Response:
        address = urlsplit(request.url or "")
        origin = f"{address.scheme}://{address.netloc}"
        if "Authorization" in request.headers and origin not in self._origins:
            raise bad_configuration(
                f"the registry redirects to {origin}, where the credentials of {self._field} are not sent: ask the "
                "administrator to add it to the profile's registries"
            )
        through = self._proxy is not None and self._proxy.serves(request.url or "")
        options["proxies"] = {"https": self._proxy.url} if self._proxy is not None and through else {}
        return super().send(request, *args, **options)


def require_allowed(source: RegistrySource, allowed: tuple[str, ...]) -> bool:
    """Return whether the registry is without TLS.

    Raises StepFailure BAD_CONFIGURATION unless the registry is allowed.
    """
    for entry in allowed:
        if _host(entry) == source.registry:
            return entry.startswith(_PLAIN)
    raise bad_configuration(
        f"{source}: the registry {source.registry} is not among those that the profile allows "
        f"({', '.join(map(_host, allowed)) or 'none'}): use one of them, or ask the administrator for it"
    )


def _host(entry: str) -> str:
    return entry.removeprefix(_PLAIN)


def _server(realm: str) -> str | None:
    """Host and port of a token server, or None for an unusable address."""
    try:
        address = urlsplit(realm)
    except ValueError:
        return None
    return address.netloc if address.scheme in ("https", "http") else None


def _origin(entry: str) -> str:
    return entry if entry.startswith(_PLAIN) else f"https://{entry}"


def docker_login(secret: Secret, registry: str) -> str | None:
    """User and password for the registry in base64: from the Secret, else from this user's Docker configuration.

    None if neither exists. Raises StepFailure BAD_CONFIGURATION if the Secret has no login for the registry.
    """
    own = _own_logins()
    values = secret.require(_DOCKER_CONFIG, has_own=registry in own["auths"])
    try:
        known = own if values is None else json.loads(values[_DOCKER_CONFIG])
        entry = known.get("auths", {}).get(registry) or {}
        login = entry.get("auth") or (_basic_login(entry["username"], entry["password"]) if entry else None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise bad_configuration(
            f"{secret.field}: {_DOCKER_CONFIG} is not a Docker configuration with auths: create the Secret with "
            "`kubectl create secret docker-registry`"
        ) from None
    if values is not None and login is None:
        raise bad_configuration(f"{secret.field}: {_DOCKER_CONFIG} has no entry for {registry} in auths: add one")
    return login


def _basic_login(user: str, password: str) -> str:
    return b64encode(f"{user}:{password}".encode()).decode()


def _own_logins() -> dict[str, dict[str, dict[str, str]]]:
    """This user's Docker configuration, in Docker's place for it, or an empty one.

    Raises StepFailure BAD_CONFIGURATION for a file that cannot be read as one.
    """
    file = Path(os.environ.get("DOCKER_CONFIG") or "~/.docker").expanduser() / "config.json"
    if not file.is_file():
        return {"auths": {}}
    try:
        return {"auths": dict(json.loads(file.read_bytes()).get("auths") or {})}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise bad_configuration(
            f"{file} is not a Docker configuration: log in again, or remove it ({error})"
        ) from error


def parse_token(content: bytes) -> str | None:
    """The token in a token server's answer, or None."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    given = answer.get("token") or answer.get("access_token") if isinstance(answer, dict) else None
    return given if isinstance(given, str) else None
