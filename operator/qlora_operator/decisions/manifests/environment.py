"""Gives pods with a network certificates, proxy and cloud identity."""

from typing import Any

from qlora_api import contract
from qlora_api.naming import CLOUD_IDENTITY_LABEL
from qlora_api.profile import Profile
from qlora_api.status import StepName

Manifest = dict[str, Any]
_SECRET_MODE = 0o440


def network_environment(profile: Profile) -> dict[str, str]:
    """Return environment variables for the proxy and the certificates.

    The names are those that all client libraries read.
    """
    authority, secret = profile.ca_config_map, profile.proxy_secret_name
    values = {
        contract.ENV_CA_FILE: str(contract.CA_MOUNT / authority.name / authority.key) if authority else None,
        "HTTPS_PROXY": profile.https_proxy,
        "NO_PROXY": ",".join(profile.no_proxy or ()),
        contract.ENV_PROXY_SECRET: str(contract.PROXY_MOUNT / secret) if secret else None,
    }
    return {name: value for name, value in values.items() if value}


def network_volumes(profile: Profile) -> tuple[list[Manifest], list[Manifest]]:
    """Return `volumeMounts` and `volumes` of certificates and proxy credentials.

    As long as the ConfigMap or the Secret does not exist the pod waits, which costs no retry.
    """
    mounts: list[Manifest] = []
    volumes: list[Manifest] = []
    if (authority := profile.ca_config_map) is not None:
        mounts.append(_mount("ca", str(contract.CA_MOUNT / authority.name)))
        items = [{"key": authority.key, "path": authority.key}]
        volumes.append({"name": "ca", "configMap": {"name": authority.name, "items": items}})
    if (name := profile.proxy_secret_name) is not None:
        mounts.append(_mount("proxy", str(contract.PROXY_MOUNT / name)))
        items = [{"key": key, "path": key} for key in contract.PROXY_KEYS]
        volumes.append({"name": "proxy", "secret": {"secretName": name, "items": items, "defaultMode": _SECRET_MODE}})
    return mounts, volumes


def _mount(volume: str, path: str) -> Manifest:
    return {"name": volume, "mountPath": path, "readOnly": True}


_WITH_IDENTITY = ("prepare", "publish")
# Azure's webhook adds a token to pods with this label. Those of the other clouds use the account.
_OF_PROVIDER = {"azure": {"azure.workload.identity/use": "true"}}


def cloud_environment(profile: Profile) -> dict[str, str | None]:
    """Return environment variables for a step that uses object stores.

    They have the stores' addresses, and whether there is an identity.
    """
    google, azure, identity = profile.google_storage, profile.azure_storage, profile.cloud_identity
    return {
        "GOOGLE_BASE_URL": google.endpoint if google else None,
        "AZURE_STORAGE_ACCOUNT_NAME": azure.account if azure else None,
        "AZURE_STORAGE_ENDPOINT": azure.endpoint if azure else None,
        contract.ENV_CLOUD_IDENTITY: identity.provider if identity else None,
    }


def service_account_name(profile: Profile, step: StepName) -> str | None:
    """Return the ServiceAccount of a step's pod, or None for the namespace's default."""
    if profile.cloud_identity is not None and step in _WITH_IDENTITY:
        return profile.cloud_identity.service_account_name
    return profile.service_account_name


def identity_labels(profile: Profile, step: StepName) -> dict[str, str]:
    """Return the labels of a pod with an identity.

    NetworkPolicies and the cloud's webhook select by them.
    """
    identity = profile.cloud_identity
    if identity is None or step not in _WITH_IDENTITY:
        return {}
    return {CLOUD_IDENTITY_LABEL: identity.provider} | _OF_PROVIDER.get(identity.provider, {})
