"""Destinations and a hub that pods really use: an S3 server, a registry, and a hub with a cache of models.

See tests/trainer/stores and tests/trainer/publishing for the clients of these servers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest

from devcluster import layout, product
from devcluster.addresses import BRIDGE_ADDRESS
from tests.cluster.environment import Cluster, Object, Tenant, tiny_job
from tests.support.fake_hub import FakeHub, serve
from tests.support.servers import ACCESS_KEY, BUCKET, HTPASSWD, LOGIN, PASSWORD, SECRET_KEY, registry, s3_server
from tests.support.waiting import eventually

# The same without pods is tried for each destination in tests/trainer/publishing.
pytestmark = pytest.mark.slow
CACHE = "models"


@dataclass(frozen=True)
class Servers:
    """The servers of the profile, on the cluster's bridge, and their stored files."""

    objects: Path
    registry: str
    blobs: Path
    hub: FakeHub


@pytest.fixture(scope="module")
def servers(installed: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    passwords = folder / "htpasswd"
    passwords.write_text(HTPASSWD)
    where = layout.from_environment()
    with (
        s3_server(folder / "s3", BRIDGE_ADDRESS) as store,
        registry(folder / "oci", passwords=passwords, host=BRIDGE_ADDRESS) as oci,
        serve(FakeHub({"models/team/tiny": tiny_model}), BRIDGE_ADDRESS) as hub,
    ):
        profile = {
            **product.SMALL_MACHINE["profiles"]["default"],
            "objectStore": {"endpoint": f"http://{store}"},
            "registries": [f"http://{oci}"],
            "hubEndpoint": hub.endpoint,
            "modelCache": {"claimName": CACHE},
        }
        product.install(where, where.kubeconfig, installed.images, {"profiles": {"default": profile}})
        yield Servers(folder / "s3" / "buckets" / BUCKET, oci, folder / "oci" / "blobs", hub)
        product.install(where, where.kubeconfig, installed.images)


def give_secret(tenant: Tenant, name: str, data: dict[str, str]) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}
    tenant.kubectl("apply", "--filename=-", input_text=json.dumps(secret))


def published(tenant: Tenant, name: str, output: Object) -> Object:
    """Run a job with that output, check its credentials' modes, and return its status."""
    job = tenant.apply(tiny_job(name, output=output))
    for step in ("prepare", "publish"):
        with tenant.stopped(job, step) as pod:
            find = "find -L /credentials -type f -exec stat -L -c '%a %g' {} +"
            modes = tenant.kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", find)
            assert set(modes.splitlines()) == {"440 10001"}, step
    status = tenant.succeed(job)
    logs = "".join(tenant.kubectl("logs", pod["metadata"]["name"]) for pod in tenant.children(job, "pods"))
    assert not [word for word in (SECRET_KEY, PASSWORD, LOGIN) if word in logs]
    return status


def test_an_adapter_goes_to_an_object_store(tenant: Tenant, servers: Servers) -> None:
    give_secret(tenant, "store", {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY})
    output = {"destination": f"s3://{BUCKET}/adapters/first", "secretRef": {"name": "store"}}
    status = published(tenant, "to-s3", output)
    assert status["adapter"]["uri"] == output["destination"]
    content = (servers.objects / "adapters" / "first" / "adapter_model.safetensors").read_bytes()
    assert sha256(content).hexdigest() == status["adapter"]["sha256"]


def test_an_adapter_goes_to_a_registry(tenant: Tenant, servers: Servers) -> None:
    give_secret(tenant, "login", {".dockerconfigjson": json.dumps({"auths": {servers.registry: {"auth": LOGIN}}})})
    repository = f"oci://{servers.registry}/team/adapter"
    status = published(tenant, "to-oci", {"destination": f"{repository}:v1", "secretRef": {"name": "login"}})
    assert status["adapter"]["uri"].startswith(repository)
    kept = {path.parent.name for path in servers.blobs.rglob("data")}
    assert status["adapter"]["sha256"] in kept


def test_wrong_credentials_fail_a_job_before_it_trains(tenant: Tenant, servers: Servers) -> None:
    assert servers.objects.exists()
    give_secret(tenant, "wrong", {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": "wrong"})
    output = {"destination": f"s3://{BUCKET}/adapters/never", "secretRef": {"name": "wrong"}}
    job = tenant.apply(tiny_job("denied", output=output))
    status = tenant.wait_for_end(job)
    assert (status["phase"], status["lastFailure"]["step"]) == ("Failed", "prepare")
    assert "wrong" not in status["lastFailure"]["message"].replace("wrong credentials", "")


def test_two_jobs_with_one_base_model_download_it_once(tenant: Tenant, servers: Servers) -> None:
    tenant.claim(CACHE)
    sums = set()
    for name in ("first", "second"):
        job = tenant.apply(tiny_job(name, model={"source": "hf://team/tiny"}))
        sums.add(tenant.succeed(job)["adapter"]["sha256"])
    assert servers.hub.fetched.count("model.safetensors") == 1
    assert len(sums) == 1
    pods = eventually(lambda: tenant.children("second", "pods"), seconds=30)
    writable = {
        pod["metadata"]["labels"]["qlora.dev/step"]
        for pod in pods
        for mount in pod["spec"]["containers"][0]["volumeMounts"]
        if mount["mountPath"] == "/model-cache" and not mount.get("readOnly")
    }
    assert writable == {"prepare"}
