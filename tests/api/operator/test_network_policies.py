"""NetworkPolicies that a user changes are restored by the real API server, with what the user has added to them."""

import asyncio
import json

from devcluster.controlplane import ControlPlane
from qlora_operator.decisions.manifests.network import JobNetworkPolicies
from qlora_operator.kube.connection import connect
from qlora_operator.reconcile.isolation import Isolation
from tests.support.builders import PROFILES
from tests.support.cluster.played import NAMESPACE, prepared


def test_changed_and_deleted_policies_are_as_before_when_the_next_job_starts(plane: ControlPlane) -> None:
    prepared(plane)
    seconds = iter(range(0, 1_000, 100))

    async def start_a_job() -> None:
        async with connect(plane.kubeconfig) as cluster:
            await Isolation(cluster, JobNetworkPolicies(), PROFILES, lambda: float(next(seconds))).apply(NAMESPACE)

    def policies() -> dict[str, object]:
        found = plane.kubectl.get("networkpolicies", f"--namespace={NAMESPACE}")["items"]
        return {each["metadata"]["name"]: each["spec"] for each in found}

    asyncio.run(start_a_job())
    before = policies()
    assert before.keys() == {"qlora-jobs", "qlora-servers"}
    opened = json.dumps({"spec": {"ingress": [{}], "egress": [{}]}})
    plane.kubectl("patch", "networkpolicy", "qlora-jobs", f"--namespace={NAMESPACE}", f"--patch={opened}")
    plane.kubectl("delete", "networkpolicy", "qlora-servers", f"--namespace={NAMESPACE}")
    assert policies() != before

    asyncio.run(start_a_job())
    assert policies() == before
