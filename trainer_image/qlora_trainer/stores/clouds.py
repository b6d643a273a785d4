"""Opens buckets of S3, Google Cloud Storage and Azure Blob Storage with the credentials that a pod may use.

These are, in this order, those of the job's Secret, the pod's cloud identity and, on a user's machine, those of the
environment; without any, nothing is signed. A webhook of the cloud puts a token and the names of its files into pods
whose ServiceAccount the administrator has connected with a role. Such an identity is used only if the operator has
named the cloud. The credentials of a node, which its metadata service hands out, are not the tenant's: never used.
"""

import json
import os
from typing import TYPE_CHECKING

from obstore.store import AzureStore, GCSStore, S3Store

from qlora_api import contract
from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, unreachable
from qlora_trainer.stores.bucket import Access, Bucket, open_bucket
from qlora_trainer.stores.endpoints import server_address

if TYPE_CHECKING:
    from obstore.store import GCSCredential, S3Config

_ACCESS_KEY, _SECRET_KEY, _SESSION_TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
_GOOGLE_KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"
# Credentials that obstore may read from the environment: of a user of this machine, never of a node.
_OWN_GOOGLE = (_GOOGLE_KEY, "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS")
# Where the client exchanges a user's own credentials for a token. Those of a service account are signed here.
_GOOGLE_TOKENS = "https://oauth2.googleapis.com"
_GOOGLE_METADATA = ("metadata.google.internal", "169.254.169.254")
_GOOGLE_FIELDS = ("private_key", "private_key_id", "client_email")
_ACCOUNT_KEY, _SAS = "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"
_UNSIGNED = {"skip_signature": True}


def open_s3(name: str, secret: Secret) -> Bucket:
    """Open the bucket. AWS_ENDPOINT_URL and AWS_REGION come from the profile."""
    region = os.environ.get("AWS_REGION") or "us-east-1"
    endpoint = server_address(os.environ, "AWS_ENDPOINT_URL") or f"https://s3.{region}.amazonaws.com"
    own = os.environ.get("AWS_ENDPOINT_URL_S3")
    if own and own != endpoint:
        raise bad_configuration(
            f"AWS_ENDPOINT_URL_S3 is set, but not to {endpoint}, the address that AWS_ENDPOINT_URL and "
            "AWS_REGION name: set AWS_ENDPOINT_URL, and unset the other"
        )
    return open_bucket(S3Store, name, endpoint, _aws_access(secret, region), endpoint=endpoint, region=region)


def _aws_access(secret: Secret, region: str) -> Access:
    values = secret.require(_ACCESS_KEY, _SECRET_KEY, has_own=_ACCESS_KEY in os.environ)
    if values is not None:
        config: S3Config = {
            "access_key_id": secret.line(_ACCESS_KEY) or "",
            "secret_access_key": secret.line(_SECRET_KEY) or "",
        }
        if token := secret.line(_SESSION_TOKEN):
            config["session_token"] = token
        return Access(config)
    if _has_identity("aws"):
        return _aws_identity(region)
    return Access({}) if os.environ.get(_ACCESS_KEY) else Access(_UNSIGNED)


def _aws_identity(region: str) -> Access:
    if token := os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        sts = os.environ.get("AWS_ENDPOINT_URL_STS") or f"https://sts.{region}.amazonaws.com"
        config = {
            "web_identity_token_file": token,
            "role_arn": _require("AWS_ROLE_ARN"),
            "role_session_name": os.environ.get("AWS_ROLE_SESSION_NAME") or "qlora",
            "aws_endpoint_url_sts": sts,
        }
        return Access(config, (sts,), by_identity=True)
    agent = _require("AWS_CONTAINER_CREDENTIALS_FULL_URI")
    file = _require("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
    config = {"container_credentials_full_uri": agent, "container_authorization_token_file": file}
    return Access(config, (agent,), by_identity=True)


def open_gcs(name: str, secret: Secret) -> Bucket:
    """Open the bucket. GOOGLE_BASE_URL comes from the profile."""
    endpoint = server_address(os.environ, "GOOGLE_BASE_URL") or "https://storage.googleapis.com"
    access = _google_access(secret)
    # To write, the client asks the node's metadata service for a token even with signing off.
    provider = _no_token if access.config is _UNSIGNED else None
    return open_bucket(GCSStore, name, endpoint, access, base_url=endpoint, credential_provider=provider)


def _no_token() -> "GCSCredential":
    return {"token": "", "expires_at": None}


def _google_access(secret: Secret) -> Access:
    has_own = any(os.environ.get(name) for name in _OWN_GOOGLE)
    values = secret.require(_GOOGLE_KEY, has_own=has_own)
    if values is not None:
        return Access({"service_account_key": _service_account(values[_GOOGLE_KEY], secret)})
    if _has_identity("google"):
        # The service account of GKE's workload identity, by its metadata server.
        own = os.environ.get("GCE_METADATA_HOST")
        servers = tuple(f"http://{host}" for host in ((own,) if own else _GOOGLE_METADATA))
        return Access({}, servers, by_identity=True)
    return Access({}, (_GOOGLE_TOKENS,)) if has_own else Access(_UNSIGNED)


def _service_account(text: str, secret: Secret) -> str:
    """The key, with only the fields that sign."""
    try:
        key = json.loads(text)
        fields = {name: str(key[name]) for name in _GOOGLE_FIELDS}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise bad_configuration(
            f"{secret.field}: {_GOOGLE_KEY} is not the JSON key of a Google service account with "
            f"{', '.join(_GOOGLE_FIELDS)}: store the file that `gcloud iam service-accounts keys create` writes"
        ) from None
    return json.dumps({"type": "service_account", **fields})


def open_azure(name: str, secret: Secret) -> Bucket:
    """Open the container. Account and endpoint come from the profile."""
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise bad_configuration(
            f"az://{name} names a container, and no storage account is set (AZURE_STORAGE_ACCOUNT_NAME): ask the "
            "administrator to set azureStorage.account of the profile"
        )
    endpoint = server_address(os.environ, "AZURE_STORAGE_ENDPOINT") or f"https://{account}.blob.core.windows.net"
    return open_bucket(AzureStore, name, endpoint, _azure_access(secret), account_name=account, endpoint=endpoint)


def _azure_access(secret: Secret) -> Access:
    given = _azure_keys(secret.line(_ACCOUNT_KEY), secret.line(_SAS))
    own = given or _azure_keys(os.environ.get(_ACCOUNT_KEY), os.environ.get(_SAS))
    if secret.name is not None and own is None:
        raise unreachable(
            f"Secret {secret.name!r} with {_ACCOUNT_KEY} or {_SAS} ({secret.field}) does not exist in the job's "
            "namespace"
        )
    if given is None and _has_identity("azure"):
        login = os.environ.get("AZURE_AUTHORITY_HOST") or "https://login.microsoftonline.com"
        config = {
            "credential_type": "workload_identity",
            "client_id": _require("AZURE_CLIENT_ID"),
            "tenant_id": _require("AZURE_TENANT_ID"),
            "federated_token_file": _require("AZURE_FEDERATED_TOKEN_FILE"),
            "authority_host": login.rstrip("/"),
        }
        return Access(config, (login,), by_identity=True)
    return Access(_UNSIGNED if own is None else own)


def _azure_keys(account_key: str | None, sas: str | None) -> dict[str, str] | None:
    if account_key:
        return {"credential_type": "access_key", "account_key": account_key}
    return {"credential_type": "sas_token", "sas_key": sas.removeprefix("?")} if sas else None


def _has_identity(cloud: str) -> bool:
    return os.environ.get(contract.ENV_CLOUD_IDENTITY) == cloud


def _require(variable: str) -> str:
    """Return the variable of the cloud's webhook. Raises StepFailure UNREACHABLE."""
    if value := os.environ.get(variable):
        return value
    raise unreachable(
        f"the pod was given no cloud identity ({variable} is not set): ask the administrator whether the "
        "ServiceAccount of the profile's cloudIdentity is connected with a role in this namespace, and whether the "
        "cloud's webhook runs"
    )


OPEN = {"s3": open_s3, "gs": open_gcs, "az": open_azure}
"""Opens a bucket with a Secret, by the scheme of its address. Raises StepFailure."""
