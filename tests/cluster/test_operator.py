"""The operator as an administrator sees it: its rights, its writes, its probes, its metrics and logs."""

import json
from pathlib import Path

import pytest

from devcluster.product import NAMESPACE as OPERATOR_NAMESPACE
from tests.cluster.environment import Cluster, Object, Tenant, tiny_job
from tests.support.waiting import eventually

ACCOUNT = f"system:serviceaccount:{OPERATOR_NAMESPACE}:qlora-operator"
FINISHED = 50


def writes(audit_log: Path, since: int) -> list[Object]:
    """What the operator has written to the API server since that byte of the audit log."""
    with audit_log.open() as log:
        log.seek(since)
        entries = [json.loads(line) for line in log if line.endswith("}\n")]
    changing = {"create", "update", "patch", "delete", "deletecollection"}
    return [entry for entry in entries if entry["user"]["username"] == ACCOUNT and entry["verb"] in changing]


# In tests/api/test_reconcile.py nothing is written for a job that has ended, either.
@pytest.mark.slow
def test_a_restart_with_fifty_finished_jobs_writes_nothing(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("template"))
    tenant.succeed(name)
    finished = tenant.wait(name, lambda status: status.get("observedGeneration") == 1)
    for number in range(FINISHED):
        copy = tenant.apply({**tiny_job(f"finished-{number}"), "spec": tiny_job("x", suspend=True)["spec"]})
        patch = json.dumps({"status": finished})
        tenant.kubectl("patch", "qlorajob", copy, "--subresource=status", "--type=merge", f"--patch={patch}")
    cluster = tenant.cluster
    cluster.kill_operator()
    cluster.wait_for_operator()
    since = cluster.audit_log.stat().st_size
    cluster.kill_operator()
    cluster.wait_for_operator()
    probe = tenant.apply(tiny_job("after-restart", suspend=True))
    tenant.wait_for_phase(probe, "Suspended")
    objects = {entry["objectRef"].get("name", "") for entry in writes(cluster.audit_log, since)}
    assert not {name for name in objects if name.startswith(("finished-", "template"))}, objects


def test_its_account_can_do_what_it_needs_and_no_more(installed: Cluster) -> None:
    table = installed.kubectl("auth", "can-i", "--list", f"--as={ACCOUNT}", "--no-headers")
    rights = [line.split() for line in table.splitlines() if line.strip()]
    resources = {words[0] for words in rights if not words[0].startswith("[")}
    assert resources >= {"qlorajobs.qlora.dev", "jobs.batch", "pods", "pods/log"}
    assert not [line for line in table.splitlines() if "secrets" in line]
    assert not [line for line in table.splitlines() if "[*]" in line or line.startswith("*")]


def test_everything_runs_in_restricted_namespaces(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("restricted"))
    eventually(lambda: tenant.children(name, "pods"), seconds=60, what="a pod of the job")
    kubectl = tenant.cluster.kubectl
    namespaces = kubectl.get("namespaces", "--selector=pod-security.kubernetes.io/enforce=restricted")["items"]
    names = {item["metadata"]["name"] for item in namespaces}
    pods = kubectl.get("pods", "--all-namespaces", "--selector=app.kubernetes.io/name")["items"]
    ours = [pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/name"].startswith("qlora")]
    assert {OPERATOR_NAMESPACE, tenant.namespace} <= {pod["metadata"]["namespace"] for pod in ours} <= names
    tenant.kubectl("delete", "qlorajob", name)


def test_metrics_count_jobs_by_phase(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("counted", suspend=True))
    tenant.wait_for_phase(name, "Suspended")
    pod = tenant.cluster.operator_pod()
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    path = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/pods/{pod['metadata']['name']}:{ports['metrics']}/proxy/metrics"

    def suspended() -> float:
        text = tenant.cluster.kubectl("get", "--raw", path)
        series = f'qlora_jobs{{namespace="{tenant.namespace}",phase="Suspended"}}'
        lines = [line for line in text.splitlines() if line.startswith(series)]
        return float(lines[0].split()[-1]) if lines else 0.0

    assert eventually(lambda: suspended() >= 1, seconds=30)


def test_logs_are_structured_and_name_the_job(tenant: Tenant) -> None:
    name = tenant.apply(tiny_job("logged", suspend=True))
    tenant.wait_for_phase(name, "Suspended")

    def entries() -> list[Object]:
        lines = [json.loads(line) for line in tenant.cluster.operator_log().splitlines() if line.startswith("{")]
        return [line for line in lines if (line.get("namespace"), line.get("job")) == (tenant.namespace, name)]

    assert eventually(entries, seconds=30)


# What it says and does meanwhile is in tests/api/test_weather.py.
@pytest.mark.slow
def test_an_operator_that_cannot_watch_is_not_ready_and_recovers_without_a_restart(tenant: Tenant) -> None:
    cluster, kubectl = tenant.cluster, tenant.cluster.kubectl
    binding = kubectl.get("clusterrolebinding", "qlora-operator")
    before = cluster.operator_pod()
    try:
        kubectl("delete", "clusterrolebinding", "qlora-operator")
        eventually(lambda: not cluster.is_operator_ready(), seconds=300, every=2, what="an operator that is not ready")
    finally:
        for key in ("resourceVersion", "uid", "creationTimestamp", "managedFields"):
            binding["metadata"].pop(key, None)
        kubectl("apply", "--filename=-", input_text=json.dumps(binding))
    cluster.wait_for_operator()
    after = cluster.operator_pod()
    assert (after["metadata"]["uid"], restarts(after)) == (before["metadata"]["uid"], restarts(before))
    name = tenant.apply(tiny_job("after-denial", suspend=True))
    tenant.wait_for_phase(name, "Suspended")


def restarts(pod: Object) -> int:
    """How often the kubelet has restarted the pod's containers."""
    return sum(container["restartCount"] for container in pod["status"].get("containerStatuses", []))
