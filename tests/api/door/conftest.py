"""A door in front of the API server, in each of its two modes, with two tenants."""

from collections.abc import Iterator

import pytest

from devcluster.controlplane import ControlPlane
from tests.support.door import MODEL, TEMPLATE, DoorProcess, Tenant, add_tenant, running_door
from tests.support.servers import ACCESS_KEY, BUCKET, SECRET_KEY, s3_server

MODELS = {MODEL: {"spec": TEMPLATE}, "automatic": {"spec": {"model": TEMPLATE["model"]}}}


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server."""
    with s3_server(tmp_path_factory.mktemp("bucket")) as address:
        yield f"http://{address}"


@pytest.fixture(scope="session")
def door(plane: ControlPlane, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """A door that impersonates, with a bucket."""
    files = {"bucket": {"address": f"s3://{BUCKET}/files", "endpoint": bucket, "region": "us-east-1"}}
    settings = {"models": MODELS, "files": {**files, "maxBytes": 3_000_000}}
    credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with running_door(tmp_path_factory.mktemp("door"), plane, settings, credentials) as door:
        yield door


@pytest.fixture(scope="session")
def passing_door(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    """A door without any right, which passes keys on, and without a bucket."""
    settings = {"identity": "token", "models": MODELS}
    with running_door(tmp_path_factory.mktemp("passing"), plane, settings) as door:
        yield door


@pytest.fixture(scope="session")
def alice(plane: ControlPlane) -> Tenant:
    return add_tenant(plane, "team-a")


@pytest.fixture(scope="session")
def bob(plane: ControlPlane) -> Tenant:
    return add_tenant(plane, "team-b")
