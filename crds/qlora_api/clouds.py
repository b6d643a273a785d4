"""What a profile says about object stores of clouds beside S3, and about the identity with which pods use them."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_api.schema import ApiModel

ENDPOINT = r"^https?://[A-Za-z0-9.:\[\]-]+(/[a-z0-9]+)?$"
Endpoint = Annotated[str, Field(max_length=512, pattern=ENDPOINT)]
_SERVICE_ACCOUNT = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"


class GoogleStorage(ApiModel):
    """Google Cloud Storage, or a server with its API."""

    endpoint: Endpoint | None = Field(None, description="URL of the server; https://storage.googleapis.com if not set.")


class AzureStorage(ApiModel):
    """One storage account of Azure. A job names containers in it, never another account."""

    account: str = Field(min_length=3, max_length=24, pattern=r"^[a-z0-9]+$", description="Name of the account.")
    endpoint: Endpoint | None = Field(
        None, description="URL of its blob service; https://ACCOUNT.blob.core.windows.net if not set."
    )


class CloudIdentity(ApiModel):
    """A ServiceAccount that the cloud knows. The administrator connects it with a role in each namespace."""

    provider: Literal["aws", "google", "azure"] = Field(
        description="aws: IRSA or EKS Pod Identity, for s3://; google: GKE's workload identity, for gs://; azure: "
        "Azure workload identity, for az://."
    )
    service_account_name: Annotated[str, Field(min_length=1, max_length=253, pattern=_SERVICE_ACCOUNT)] = Field(
        description="Name of a ServiceAccount that exists in each namespace with jobs. Prepare and publish run with "
        "it, train does not. Pods get the cloud's token, and none of Kubernetes."
    )
