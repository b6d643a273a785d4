"""Reads what lets a client into a registry, in Docker's formats: its configuration and a token server's answer."""

import json

from oras.auth.utils import get_basic_auth, load_configs

from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration

_DOCKER_CONFIG = ".dockerconfigjson"


def docker_login(secret: Secret, registry: str) -> str | None:
    """User and password for the registry in base64: the Secret's, else those of this user's Docker configuration.

    Raises StepFailure BAD_CONFIGURATION if there is no login for it in the Secret.
    """
    own = load_configs()
    values = secret.require(_DOCKER_CONFIG, has_own=registry in own["auths"])
    try:
        known = own if values is None else json.loads(values[_DOCKER_CONFIG])
        entry = known.get("auths", {}).get(registry) or {}
        login = entry.get("auth") or (get_basic_auth(entry["username"], entry["password"]) if entry else None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise bad_configuration(
            f"{secret.field}: {_DOCKER_CONFIG} is not a Docker configuration with auths: make the Secret with "
            "`kubectl create secret docker-registry`"
        ) from None
    if values is not None and login is None:
        raise bad_configuration(f"{secret.field}: {_DOCKER_CONFIG} has no entry for {registry} in auths: add one")
    return login


def parse_token(content: bytes) -> str | None:
    """The token in what a token server has sent; None if there is none in it."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    given = answer.get("token") or answer.get("access_token") if isinstance(answer, dict) else None
    return given if isinstance(given, str) else None
