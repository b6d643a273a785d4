"""Attacks of tenants on a node: those of tests/api/test_tenants.py, and those that need one.

A tenant has the chart's role `edit`, which the cluster role `edit` of Kubernetes includes, in a namespace with the Pod
Security level `restricted`. Helm has installed the operator.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from devcluster import addresses, cluster, layout, product
from devcluster.controlplane import ControlPlane
from devcluster.product import NAMESPACE as OPERATOR_NAMESPACE
from tests.cluster.conftest import give_inputs
from tests.cluster.environment import ENDLESS, INPUTS, Cluster, Object, Tenant, tiny_job
from tests.support.manifests import MINIMAL
from tests.support.tenancy.harmless_attempts import NEEDS_NO_NODE, batch_job
from tests.support.tenancy.node_attempts import CANARY, ON_A_NODE, Assault
from tests.support.tenancy.rejected_attempts import REJECTED
from tests.support.tenancy.tenancy import (
    TENANT,
    TENANT_USER,
    VICTIM,
    VICTIM_USER,
    Tenants,
    add_namespaces,
    client,
    denied_to_the_operator,
    granted_to_the_operator,
    used_by_the_operator,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
PROFILES: Object = {
    # The host has no listener: jobs whose data are missing never get that far.
    "default": {
        "registries": ["registry.example.org"],
        "hubEndpoint": "http://127.0.0.1:9",
        "allowJobScheduling": True,
    },
    "small": {"allowJobScheduling": False, "limits": {"gpus": 1, "workspaceSize": "60Gi", "jobs": 2}},
    "private": {"allowedNamespaces": {"selector": {"matchLabels": {"kubernetes.io/metadata.name": VICTIM}}}},
    product.SHARED_PROFILE: product.SMALL_MACHINE["profiles"][product.SHARED_PROFILE],
}


@pytest.fixture(scope="module")
def since(installed: Cluster) -> Iterator[int]:
    """Start an operator without a Lease, and return where its audit log begins."""
    where = layout.from_environment()
    start = installed.audit_log.stat().st_size
    profiles = {**PROFILES, "default": {**product.SMALL_MACHINE["profiles"]["default"], **PROFILES["default"]}}
    installed.kubectl("scale", "deployment/qlora-operator", "--replicas=0", f"--namespace={OPERATOR_NAMESPACE}")
    eventually(lambda: not installed.kubectl.get("pods", f"--namespace={OPERATOR_NAMESPACE}")["items"], seconds=60)
    installed.kubectl("delete", "lease", "--all", f"--namespace={OPERATOR_NAMESPACE}")
    product.install(where, where.kubeconfig, installed.images, {**product.SMALL_MACHINE, "profiles": profiles})
    yield start
    product.install(where, where.kubeconfig, installed.images)


@pytest.fixture(scope="module")
def tenants(installed: Cluster, since: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    """The two tenants, and a job of the victim's."""
    assert since
    where = layout.from_environment()
    server = f"https://{addresses.BRIDGE_ADDRESS}:{cluster.ports_of(where).api}"
    plane = ControlPlane(where.cluster, server, where.kubeconfig, where.audit_log, installed.kubectl)
    folder = tmp_path_factory.mktemp("clients")
    admin, tenant, victim = (client(plane, folder, user) for user in ("", TENANT_USER, VICTIM_USER))
    add_namespaces(installed.kubectl)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": CANARY}}
    victim.create(VICTIM, "secrets", secret)
    victim.create(
        VICTIM, "qlorajobs", MINIMAL | {"metadata": {"name": "tune"}, "spec": MINIMAL["spec"] | {"suspend": True}}
    )
    found = Tenants(plane, admin, tenant, victim)
    found.wait("tune", VICTIM, phase="Suspended")
    yield found
    for namespace in (TENANT, "capped", VICTIM):
        for job in admin.list(namespace, "qlorajobs"):
            if job["metadata"].get("finalizers"):
                admin.patch(namespace, "qlorajobs", job["metadata"]["name"], {"metadata": {"finalizers": None}})
        installed.kubectl("delete", "namespace", namespace)


@pytest.fixture(scope="module")
def untouched(tenants: Tenants) -> dict[str, Object]:
    """Return the victim's objects once they are complete: an Event follows its status."""

    def whole() -> dict[str, Object] | None:
        found = tenants.everything(VICTIM)
        has_event = any(name.startswith("events/") for name in found)
        return found if has_event and "configmaps/kube-root-ca.crt" in found else None

    return eventually(whole, seconds=60, what="the Event of the suspension, and the certificate in the namespace") or {}


@pytest.fixture(scope="module")
def attacker(
    tenants: Tenants, installed: Cluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tenant:
    """The tenant, with inputs and a Secret."""
    tenant = Tenant(installed, TENANT)
    give_inputs(tenant, tiny_model, tmp_path_factory.mktemp("inputs"))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": CANARY}}
    tenants.tenant.create(TENANT, "secrets", secret)
    return tenant


@pytest.fixture(scope="module")
def assault(attacker: Tenant, tenant: Tenant) -> Assault:
    model = {"source": f"pvc://{INPUTS}/model", "tokenSecretRef": {"name": "hub"}}
    own = attacker.apply(tiny_job("own", steps=ENDLESS, model=model))
    other = tenant.apply(tiny_job("neighbor", steps=ENDLESS))
    for who, name in ((attacker, own), (tenant, other)):
        who.wait(name, lambda status: status.get("progress", {}).get("loss"), what="a job that trains")
    pod = tenant.running_pod(other, "train")
    assert pod is not None
    return Assault(attacker, own, tenant, other, pod)


@pytest.mark.parametrize("name", REJECTED)
def test_forbidden_actions_of_a_tenant_are_rejected_with_a_reason(
    tenants: Tenants, untouched: dict[str, Object], name: str
) -> None:
    attempt = REJECTED[name]
    strict = {} if attempt.method in ("GET", "DELETE") or "?" in attempt.path else {"fieldValidation": "Strict"}
    status, answer = tenants.tenant.send(attempt.method, attempt.path, attempt.body, kind=attempt.kind, **strict)
    assert (status, attempt.says in str(answer.get("message"))) == (attempt.status, True), (status, answer)
    assert tenants.everything(VICTIM) == untouched


@pytest.mark.parametrize("name", NEEDS_NO_NODE)
def test_permitted_actions_of_a_tenant_harm_no_other_tenant(
    tenants: Tenants, untouched: dict[str, Object], name: str
) -> None:
    NEEDS_NO_NODE[name](tenants)
    assert tenants.everything(VICTIM) == untouched


@pytest.mark.parametrize("name", ON_A_NODE)
def test_actions_in_a_tenants_pods_harm_no_other_tenant(assault: Assault, name: str) -> None:
    ON_A_NODE[name](assault)
    assault.require_neighbor_unharmed()


def test_the_neighbors_training_is_undisturbed(assault: Assault) -> None:
    before = assault.neighbor.status(assault.other)["progress"]["step"]
    assault.neighbor.wait(assault.other, lambda status: status["progress"]["step"] > before, what="progress")
    assault.require_neighbor_unharmed()
    for tenant, name in ((assault.attacker, assault.job), (assault.neighbor, assault.other)):
        tenant.kubectl("delete", "qlorajob", name)


TAMPERING = {
    "another-adapter": "printf X | dd of=trained/adapter_model.safetensors bs=1 seek=4000 conv=notrunc",
    "a-link": "mv trained kept && ln -s /proc/self/root trained",
    "a-link-in-it": "ln -sf /etc/passwd trained/adapter_config.json",
    "a-link-for-the-adapter": "ln -s /tmp adapter",
}


@pytest.mark.parametrize("name", TAMPERING)
def test_an_adapter_that_was_changed_after_training_is_not_published(attacker: Tenant, name: str) -> None:
    job = attacker.apply(tiny_job(name, retry={"maxFailures": 0}))
    with attacker.stopped(job, "publish"):
        workspace = attacker.status(job)["workspace"]
        with attacker.volume(workspace["claimName"]) as files:
            files.run("sh", "-c", f"cd /volume/{workspace['path']} && {TAMPERING[name]}")
    status = attacker.wait_for_end(job)
    assert (status["phase"], "adapter" in status) == ("Failed", False), status
    assert status["lastFailure"]["reason"] == "UnsafeArtifact", status
    attacker.kubectl("delete", "qlorajob", job)


def test_the_operator_lacks_no_right_with_a_node(tenants: Tenants, attacker: Tenant, since: int) -> None:
    """From the audit log of the attempts and a taken name. For unused rights see tests/api/test_tenants.py."""
    tenants.tenant.create(TENANT, "jobs", batch_job({"name": "exercise-prepare-1"}))
    attacker.apply(tiny_job("exercise"))
    tenants.wait("exercise", reason="NameTaken")
    suspended = attacker.apply(tiny_job("exercise-suspension", steps=ENDLESS))
    attacker.wait(suspended, lambda status: status.get("progress", {}).get("loss"), what="a job that trains")
    tenants.tenant.patch(TENANT, "qlorajobs", suspended, {"spec": {"suspend": True}})
    attacker.wait_for_phase(suspended, "Suspended")
    attacker.claim("shared")
    several = tiny_job(
        "exercise-nodes",
        steps=ENDLESS,
        resources={"cpu": "500m", "nodes": 2},
        workspace={"claimName": "shared"},
        scheduling={"profileName": product.SHARED_PROFILE},
    )
    attacker.wait_for_phase(attacker.apply(several), "Queued", "Training")
    requests = tenants.audited(since)
    used, granted = used_by_the_operator(requests), granted_to_the_operator()
    assert used
    assert {kind for kind, verbs in used.items() if not verbs <= granted.get(kind, set())} == set()
    denied = denied_to_the_operator(requests)
    assert [uri for uri in denied if "/namespaces/capped/" not in uri] == [], "a quota denies, in that namespace"
    assert json.dumps(requests).count(CANARY) == 0
