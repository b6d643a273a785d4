"""Opens buckets of Google Cloud Storage."""

import json
import os
from typing import TYPE_CHECKING

from obstore.store import GCSStore

from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.stores import bucket as settings
from qlora_trainer.stores.bucket import Access, Bucket, Route
from qlora_trainer.stores.cloud_identity import google_identity
from qlora_trainer.stores.endpoints import server_address

if TYPE_CHECKING:
    from obstore.store import GCSCredential

_KEY = "GOOGLE_SERVICE_ACCOUNT_KEY"
# Credentials that obstore may read from the environment: of a user of this machine, never of a node.
_FROM_ENVIRONMENT = (_KEY, "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_APPLICATION_CREDENTIALS")
_ENDPOINT = "https://storage.googleapis.com"
# Where the client exchanges a user's own credentials for a token. Those of a service account are signed here.
_TOKENS = "https://oauth2.googleapis.com"
_FIELDS = ("private_key", "private_key_id", "client_email")


def open_gcs(name: str, secret: Secret) -> Bucket:
    """The bucket. The endpoint comes from GOOGLE_BASE_URL, which the profile sets."""
    endpoint = server_address(os.environ, "GOOGLE_BASE_URL") or _ENDPOINT
    access = _access(secret)
    route = Route(endpoint, access.servers)
    store = GCSStore(
        name,
        config=access.config,
        base_url=endpoint,
        client_options=route.options,
        retry_config=settings.RETRY,
        # To write, the client asks the node's metadata service for a token even with signing off.
        credential_provider=_no_token if access.config.get("skip_signature") else None,
    )
    return Bucket(store, endpoint, route, "googleStorage.endpoint", access)


def _no_token() -> "GCSCredential":
    return {"token": "", "expires_at": None}


def _access(secret: Secret) -> Access:
    """Access by the Secret, else the pod's identity, else the environment.

    Without any, nothing is signed.
    """
    own = any(os.environ.get(name) for name in _FROM_ENVIRONMENT)
    values = secret.require(_KEY, has_own=own)
    if values is not None:
        return Access({"service_account_key": _service_account(values[_KEY], secret)})
    if (identity := google_identity(os.environ)) is not None:
        return identity
    return Access({}, (_TOKENS,)) if own else Access({"skip_signature": True})


def _service_account(text: str, secret: Secret) -> str:
    """The key, with only the fields that sign.

    Others would name a server, which is for the administrator to choose.
    """
    try:
        key = json.loads(text)
        fields = {name: str(key[name]) for name in _FIELDS}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise bad_configuration(
            f"{secret.field}: {_KEY} is not the JSON key of a Google service account with {', '.join(_FIELDS)}: store "
            "the file that `gcloud iam service-accounts keys create` writes"
        ) from None
    return json.dumps({"type": "service_account", **fields})
