"""Real servers for the tests: an S3 server over a folder and an OCI registry."""

import base64
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from obstore.store import S3Store

from devcluster import packages, toolchain
from devcluster.addresses import LOOPBACK, free_port
from devcluster.errors import ClusterError
from devcluster.layout import from_environment
from tests.support.waiting import eventually

ACCESS_KEY = "CANARYACCESSKEY"
SECRET_KEY = "canary-secret-of-the-object-store"
BUCKET = "team"

USER, PASSWORD = "team", "canary-registry-password"
LOGIN = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
# bcrypt of PASSWORD with four rounds.
HTPASSWD = f"{USER}:$2b$04$fy77HFtGcLmU10SKe/D0l.F0ydvnzYtKnN8RGcSPzOg3iPlXt/t6i\n"


Tls = tuple[Path, Path]
"""A server's certificate and its key: files in PEM."""


@contextmanager
def s3_server(folder: Path, host: str = LOOPBACK, *, tls: Tls | None = None) -> Iterator[str]:
    """Versitygw with the bucket BUCKET over `folder`/buckets/BUCKET; its HOST:PORT."""
    program = toolchain.built(from_environment(), ["versitygw"])["versitygw"]
    (folder / "buckets" / BUCKET).mkdir(parents=True)
    (folder / "metadata").mkdir()
    address = f"{host}:{free_port()}"
    command: list[str | Path] = [
        program,
        "--port",
        address,
        "--quiet",
        *(("--cert", tls[0], "--key", tls[1]) if tls else ()),
        "posix",
        "--sidecar",
        folder / "metadata",
        folder / "buckets",
    ]
    environment = {**os.environ, "ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY}
    with _running(command, environment, address):
        yield address


def s3_bucket(address: str) -> S3Store:
    """The bucket of that server, as its owner sees it."""
    return S3Store(
        BUCKET,
        endpoint=f"http://{address}",
        access_key_id=ACCESS_KEY,
        secret_access_key=SECRET_KEY,
        client_options={"allow_http": True},
    )


@contextmanager
def registry(
    folder: Path, *, passwords: Path | None = None, host: str = LOOPBACK, tls: Tls | None = None
) -> Iterator[str]:
    """Debian's docker-registry over `folder`, optionally with htpasswd; its HOST:PORT."""
    if packages.missing({"docker-registry": "docker-registry"}):
        raise ClusterError("no docker-registry on this machine; run `make test-tools`")
    address = f"{host}:{free_port()}"
    configuration: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "blobs")}},
        "http": {"addr": address},
    }
    if tls is not None:
        configuration["http"]["tls"] = {"certificate": str(tls[0]), "key": str(tls[1])}
    if passwords is not None:
        configuration["auth"] = {"htpasswd": {"realm": "team", "path": str(passwords)}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "registry.yaml"
    path.write_text(yaml.safe_dump(configuration))
    with _running(["docker-registry", "serve", str(path)], dict(os.environ), address):
        yield address


def give_login(folder: Path, host: str, login: str = LOGIN) -> None:
    """The file of a mounted Secret with a login for a registry."""
    (folder / ".dockerconfigjson").write_text(json.dumps({"auths": {host: {"auth": login}}}))


@contextmanager
def _running(command: list[str | Path], environment: dict[str, str], address: str) -> Iterator[None]:
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "TERM", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: _listens(address), seconds=30, every=0.02, what=f"{command[0]} on {address}")
        assert process.poll() is None, f"{command[0]} ended; another program answers on {address}"
        yield
    finally:
        process.terminate()
        process.wait()


def _listens(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
