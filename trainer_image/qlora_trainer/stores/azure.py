"""Opens containers of Azure Blob Storage."""

import os
from typing import TYPE_CHECKING

from obstore.store import AzureStore

from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration, unreachable
from qlora_trainer.stores import bucket as settings
from qlora_trainer.stores.bucket import Access, Bucket, Route
from qlora_trainer.stores.cloud_identity import azure_identity
from qlora_trainer.stores.endpoints import server_address

if TYPE_CHECKING:
    from obstore.store import AzureConfig

_ACCOUNT_KEY, _SAS = "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"


def open_azure(name: str, secret: Secret) -> Bucket:
    """The container. Account and endpoint come from AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ENDPOINT.

    The profile sets them.
    """
    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise bad_configuration(
            f"az://{name} names a container, and no storage account is set (AZURE_STORAGE_ACCOUNT_NAME): ask the "
            "administrator to set azureStorage.account of the profile"
        )
    endpoint = server_address(os.environ, "AZURE_STORAGE_ENDPOINT") or f"https://{account}.blob.core.windows.net"
    access = _access(secret)
    route = Route(endpoint, access.servers)
    store = AzureStore(
        name,
        config=access.config,
        account_name=account,
        endpoint=endpoint,
        client_options=route.options,
        retry_config=settings.RETRY,
    )
    return Bucket(store, endpoint, route, "azureStorage.account and azureStorage.endpoint", access)


def _access(secret: Secret) -> Access:
    """Access by the Secret, else the pod's identity, else the environment.

    Without any, nothing is signed.
    """
    given = _keys(secret.line(_ACCOUNT_KEY), secret.line(_SAS))
    own = given or _keys(os.environ.get(_ACCOUNT_KEY), os.environ.get(_SAS))
    if secret.name is not None and own is None:
        raise unreachable(
            f"Secret {secret.name!r} with {_ACCOUNT_KEY} or {_SAS} ({secret.field}) does not exist in the job's "
            "namespace"
        )
    if given is None and (identity := azure_identity(os.environ)) is not None:
        return identity
    return Access({"skip_signature": True}) if own is None else Access(own)


def _keys(account_key: str | None, sas: str | None) -> "AzureConfig | None":
    """The settings for the account's key, else for a signature, or None."""
    if account_key:
        return {"credential_type": "access_key", "account_key": account_key}
    return {"credential_type": "sas_token", "sas_key": sas.removeprefix("?")} if sas else None
