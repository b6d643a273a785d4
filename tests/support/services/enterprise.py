"""A company's network: private names, a proxy with a password, a private authority."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from proxy.common.types import HostPort
from proxy.http.proxy import HttpProxyBasePlugin

from devcluster.addresses import LOOPBACK
from devcluster.certificates import Authority
from tests.support.waiting import eventually

DOMAIN = "corp.test"
"""Below it is every server of the company."""
PROXY_USER, PROXY_PASSWORD = "team", "canary/proxy:password@1"
_LOG = "QLORA_TEST_PROXY_LOG"


class CompanyNames(HttpProxyBasePlugin):
    """Resolves the company's names to this machine, and notes each connection."""

    def resolve_dns(self, host: str, port: int) -> tuple[str | None, HostPort | None]:
        with Path(os.environ[_LOG]).open("a") as log:
            log.write(f"{host}:{port}\n")
        return LOOPBACK if host.endswith(f".{DOMAIN}") else None, None


@dataclass(frozen=True)
class CompanyProxy:
    """A running proxy."""

    address: str
    """HOST:PORT."""
    log: Path

    @property
    def connections(self) -> list[str]:
        """HOST:PORT of each connection that went through it, or was to."""
        return self.log.read_text().splitlines()


@contextmanager
def company_proxy(folder: Path, *, password: str | None = None) -> Iterator[CompanyProxy]:
    """Run proxy.py on a free port. It requires PROXY_USER's password if one is given."""
    ports, log = folder / "proxy.port", folder / "proxy.log"
    log.touch()
    ports.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "proxy", "--hostname", LOOPBACK, "--port", "0", "--port-file", str(ports)),
        *("--num-workers", "1", "--num-acceptors", "1", "--plugins", "tests.support.services.enterprise.CompanyNames"),
        *(("--basic-auth", f"{PROXY_USER}:{password}") if password else ()),
    ]
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", *command],
        env={**os.environ, _LOG: str(log), "HOME": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: ports.exists() and ports.read_text().strip(), seconds=30, every=0.02, what="the proxy")
        yield CompanyProxy(f"{LOOPBACK}:{int(ports.read_text())}", log)
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class CompanyCertificates:
    """PEM files: the authority's certificate, and one for all servers with its key."""

    authority: Path
    certificate: Path
    key: Path


def company_certificates(folder: Path) -> CompanyCertificates:
    """Issue a certificate for DOMAIN's names and this machine by a private authority."""
    authority = Authority(datetime.now(UTC))
    identity = authority.issue("servers", serves=(f"*.{DOMAIN}", "localhost", LOOPBACK))
    certificate, key = identity.write(folder, "servers")
    (folder / "ca.crt").write_bytes(authority.certificate)
    return CompanyCertificates(folder / "ca.crt", certificate, key)
