"""Effects of a node on a job: drained, lost, with a full volume, with shared GPUs."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from devcluster import addresses, cluster, layout, processes
from devcluster.kubectl import claim
from devcluster.processes import run
from tests.cluster.environment import ENDLESS, LONG, Object, Tenant, signal_processes_of, tiny_job
from tests.support.waiting import eventually

# tests/unit/qlora_operator/decisions/test_attempts.py counts disruptions; tests/trainer/promises fills a disk.
pytestmark = pytest.mark.slow
SMALL = "small"


@pytest.fixture(scope="module")
def undisturbed(tenant: Tenant) -> Object:
    """The status of an undisturbed job."""
    return tenant.succeed(tenant.apply(tiny_job("undisturbed", steps=LONG)))


def require_one_disruption(tenant: Tenant, name: str, undisturbed: Object) -> None:
    """The job has ended in the same bytes, and one pod has been counted."""
    status = tenant.succeed(name)
    assert (status.get("disruptions", 0), status.get("failures", 0)) == (1, 0)
    assert tenant.adapter_sum(status) == tenant.adapter_sum(undisturbed)


def test_a_drained_node_is_one_disruption(tenant: Tenant, undisturbed: Object) -> None:
    name = tenant.apply(tiny_job("drained", steps=LONG))
    kubectl = tenant.cluster.kubectl
    # Only the job's pods: the cluster has no second node for the system pods.
    chosen = f"--pod-selector=qlora.dev/job={name}"
    command: list[str | Path] = [kubectl.program, "--kubeconfig", kubectl.kubeconfig, "drain", addresses.NODE, chosen]
    drains: list[subprocess.Popen[bytes]] = []
    try:
        # It waits for the pod, which stands still until it is asked to end.
        tenant.held_until_asked(name, lambda _: drains.append(subprocess.Popen([*command, "--delete-emptydir-data"])))
        assert [drain.wait(300) for drain in drains] == [0]
        waiting = tenant.wait(name, lambda s: s["phase"] == "Queued", what="a job that waits for a node")
        assert waiting["checkpoint"]["step"] > 0
    finally:
        kubectl("uncordon", addresses.NODE)
    require_one_disruption(tenant, name, undisturbed)


def test_a_full_claim_is_named_and_a_retry_with_room_continues(tenant: Tenant) -> None:
    with small_claim(tenant) as folder:
        job = tenant.apply(tiny_job("full", steps=LONG, workspace={"claimName": SMALL}))
        with tenant.stopped(job, "train"):
            fill(folder / "ballast")
        status = tenant.wait_for_end(job)
        assert (status["phase"], status["lastFailure"]["reason"]) == ("Failed", "StorageFull"), status
        (folder / "ballast").unlink()
        tenant.patch(job, retry={"request": "a"})
        tenant.wait(job, lambda now: now.get("retryRequest") == "a")
        tenant.succeed(job)
        tenant.kubectl("delete", "qlorajob", job)
        eventually(lambda: not tenant.children(job, "pods"), seconds=60)


@contextmanager
def small_claim(tenant: Tenant) -> Iterator[Path]:
    """Mount a claim of 16 MiB below the cluster's folder, so that `down` unmounts it."""
    folder = layout.from_environment().cluster / SMALL
    folder.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0777", "tmpfs", folder])
    body = claim(SMALL, tenant.namespace, "16Mi")
    body["spec"] |= {"storageClassName": "", "volumeName": SMALL}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": SMALL},
        "spec": {
            "capacity": {"storage": "16Mi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "hostPath": {"path": str(folder)},
        },
    }
    both = {"apiVersion": "v1", "kind": "List", "items": [volume, body]}
    tenant.cluster.kubectl("apply", "--filename=-", input_text=json.dumps(both))
    try:
        yield folder
    finally:
        tenant.kubectl("delete", "pvc", SMALL, "--wait=false")
        tenant.cluster.kubectl("delete", "pv", SMALL, "--wait=false")
        run(["umount", "--lazy", folder])


def fill(path: Path) -> None:
    """Write to the file until the file system is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_two_gpus_of_one_job_keep_the_next_job_waiting(tenant: Tenant) -> None:
    both = tenant.apply(tiny_job("both", steps=ENDLESS, resources={"cpu": "500m", "gpus": 2}))
    tenant.wait(both, lambda status: status.get("progress", {}).get("loss"), what="two processes that train")
    pod = tenant.running_pod(both, "train")
    assert pod is not None
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"][addresses.GPU_RESOURCE] == "2"
    one = tenant.apply(tiny_job("one"))
    tenant.wait(one, lambda s: "nvidia.com/gpu" in tenant.condition(one, "Succeeded").get("message", ""))
    assert tenant.status(one)["phase"] == "Queued"
    tenant.patch(both, suspend=True)
    tenant.succeed(one)
    tenant.kubectl("delete", "qlorajob", both)


def test_a_lost_node_is_one_disruption(tenant: Tenant, undisturbed: Object) -> None:
    """End kubelet and containers immediately, and delete the Node, as a cloud does."""
    name = tenant.apply(tiny_job("lost", steps=LONG))
    where, kubectl = layout.from_environment(), tenant.cluster.kubectl
    with tenant.held(name) as pod, cluster.locked(where):
        (kubelet,) = (record for record in processes.records(where.records) if record.name == "kubelet")
        processes.stop(kubelet, grace=0)
        try:
            signal_processes_of(pod, signal.SIGKILL)
            kubectl("delete", "node", addresses.NODE)

            def gone() -> bool:
                left = tenant.get("pods", f"--selector=qlora.dev/job={name},qlora.dev/step=train")["items"]
                return pod["metadata"]["uid"] not in {one["metadata"]["uid"] for one in left}

            eventually(gone, seconds=180, what="the lost pod deleted")
        finally:
            cluster.start_node_again(where)
    tenant.cluster.wait_for_operator()
    require_one_disruption(tenant, name, undisturbed)
