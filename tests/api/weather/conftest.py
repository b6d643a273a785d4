"""A namespace, a proxy and a folder for each test."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster.controlplane import ControlPlane
from tests.support.cluster.weather import LEASES, OWN, Site, Tenant, proxy_of
from tests.support.services.api_proxy import serve_api


@pytest.fixture(scope="session")
def account(plane: ControlPlane) -> str:
    """Create an account that may only write Leases so far, and return its token."""
    plane.kubectl("create", "namespace", OWN)
    plane.kubectl("create", "serviceaccount", "operator", f"--namespace={OWN}")
    Tenant(plane, OWN).grant(rules=LEASES)
    for part in ("", "/status"):
        name, verb = f"weather-profiles{part.replace('/', '-')}", "--verb=get,list,watch,patch"
        plane.kubectl("create", "clusterrole", name, verb, f"--resource=qloraprofiles.qlora.dev{part}")
        plane.kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", f"--serviceaccount={OWN}:operator")
    return plane.kubectl("create", "token", "operator", f"--namespace={OWN}", "--duration=1h").strip()


_numbers = itertools.count(1)


@pytest.fixture
def site(plane: ControlPlane, account: str, tmp_path: Path) -> Iterator[Site]:
    namespace = f"weather-{next(_numbers)}"
    plane.kubectl("create", "namespace", namespace)
    tenant = Tenant(plane, namespace)
    tenant.grant()
    with serve_api(proxy_of(plane)) as proxy:
        yield Site(plane, tenant, proxy, tmp_path, account)


@pytest.fixture
def neighbor(site: Site) -> Tenant:
    """Another namespace that the same operator serves."""
    name = f"{site.tenant.namespace}-neighbor"
    site.plane.kubectl("create", "namespace", name)
    tenant = Tenant(site.plane, name)
    tenant.grant()
    return tenant
