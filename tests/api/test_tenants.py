"""Attacks of tenants: each is rejected, or has no effect on others.

A tenant has the chart's role `edit`, which the cluster role `edit` of Kubernetes includes, in a namespace with the Pod
Security level `restricted`. The operator runs with the rights that the chart gives it. `pytest -s` prints a table.
"""

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from qlora_api.naming import JOB_LABEL, workspace_claim_name
from qlora_api.status import StepName
from tests.support.builders import FACTS
from tests.support.manifests import MINIMAL
from tests.support.sweeps import SWEEP
from tests.support.tenancy.forged_reports import FORGED
from tests.support.tenancy.harmless_attempts import NEEDS_NO_NODE, batch_job, forged, result, submit
from tests.support.tenancy.rejected_attempts import REJECTED, pod
from tests.support.tenancy.tenancy import (
    TENANT,
    TENANT_USER,
    VICTIM,
    Object,
    Tenancy,
    by_the_operator,
    denied_to_the_operator,
    granted_to_the_operator,
    path_of,
    tenancy,
    used_by_the_operator,
)
from tests.support.waiting import eventually

PROFILES: Object = {
    "default": {
        "device": "cpu",
        "gpuResource": None,
        "registries": ["registry.example.org"],
        "allowJobScheduling": True,
    },
    "small": {
        "allowJobScheduling": False,
        "limits": {"gpus": 1, "workspaceSize": "60Gi", "jobs": 2},
    },
    "private": {"allowedNamespaces": {"selector": {"matchLabels": {"kubernetes.io/metadata.name": VICTIM}}}},
    "nodes": {
        "device": "cuda",
        "gpuResource": "nvidia.com/gpu",
        "workspace": {"topology": "shared", "accessMode": "ReadWriteMany"},
    },
}
HARMLESS = {**NEEDS_NO_NODE, **FORGED}
CANARY = "hf_canarycanarycanarycanarycanary1234"


@dataclass
class Attacked:
    """The tenants, and the initial state of the victim's namespace."""

    tenants: Tenancy
    before: dict[str, Object]
    audit_start: int

    def require_unharmed(self) -> None:
        """No object of the victim has changed, and the operator runs."""
        assert _lasting(self.tenants.everything(VICTIM)) == self.before
        assert self.tenants.operator.alive, self.tenants.operator.log.read_text()[-3000:]


def _lasting(objects: dict[str, Object]) -> dict[str, Object]:
    """Drop the controllers' Events, which count reports of a missing storage class."""

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
        assert pod["metadata"]["namespace"] == VICTIM
        yield Attacked(tenants, _settled(tenants), tenants.audit_size())


def _settled(tenants: Tenancy) -> dict[str, Object]:
    """Wait until the victim's objects are complete and no longer change."""
    latest: dict[str, Object] = {}

    def unchanged() -> dict[str, Object] | None:
        nonlocal latest
        before, latest = latest, _lasting(tenants.everything(VICTIM))
        finalized = all(one["metadata"].get("finalizers") for one in _of_kind(latest, "persistentvolumeclaims"))
        started = all(one["status"].get("active") for one in _of_kind(latest, "jobs"))
        has_event = bool(_of_kind(latest, "events"))
        whole = finalized and started and has_event and "configmaps/kube-root-ca.crt" in latest
        return latest if whole and latest == before else None

    return eventually(unchanged, seconds=60, every=1, what="a victim at rest") or {}


def _of_kind(objects: dict[str, Object], kind: str) -> list[Object]:
    return [one for name, one in objects.items() if name.startswith(f"{kind}/")]


def test_there_are_many_attempts() -> None:
    rows = [f"{one.status}       {name}: {one.says}" for name, one in REJECTED.items()]
    rows += [f"harmless  {name}" for name in HARMLESS]
    sys.stdout.write("\n" + "\n".join(rows) + "\n")
    assert len(rows) >= 150


@pytest.mark.parametrize("name", REJECTED)
def test_forbidden_actions_of_a_tenant_are_rejected_with_a_reason(attacked: Attacked, name: str) -> None:
    attempt = REJECTED[name]
    strict = {} if attempt.method in ("GET", "DELETE") or "?" in attempt.path else {"fieldValidation": "Strict"}
    status, answer = attacked.tenants.tenant.send(
        attempt.method, attempt.path, attempt.body, kind=attempt.kind, **strict
    )
    assert (status, attempt.says in str(answer.get("message"))) == (attempt.status, True), (status, answer)
    assert CANARY not in str(answer)
    attacked.require_unharmed()


@pytest.mark.parametrize("name", HARMLESS)
def test_permitted_actions_of_a_tenant_harm_no_other_tenant(attacked: Attacked, name: str) -> None:
    HARMLESS[name](attacked.tenants)
    attacked.require_unharmed()


def test_no_neighbor_waits_for_a_flood_of_jobs(attacked: Attacked) -> None:
    require_turns(attacked, 100, "early")


# Unlike the test above: as many as one tenant can be expected to submit in earnest.
@pytest.mark.slow
def test_no_neighbor_waits_for_a_thousand_jobs(attacked: Attacked) -> None:
    require_turns(attacked, 1000, "late")


def require_turns(attacked: Attacked, count: int, name: str) -> None:
    """While the operator stands still, a flood and then a neighbor's job arrive."""
    tenants = attacked.tenants
    tenants.operator.send(signal.SIGSTOP)
    for number in range(count):
        submit(tenants, f"{name}-flood-{number}", scheduling={"profileName": "small"})
    since = tenants.audit_size()
    tenants.victim.create(VICTIM, "qlorajobs", MINIMAL | {"metadata": {"name": name}})
    tenants.operator.send(signal.SIGCONT)
    tenants.wait_for_pod(name, "prepare", VICTIM)
    statuses = 0
    for entry in written_by_the_operator(tenants.audited(since)):
        where, what = _namespace(entry), entry["objectRef"]["resource"]
        statuses += (where, what) == (TENANT, "qlorajobs")
        if (where, what) == (VICTIM, "jobs"):
            break
    assert statuses <= count / 2, f"{statuses} of {count} jobs came first"
    tenants.victim.delete(VICTIM, "qlorajobs", name)
    eventually(lambda: not tenants.admin.list(VICTIM, "jobs", f"{JOB_LABEL}={name}"), seconds=60)
    tenants.tenant.must("DELETE", path_of(TENANT, "qlorajobs"))
    assert tenants.operator.alive


def test_a_flood_of_forged_pods_and_events_delays_no_neighbor(attacked: Attacked) -> None:
    tenants = attacked.tenants
    job = submit(tenants, "crowded")
    for number in range(100):
        labeled = pod() | {"metadata": forged(f"crowd-{number}", job, "prepare")}
        tenants.tenant.create(TENANT, "pods", labeled)
        about = {"kind": "QLoRAJob", "namespace": TENANT, "name": "crowded"}
        event = {"metadata": {"name": f"crowd.{number}"}, "involvedObject": about, "reason": "Succeeded"}
        tenants.tenant.create(TENANT, "events", event)
    tenants.victim.create(VICTIM, "qlorajobs", MINIMAL | {"metadata": {"name": "beside-a-crowd"}})
    tenants.wait_for_pod("beside-a-crowd", "prepare", VICTIM)
    assert tenants.operator.alive


def test_every_change_of_the_victims_objects_was_made_for_its_own_jobs(attacked: Attacked) -> None:
    """From the audit log of all the attempts above."""
    requests = attacked.tenants.audited(attacked.audit_start)
    of_the_tenant = [one for one in requests if one.get("impersonatedUser", {}).get("username") == TENANT_USER]
    reached = [one for one in of_the_tenant if one["responseStatus"]["code"] < 300 and _namespace(one) != TENANT]
    assert {(_namespace(one), one["verb"]) for one in reached} <= {("", "create"), ("capped", "create")}
    own = ("early", "late", "beside-a-crowd", "qlora-jobs", "qlora-servers")
    written = [one for one in written_by_the_operator(requests) if _namespace(one) == VICTIM]
    assert [one["requestURI"] for one in written if not one["objectRef"].get("name", own[0]).startswith(own)] == []
    assert [one["requestURI"] for one in written if one["responseStatus"]["code"] == 403] == []


def test_the_operators_rights_are_those_that_it_uses(attacked: Attacked) -> None:
    """Over a job's life, suspension and taken names, no right is missing or unused."""
    tenants = attacked.tenants
    for name in ("exercise", "exercise-name"):
        submit(tenants, name, suspend=True)
    tenants.tenant.create(TENANT, "jobs", batch_job({"name": "exercise-name-prepare-1"}))
    _take_claim(tenants, "exercise-claim")
    for name in ("exercise", "exercise-name", "exercise-claim"):
        tenants.tenant.patch(TENANT, "qlorajobs", name, {"spec": {"suspend": False}})
    tenants.wait("exercise-name", reason="NameTaken")
    tenants.wait("exercise-claim", reason="ClaimNameTaken")
    several = submit(tenants, "exercise-nodes", resources={"nodes": 2}, scheduling={"profileName": "nodes"})
    prepare = tenants.wait_for_pod("exercise-nodes", "prepare")
    tenants.end(prepare, result(several, prepare))
    tenants.wait_for_pod("exercise-nodes", "train")
    _let_things_end(tenants)
    tenants.tenant.create(TENANT, "qlorasweeps", SWEEP | {"metadata": {"name": "exercise"}})
    tenants.wait_for_pod("exercise-00", "prepare")
    tenants.tenant.patch(TENANT, "qlorasweeps", "exercise", {"spec": {"suspend": True}})
    tenants.wait("exercise-00", phase="Suspended")
    pod = tenants.wait_for_pod("exercise", "prepare")
    since = tenants.audit_size()
    tenants.run(pod)
    eventually(
        lambda: "pods/log" in used_by_the_operator(tenants.audited(since)), seconds=60, what="a log that is read"
    )
    tenants.tenant.patch(TENANT, "qlorajobs", "exercise", {"spec": {"suspend": True}})
    eventually(lambda: not tenants.admin.list(TENANT, "jobs", f"{JOB_LABEL}=exercise"), seconds=60, what="no Job")

    everything = tenants.audited()
    used = used_by_the_operator(everything)
    # Of jobs that an operator had started before it was restarted, and of jobs that were restored.
    used["controllerrevisions"] = used["controllerrevisions"] | {"get", "patch"}
    assert used == granted_to_the_operator()
    denied = denied_to_the_operator(everything)
    assert [uri for uri in denied if "/namespaces/capped/" not in uri] == [], "a quota denies, in that namespace"


def written_by_the_operator(requests: list[Object]) -> list[Object]:
    writes = ("create", "update", "patch", "delete", "deletecollection")
    return [one for one in requests if by_the_operator(one) and one["verb"] in writes]


def _namespace(entry: Object) -> str:
    return str(entry.get("objectRef", {}).get("namespace", ""))


def _let_things_end(tenants: Tenancy) -> None:
    """A job and its claim, and a sweep, that are deleted after their end."""
    policy: Object = {"whenFinished": "Delete"}
    job = submit(
        tenants,
        "exercise-end",
        workspace={"persistentVolumeClaimRetentionPolicy": policy},
        output={"destination": "pvc://inputs/adapters/end"},
        ttlSecondsAfterFinished=0,
    )
    facts: dict[StepName, Object] = {"prepare": {}, "train": FACTS["train"], "publish": FACTS["publish"]}
    for step, found in facts.items():
        pod = tenants.wait_for_pod("exercise-end", step)
        policy["whenDeleted"] = "Delete"
        patch = {"spec": {"workspace": {"persistentVolumeClaimRetentionPolicy": policy}}}
        tenants.tenant.patch(TENANT, "qlorajobs", "exercise-end", patch)
        tenants.end(pod, result(job, pod, step=step, **found))
    equal = {"cells": [{}, {}], "template": SWEEP["spec"]["template"], "ttlSecondsAfterFinished": 0}
    tenants.tenant.create(TENANT, "qlorasweeps", SWEEP | {"metadata": {"name": "exercise-end"}, "spec": equal})
    for kind in ("qlorajobs", "qlorasweeps"):
        eventually(partial(_is_gone, tenants, kind, "exercise-end"), seconds=60, what=f"the end of {kind}")


def _is_gone(tenants: Tenancy, kind: str, name: str) -> bool:
    return all(one["metadata"]["name"] != name for one in tenants.admin.list(TENANT, kind))


def _take_claim(tenants: Tenancy, name: str) -> None:
    """A claim that has the name of the workspace of a suspended job."""
    claim = workspace_claim_name(name, submit(tenants, name, suspend=True)["metadata"]["uid"])
    spec: Any = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": claim}, "spec": spec}
    tenants.tenant.create(TENANT, "persistentvolumeclaims", body)
