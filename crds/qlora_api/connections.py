"""The network settings of a profile: trusted roots, a proxy, object stores and cloud identity."""

import re
from ipaddress import IPv4Network
from typing import Annotated, Literal

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
    """Certificates of a private authority, in a ConfigMap of the job's namespace."""

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


ENDPOINT = r"^https?://[A-Za-z0-9.:\[\]-]+(/[a-z0-9]+)?$"
Endpoint = Annotated[str, Field(max_length=512, pattern=ENDPOINT)]
_SERVICE_ACCOUNT = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"


class GoogleStorage(ApiModel):
    """Google Cloud Storage, or a server with its API."""

    endpoint: Endpoint | None = Field(None, description="URL of the server; https://storage.googleapis.com if not set.")


class AzureStorage(ApiModel):
    """One storage account of Azure. Jobs name its containers, no other account."""

    account: str = Field(min_length=3, max_length=24, pattern=r"^[a-z0-9]+$", description="Name of the account.")
    endpoint: Endpoint | None = Field(
        None, description="URL of its blob service; https://ACCOUNT.blob.core.windows.net if not set."
    )


class CloudIdentity(ApiModel):
    """A ServiceAccount with a cloud identity.

    The administrator connects it with a role in each namespace.
    """

    provider: Literal["aws", "google", "azure"] = Field(
        description="aws: IRSA or EKS Pod Identity, for s3://; google: GKE's workload identity, for gs://; azure: "
        "Azure workload identity, for az://."
    )
    service_account_name: Annotated[str, Field(min_length=1, max_length=253, pattern=_SERVICE_ACCOUNT)] = Field(
        description="Name of a ServiceAccount that exists in each namespace with jobs. Prepare and publish run with "
        "it, train does not. Pods get the cloud's token, and none of Kubernetes."
    )


class TrackingServer(ApiModel):
    """The server of a tracker."""

    url: Annotated[str, Field(max_length=256, pattern=r"^https?://[A-Za-z0-9.:\[\]-]+(/[A-Za-z0-9._~/-]*)?$")] = Field(
        description="URL of the server, without credentials; https://api.wandb.ai for the public Weights & Biases."
    )


class TrackingServers(ApiModel):
    """Servers for the history of runs. A job names trackers, never a server."""

    mlflow: TrackingServer | None = Field(None, description="MLflow's tracking server.")
    wandb: TrackingServer | None = Field(None, description="Weights & Biases.")


NCCL_NAME = r"^NCCL_[A-Z0-9_]+$"
_NCCL_MESSAGE = "an environment variable of NCCL is NCCL_ and capital letters, digits or _"
# PyTorch reads these, by their names before TORCH_ was put in front, and NCCL does not.
OF_WATCHDOG = ("NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT")
_WATCHDOG_MESSAGE = f"{' and '.join(OF_WATCHDOG)} turn off the watchdog that ends a run that has lost a process"


def _check_nccl(settings: dict[str, str]) -> dict[str, str]:
    for name in settings:
        if not re.fullmatch(NCCL_NAME, name) or len(name) > 63:
            raise ValueError(f"found {name[:80]!r}, {_NCCL_MESSAGE}, 63 characters at most")
        if name in OF_WATCHDOG:
            raise ValueError(f"found {name}, {_WATCHDOG_MESSAGE}: remove it")
    return settings


NcclSettings = Annotated[
    dict[Annotated[str, Field(max_length=63)], Annotated[str, Field(max_length=256)]],
    Field(
        max_length=32,
        json_schema_extra=rules(
            rule("self.all(name, name.size() <= 63)", "a variable's name has at most 63 characters"),
            rule(f"self.all(name, name.matches('{NCCL_NAME}'))", _NCCL_MESSAGE),
            rule(f"!self.exists(name, name in {list(OF_WATCHDOG)})", _WATCHDOG_MESSAGE),
        ),
    ),
    AfterValidator(_check_nccl),
]
