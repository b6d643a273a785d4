"""An opened bucket: its address, its client, and why it cannot be reached."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qlora_trainer.core.network import NOT_TRUSTED, https_proxy
from qlora_trainer.stores.relay import Relay, start_relay

if TYPE_CHECKING:
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

# Nothing can listen on port 0. The client follows redirects and takes credentials with it to any host; requests to all
# hosts but the store's own go to this proxy, that is, nowhere.
_NOWHERE = "127.0.0.1:0"
# The client's errors after a proxy or a redirect has failed and after a certificate was rejected.
_TUNNEL, _REDIRECT, _CERTIFICATE = "TunnelUnsuccessful", "error following redirect", "InvalidCertificate"
STALLED = timedelta(seconds=30)
"""A transfer is given up when nothing has arrived for so long."""
RETRY: "RetryConfig" = {
    "max_retries": 4,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=8), "base": 3},
}


class Route:
    """The way of a client to a store and its helper servers, and to no other host."""

    def __init__(self, endpoint: str, others: Iterable[str] = ()) -> None:
        """Create from http:// or https:// addresses, some reached through the proxy."""
        servers, proxy = (endpoint, *others), https_proxy(os.environ)
        proxied = frozenset(_host_and_port(url) for url in servers if proxy is not None and proxy.serves(url))
        direct = sorted({urlsplit(url).hostname or "" for url in servers if _host_and_port(url) not in proxied})
        self._relay: Relay | None = start_relay(proxy, proxied) if proxy is not None and proxied else None
        self.options: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=10),
            # `timeout` bounds a whole request, and the download of a weights' file takes as long as it takes.
            "read_timeout": STALLED,
            "timeout": timedelta(hours=24),
            "proxy_url": f"http://{_NOWHERE}" if self._relay is None else self._relay.address,
        }
        if direct:
            self.options["proxy_excludes"] = ",".join(direct)

    def was_left(self, error: str) -> bool:
        """Whether the client's error means that the store redirects to another host."""
        strayed = self._relay is not None and self._relay.has_denied and _TUNNEL in error
        return strayed or _NOWHERE in error or _REDIRECT in error

    def trouble(self, error: str) -> str:
        """Explain the client's error, as the end of a sentence, or an empty string."""
        if _CERTIFICATE in error:
            return f": {NOT_TRUSTED}"
        if self._relay is not None and _TUNNEL in error:
            return f", through the proxy ({self._relay.trouble})"
        return ""


@dataclass(frozen=True)
class Bucket:
    """An open bucket."""

    store: "S3Store | GCSStore | AzureStore"
    """The client."""
    endpoint: str
    """URL of the store."""
    route: Route
    access: "Access"


@dataclass(frozen=True)
class Access:
    """The credentials that open a bucket."""

    config: Mapping[str, object]
    """Settings of the store's client."""
    servers: tuple[str, ...] = ()
    """Addresses of the servers from which the client gets credentials."""
    by_identity: bool = False
    """Whether they are those of the pod's cloud identity, and of no Secret."""


def open_bucket(
    client: "type[S3Store | GCSStore | AzureStore]", name: str, address: str, access: Access, **settings: object
) -> Bucket:
    """Open the bucket at that address with a client that gets these settings."""
    route = Route(address, access.servers)
    store = client(name, config=access.config, client_options=route.options, retry_config=RETRY, **settings)
    return Bucket(store, address, route, access)


def _host_and_port(url: str) -> str:
    """As a client asks a proxy for it: HOST:PORT, an IPv6 address in brackets."""
    address = urlsplit(url)
    host = address.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{host}:{address.port or (443 if address.scheme == 'https' else 80)}"
