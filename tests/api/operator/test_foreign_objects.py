"""Foreign input in objects that the operator reads: large, strange, and thousands of them.

No controllers and no node run here: a pod stays as its tenant has made it.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devcluster.controlplane import ControlPlane
from qlora_operator.kube.connection import connect
from tests.support.cluster.operator_process import OperatorProcess, running_operator
from tests.support.cluster.phases import cases
from tests.support.waiting import eventually

NAMESPACE = "foreign"
HELD_OUT = {"fraction": 0.1}
LABELS = {"qlora.dev/job": "nobody", "qlora.dev/job-uid": "nobody"}


@pytest.fixture(scope="module", autouse=True)
def namespace(plane: ControlPlane) -> None:
    plane.kubectl("create", "namespace", NAMESPACE)
    plane.kubectl("create", "serviceaccount", "default", f"--namespace={NAMESPACE}")


@pytest.fixture(autouse=True)
def clean(plane: ControlPlane) -> Iterator[None]:
    """Isolate the tests: none leaves an object for the next."""
    yield
    everything = ("--all", f"--namespace={NAMESPACE}")
    plane.kubectl("delete", "pods", *everything, "--grace-period=0", "--force")
    plane.kubectl("delete", "qlorajobs", *everything, "--wait=false")


def create(plane: ControlPlane, *objects: dict[str, Any]) -> None:
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    plane.kubectl("create", "--filename=-", input_text=json.dumps(listed))


def job(name: str, *, suspend: bool = True, **annotations: str) -> dict[str, Any]:
    """Suspended by default, so that nothing is created for it."""
    return {
        "apiVersion": "qlora.dev/v1beta1",
        "kind": "QLoRAJob",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
        "spec": {"suspend": suspend, "model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}},
    }


def pod(name: str, **metadata: Any) -> dict[str, Any]:
    container = {"name": "trainer", "image": "example.org/image"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": LABELS, **metadata},
        # Of a node, so that a deletion waits for its kubelet.
        "spec": {"nodeName": "node", "automountServiceAccountToken": False, "containers": [container]},
    }


def has_suspended(operator: OperatorProcess, jobs: int) -> None:
    def all_shown() -> bool:
        return operator.metric(f'qlora_jobs{{namespace="{NAMESPACE}",phase="Suspended"}}') == jobs

    operator.wait_until_ready()
    eventually(all_shown, seconds=120, every=0.2, what=f"{jobs} suspended jobs")


def peak_mebibytes(operator: OperatorProcess) -> int:
    lines = Path(f"/proc/{operator.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def test_a_malformed_foreign_pod_does_not_end_the_operator(plane: ControlPlane, tmp_path: Path) -> None:
    create(plane, job("bystander"), pod("index", annotations={"batch.kubernetes.io/job-completion-index": "9" * 5000}))
    settings = {"namespaces": [NAMESPACE], "resyncSeconds": 1}
    with running_operator(tmp_path / "first", plane.kubeconfig, settings) as operator:
        has_suspended(operator, 1)
        # While it watches, and before the next one starts.
        create(plane, pod("grace"))
        where = ("grace", f"--namespace={NAMESPACE}", "--wait=false")
        plane.kubectl("delete", "pod", *where, "--grace-period=200000000000")
        create(plane, job("later"))
        has_suspended(operator, 2)
        assert not [entry for entry in operator.entries() if entry["level"] == "error"]
    with running_operator(tmp_path / "second", plane.kubeconfig, settings) as operator:
        has_suspended(operator, 2)


def test_objects_of_another_controller_are_left_alone(plane: ControlPlane, tmp_path: Path) -> None:
    elsewhere, name = {"managedBy": "kueue.x-k8s.io/multikueue"}, ("elsewhere", f"--namespace={NAMESPACE}")
    body = job("elsewhere")
    template = {"spec": {**body["spec"], "suspend": False, "dataset": {"source": "hf://org/rows", "eval": HELD_OUT}}}
    sweep = {"suspend": True, "template": template, "cells": [{"rank": 8}], **elsewhere}
    create(plane, body | {"spec": body["spec"] | elsewhere}, body | {"kind": "QLoRASweep", "spec": sweep})
    create(plane, job("bystander"))
    applied = plane.kubectl.get("qlorasweep", *name)
    settings = {"namespaces": [NAMESPACE], "resyncSeconds": 1}
    with running_operator(tmp_path / "operator", plane.kubeconfig, settings) as operator:
        has_suspended(operator, 1)
        # As the other controller reports it, also with GPU time and a profile.
        status = next(case.body["status"] for case in cases() if case.name == "training")
        where = (*name, "--subresource=status", "--type=merge")
        plane.kubectl("patch", "qlorajob", *where, f"--patch={json.dumps({'status': status})}")
        reported = plane.kubectl.get("qlorajob", *name)
        create(plane, job("later"))
        has_suspended(operator, 2)
        assert plane.kubectl.get("qlorajob", *name) == reported
        assert plane.kubectl.get("qlorasweep", *name) == applied
        assert operator.metric(f'qlora_jobs{{namespace="{NAMESPACE}",phase="Training"}}') in (None, 0)
    plane.kubectl("delete", "qlorasweep", *name)


@pytest.mark.slow
def test_pods_of_many_small_fields_do_not_end_the_operator_at_its_start(plane: ControlPlane, tmp_path: Path) -> None:
    settings = {"namespaces": [NAMESPACE]}
    with running_operator(tmp_path / "none", plane.kubeconfig, settings) as operator:
        operator.wait_until_ready()
        before = peak_mebibytes(operator)
    for number in range(25):
        body = pod(f"crumbs-{number}")
        body["spec"]["containers"][0]["env"] = [{"name": "A"}] * 160_000
        create(plane, body)
    with running_operator(tmp_path / "many", plane.kubeconfig, settings) as operator:
        operator.wait_until_ready()
        grown = peak_mebibytes(operator) - before
    # A pod takes 2 MiB, and 37 when it is parsed. One list of all took 918.
    assert grown < 250, f"{grown} MiB for 25 pods"


def test_ended_jobs_are_not_read_to_count_the_running_ones(plane: ControlPlane) -> None:
    create(plane, *(job(name) for name in ("fresh", "succeeded", "failed", "training")))
    stored = {case.name: case.body["status"] for case in cases()}
    for name in ("succeeded", "failed", "training"):
        where = (name, f"--namespace={NAMESPACE}", "--subresource=status", "--type=merge")
        plane.kubectl("patch", "qlorajob", *where, f"--patch={json.dumps({'status': stored[name]})}")

    async def unfinished() -> Iterable[str | None]:
        async with connect(plane.kubeconfig) as cluster:
            return [profile async for page in cluster.profiles_in_use(NAMESPACE) for profile in page]

    # Of the one that is fresh, and of the one that trains.
    assert asyncio.run(unfinished()) == [None, "default"]
