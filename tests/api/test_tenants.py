"""Tenants who attack: whatever they try is rejected, or has no effect on others.

A tenant has the chart's role `edit`, which the cluster role `edit` of Kubernetes includes, in a namespace with the Pod
Security level `restricted`. The operator runs with the rights that the chart gives it. `pytest -s` prints a table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.harmless_attempts import HARMLESS, SPEC, result, submit
from tests.support.manifests import MINIMAL
from tests.support.rejected_attempts import REJECTED
from tests.support.tenancy import (
    NODE,
    OPERATOR,
    OPERATOR_NAMESPACE,
    TENANT,
    TENANT_USER,
    VICTIM,
    Object,
    Tenancy,
    path_of,
    rendered,
    tenancy,
)
from tests.support.waiting import eventually

PROFILES: Object = {
    "default": {"device": "cpu", "gpuResource": None, "registries": ["registry.example.org"]},
    "small": {
        "allowJobScheduling": False,
        "limits": {"gpus": 1, "workspaceSize": "60Gi", "jobs": 2},
    },
    "private": {"namespaces": [VICTIM]},
}
CANARY = "hf_canarycanarycanarycanarycanary1234"


@dataclass
class Attacked:
    """The tenants, and what the victim's namespace was like before."""

    tenants: Tenancy
    before: dict[str, Object]
    audit_start: int

    def require_unharmed(self) -> None:
        """Nothing of the victim's has changed, and the operator runs."""
        assert _lasting(self.tenants.everything(VICTIM)) == self.before
        assert self.tenants.operator.poll() is None, self.tenants.operator_log.read_text()[-3000:]


def _lasting(objects: dict[str, Object]) -> dict[str, Object]:
    """Without the Events of the controllers, which count how often they have seen that there is no storage class."""

    def of_the_operator(one: Object) -> bool:
        return bool(one["source"].get("component") == "qlora-operator")

    return {name: one for name, one in objects.items() if not name.startswith("events/") or of_the_operator(one)}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    with tenancy(tmp_path_factory.mktemp("tenancy"), PROFILES) as tenants:
        victim = tenants.victim
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "hub"}, "stringData": {"token": CANARY}}
        rows = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rows"}, "data": {"train.jsonl": CANARY}}
        spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": spec}
        for plural, body in (("secrets", secret), ("configmaps", rows), ("persistentvolumeclaims", claim)):
            victim.create(VICTIM, plural, body)
        victim.create(VICTIM, "qlorajobs", MINIMAL | {"metadata": {"name": "tune"}})
        pod = tenants.wait_for_pod("tune", "prepare", VICTIM)
        tenants.wait("tune", VICTIM, phase="Preparing")
        still = eventually(lambda: _still(tenants), seconds=60, every=1, what="a victim at rest")
        assert pod["metadata"]["namespace"] == VICTIM
        yield Attacked(tenants, still, tenants.audit_size())


def _still(tenants: Tenancy) -> dict[str, Object] | None:
    """What the victim has, once the controllers have written all that they write."""
    before = _lasting(tenants.everything(VICTIM))
    eventually(lambda: True, seconds=1)
    claims = [one for name, one in before.items() if name.startswith("persistentvolumeclaims/")]
    finalized = all(one["metadata"].get("finalizers") for one in claims)
    return before if finalized and _lasting(tenants.everything(VICTIM)) == before else None


def test_there_are_many_attempts() -> None:
    print()
    for name, attempt in REJECTED.items():
        print(f"rejected  {attempt.status}  {name}: {attempt.says}")
    for name, harmless in HARMLESS.items():
        print(f"harmless       {name}{f': {harmless.__doc__}' if harmless.__doc__ else ''}")
    assert len(REJECTED) + len(HARMLESS) >= 150


@pytest.mark.parametrize("name", REJECTED)
def test_what_a_tenant_may_not_do_is_rejected_with_a_reason(attacked: Attacked, name: str) -> None:
    attempt = REJECTED[name]
    strict = {} if attempt.method in ("GET", "DELETE") or "?" in attempt.path else {"fieldValidation": "Strict"}
    status, answer = attacked.tenants.tenant.send(
        attempt.method, attempt.path, attempt.body, kind=attempt.kind, **strict
    )
    assert (status, attempt.says in str(answer.get("message"))) == (attempt.status, True), (status, answer)
    assert CANARY not in str(answer)
    attacked.require_unharmed()


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_tenant_may_do_harms_nobody_else(attacked: Attacked, name: str) -> None:
    HARMLESS[name](attacked.tenants)
    attacked.require_unharmed()
