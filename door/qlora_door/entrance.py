"""Finds the user and the namespace of a request."""

import re
from collections.abc import Mapping, Sequence

from qlora_api.kubernetes_values import DNS_LABEL
from qlora_door.errors import api_error_of, bad_request, denied, invalid_key
from qlora_door.identity import Identify, User
from qlora_door.namespace import Namespace
from qlora_operator.kube.errors import ClusterError

_BEARER = re.compile(r"[Bb]earer +([A-Za-z0-9._~+/=-]{1,16384})")


async def enter(headers: Mapping[str, str], identify: Identify, namespaces: Sequence[str]) -> Namespace:
    """Return the namespace of a request, with the rights of its user. Raises ApiError.

    `namespaces`: those that are served; all if empty.
    """
    key = _BEARER.fullmatch(headers.get("Authorization", "").strip())
    if key is None:
        raise invalid_key("no API key: send one as Authorization: Bearer KEY; a key is a token of the cluster")
    try:
        session = await identify(key[1])
    except ClusterError as error:
        raise api_error_of(error) from None
    name = _namespace(headers.get("OpenAI-Project"), session.user)
    if namespaces and name not in namespaces:
        raise denied(f"this door does not serve namespace {name}; it serves: {', '.join(namespaces)}")
    return Namespace(session, name)


def _namespace(project: str | None, user: User) -> str:
    name = project or user.own_namespace
    if name is None:
        raise bad_request(
            "no namespace: the key is not a ServiceAccount's, so set the client's project to a namespace "
            "(header OpenAI-Project)",
            "project",
        )
    if len(name) > 63 or not re.fullmatch(DNS_LABEL, name):
        raise bad_request(f"project: {name[:80]!r} is no name of a namespace (header OpenAI-Project)", "project")
    return name
