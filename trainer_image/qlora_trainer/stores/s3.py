"""Opens buckets of S3 and of servers that speak its protocol."""

import os
from typing import TYPE_CHECKING

from obstore.store import S3Store

from qlora_trainer.core.credentials import Secret
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.stores import bucket as settings
from qlora_trainer.stores.bucket import Access, Bucket, Route
from qlora_trainer.stores.cloud_identity import aws_identity
from qlora_trainer.stores.endpoints import server_address

if TYPE_CHECKING:
    from obstore.store import S3Config

_ACCESS_KEY, _SECRET_KEY, _SESSION_TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
_DEFAULT_REGION = "us-east-1"


def open_s3(name: str, secret: Secret) -> Bucket:
    """Open the bucket. AWS_ENDPOINT_URL and AWS_REGION come from the profile."""
    region = os.environ.get("AWS_REGION") or _DEFAULT_REGION
    endpoint = server_address(os.environ, "AWS_ENDPOINT_URL") or f"https://s3.{region}.amazonaws.com"
    own = os.environ.get("AWS_ENDPOINT_URL_S3")
    if own and own != endpoint:
        raise bad_configuration(
            f"AWS_ENDPOINT_URL_S3 is set, but not to {endpoint}, the address that AWS_ENDPOINT_URL and "
            "AWS_REGION name: set AWS_ENDPOINT_URL, and unset the other"
        )
    access = _access(secret, region)
    route = Route(endpoint, access.servers)
    store = S3Store(
        name,
        config=access.config,
        endpoint=endpoint,
        region=region,
        client_options=route.options,
        retry_config=settings.RETRY,
    )
    return Bucket(store, endpoint, route, "objectStore.endpoint and objectStore.region", access)


def _access(secret: Secret, region: str) -> Access:
    """Access by the Secret, else the pod's identity, else the environment.

    Without any, nothing is signed.
    """
    values = secret.require(_ACCESS_KEY, _SECRET_KEY, has_own=_ACCESS_KEY in os.environ)
    if values is not None:
        config: S3Config = {
            "access_key_id": secret.line(_ACCESS_KEY) or "",
            "secret_access_key": secret.line(_SECRET_KEY) or "",
        }
        if token := secret.line(_SESSION_TOKEN):
            config["session_token"] = token
        return Access(config)
    if (identity := aws_identity(os.environ, region)) is not None:
        return identity
    # Of a user of this machine. Never those of an instance's metadata service, which belong to the node that the pod
    # runs on, nor of a role that a cloud's webhook has given the pod, which the profile must allow (cloudIdentity).
    return Access({}) if os.environ.get(_ACCESS_KEY) else Access({"skip_signature": True})
