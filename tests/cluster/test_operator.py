"""The operator as an administrator sees it: rights, writes, probes, metrics and logs."""

import json

import pytest

from devcluster.product import NAMESPACE as OPERATOR_NAMESPACE
from tests.cluster.environment import Object, Tenant, tiny_job
from tests.support.waiting import eventually


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


# tests/api/weather/test_outages.py covers its reports and actions in the meantime.
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
    """The number of restarts of the pod's containers by the kubelet."""
    return sum(container["restartCount"] for container in pod["status"].get("containerStatuses", []))
