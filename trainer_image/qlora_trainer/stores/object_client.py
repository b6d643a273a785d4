"""The settings that all clients of object stores share: where requests may go, how long they wait, when they retry."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qlora_trainer.core.network import https_proxy
from qlora_trainer.stores.relay import relay

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# Nothing can listen on port 0. The client follows redirects and takes AWS_SESSION_TOKEN with it to any host; requests
# to all hosts but the store's own go to this proxy, that is, nowhere.
NOWHERE = "127.0.0.1:0"
STALLED = timedelta(seconds=30)
"""A transfer is given up when nothing has arrived for so long."""
RETRY: "RetryConfig" = {
    "max_retries": 4,
    "retry_timeout": timedelta(minutes=2),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=8), "base": 3},
}


def client_options(endpoint: str, others: Iterable[str] = ()) -> "ClientConfig":
    """Options of a client that reaches the store at `endpoint` and the servers at `others`, and no other host.

    All are http:// or https:// addresses. Those that the proxy of the environment serves are reached through it.
    """
    servers, proxy = (endpoint, *others), https_proxy(os.environ)
    proxied = frozenset(_host_and_port(url) for url in servers if proxy is not None and proxy.serves(url))
    direct = [urlsplit(url).hostname or "" for url in servers if _host_and_port(url) not in proxied]
    options: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=10),
        # `timeout` bounds a whole request, and the download of a weights' file takes as long as it takes.
        "read_timeout": STALLED,
        "timeout": timedelta(hours=24),
        "proxy_url": relay(proxy, proxied) if proxy is not None and proxied else f"http://{NOWHERE}",
    }
    return options | {"proxy_excludes": ",".join(direct)} if direct else options


def _host_and_port(url: str) -> str:
    address = urlsplit(url)
    return f"{address.hostname}:{address.port or (443 if address.scheme == 'https' else 80)}"
