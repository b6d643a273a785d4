"""The way to an object store through the proxy of a company."""

from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest

from qlora_trainer.stores.bucket import Route

DENIED = "TunnelUnsuccessful"
"""As the client names it when the proxy does not answer 200."""


def connect(route: Route, server: str) -> int:
    """The status of the route's proxy for a client that wants to connect to HOST:PORT."""
    address = urlsplit(route.options["proxy_url"])
    connection = HTTPConnection(address.hostname or "", address.port)
    connection.putrequest("CONNECT", server, skip_host=True)
    connection.endheaders()
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.fixture
def company(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that reaches nothing."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


@pytest.mark.usefixtures("company")
@pytest.mark.parametrize(
    ("endpoint", "server"),
    [
        ("https://[2001:db8::1]:9000", "[2001:db8::1]:9000"),
        ("https://[2001:db8::1]", "[2001:db8::1]:443"),
        ("https://store.example.org", "store.example.org:443"),
    ],
)
def test_each_kind_of_address_reaches_the_store_through_the_proxy(endpoint: str, server: str) -> None:
    route = Route(endpoint)
    assert connect(route, server) == 502
    assert not route.was_left(DENIED)


@pytest.mark.usefixtures("company")
def test_a_failing_proxy_is_named_also_after_a_redirect_of_the_store() -> None:
    route = Route("https://store.example.org:8443")
    assert connect(route, "evil.example.org:443") == 403
    assert route.was_left(DENIED)
    assert connect(route, "store.example.org:8443") == 502
    assert not route.was_left(DENIED)
