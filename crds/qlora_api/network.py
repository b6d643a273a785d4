"""What a profile says about the network between prepare and publish and their servers: trusted roots and a proxy."""

import re
from ipaddress import IPv4Network
from typing import Annotated

from pydantic import AfterValidator, Field

from qlora_api.schema import ApiModel, rule, rules

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
HOST_NAME = rf"{_LABEL}([.]{_LABEL})*"
PROXY_URL = rf"^http://{HOST_NAME}(:[0-9]{{1,5}})?$"
_OBJECT_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
# A network's last bits are checked in Python only: the operator does not start with settings that it rejects.
_DIRECT = rf"{HOST_NAME}(/[0-9]{{1,2}})?"
_DIRECT_MESSAGE = (
    "an entry is a host or domain name, without a dot or * before it, an IPv4 address, or an IPv4 network such as "
    "10.0.0.0/8"
)


def _check_direct(entry: str) -> str:
    if not re.fullmatch(_DIRECT, entry):
        raise ValueError(f"found {entry[:80]!r}, {_DIRECT_MESSAGE}")
    if "/" in entry:
        try:
            IPv4Network(entry)
        except ValueError as error:
            raise ValueError(f"found {entry[:80]!r} ({error}), {_DIRECT_MESSAGE}") from None
    return entry


DirectHost = Annotated[
    str,
    Field(max_length=253, json_schema_extra=rules(rule(f"self.matches('^({_DIRECT})$')", _DIRECT_MESSAGE))),
    AfterValidator(_check_direct),
]
"""A host that is reached without the proxy. Each client library understands it in the same way."""


class CaConfigMap(ApiModel):
    """Certificates of an own certificate authority, in a ConfigMap of the job's namespace."""

    name: Annotated[str, Field(min_length=1, max_length=253, pattern=_OBJECT_NAME)] = Field(
        description="Name of a ConfigMap that exists in each namespace with jobs."
    )
    key: str = Field(
        "ca.crt",
        min_length=1,
        max_length=253,
        pattern=r"^[-_a-zA-Z0-9][-._a-zA-Z0-9]*$",
        description="Key of the certificates, in PEM.",
    )
