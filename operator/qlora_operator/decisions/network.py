"""Decides what a pod with a network is given for it: the administrator's certificates and proxy; pure."""

from typing import Any

from qlora_api import contract
from qlora_api.profile import Profile

Manifest = dict[str, Any]
_SECRET_MODE = 0o440


def network_environment(profile: Profile) -> dict[str, str]:
    """Environment variables: the proxy, by the names that all client libraries know, and where to find the rest."""
    authority, secret = profile.ca_config_map, profile.proxy_secret_name
    values = {
        contract.ENV_CA_FILE: str(contract.CA_MOUNT / authority.name / authority.key) if authority else None,
        "HTTPS_PROXY": profile.https_proxy,
        "NO_PROXY": ",".join(profile.no_proxy or ()),
        contract.ENV_PROXY_SECRET: str(contract.PROXY_MOUNT / secret) if secret else None,
    }
    return {name: value for name, value in values.items() if value}


def network_volumes(profile: Profile) -> tuple[list[Manifest], list[Manifest]]:
    """`volumeMounts` and `volumes` with the certificates and with the proxy's credentials.

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
