"""Finds the API server and the operator's credentials, with the Kubernetes client."""

import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kubernetes.aio import client, config
from kubernetes.aio.client import rest

from qlora_operator.kube.client import FIELD_MANAGER, Cluster
from qlora_operator.kube.errors import UnavailableError
from qlora_operator.kube.transport import Credentials, Endpoint, OnRequest, open_transport, unobserved

_SERVICE_ACCOUNT_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount/token"  # noqa: S105 - a path


async def endpoint_of(kubeconfig: Path | None = None, *, has_certificate: bool = True) -> Endpoint:
    """Return the API server and credentials, as the client finds and renews them.

    `has_certificate`: whether a client certificate of the kubeconfig is used, which would count before any token.
    """
    configuration = client.Configuration()

    async def load() -> ssl.SSLContext:
        try:
            await _load_configuration(configuration, kubeconfig)
            if not has_certificate:
                configuration.cert_file = configuration.key_file = None
            # Reads the authorities, and the operator's own certificate, from their files.
            return rest.RESTClientObject(configuration).ssl_context
        except config.ConfigException as error:
            raise UnavailableError(f"no cluster is reachable: {error}") from error

    tls = await load()

    async def renew() -> None:
        nonlocal tls
        tls = await load()

    async def credentials() -> Credentials:
        # Reads the file of a pod's token again once it is a minute old.
        return Credentials(await configuration.get_api_key_with_prefix("BearerToken", alias="authorization"), tls)

    return Endpoint(
        server=configuration.host,
        credentials=credentials,
        renew=renew,
        server_hostname=configuration.tls_server_name or None,
        proxy=configuration.proxy or None,
        proxy_headers=configuration.proxy_headers,
    )


async def _load_configuration(configuration: client.Configuration, kubeconfig: Path | None) -> None:
    if kubeconfig is not None:
        await config.load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
    elif os.path.exists(_SERVICE_ACCOUNT_TOKEN) and "KUBECONFIG" not in os.environ:  # noqa: ASYNC240 - a local file
        config.load_incluster_config(client_configuration=configuration)
    else:
        await config.load_kube_config(client_configuration=configuration)


@asynccontextmanager
async def connect(kubeconfig: Path | None = None, *, on_request: OnRequest = unobserved) -> AsyncIterator[Cluster]:
    """The cluster of `kubeconfig`; without one, that which the pod runs in, or else that of the environment.

    `on_request`: called after each request. Raises ClusterError without any cluster.
    """
    async with open_transport(await endpoint_of(kubeconfig), FIELD_MANAGER, on_request) as transport:
        yield Cluster(transport)
