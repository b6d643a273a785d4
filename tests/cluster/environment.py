"""Common actions of the cluster tests: apply a job, wait for it, read its pods and its volume."""

import json
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.kubectl import FilePod, Kubectl, claim, file_pod
from devcluster.product import NAMESPACE as OPERATOR_NAMESPACE
from devcluster.product import Images, restricted_namespace
from tests.support.manifests import Manifest
from tests.support.waiting import eventually

Object = dict[str, Any]

ENDED = ("Succeeded", "Failed")
# Steps of a training that takes some seconds, and of one that a test holds (`Tenant.held`) before its end.
SHORT, LONG = 30, 800
# Of a training that a test stops.
ENDLESS = 1_000_000
CHECKPOINT = r'"checkpointStep": ?[1-9]'
"""In the log of a train pod, once it has saved."""
INPUTS = "inputs"
# For what a job or a sweep does: several times as much as a machine needs that has much else to do.
SECONDS = 1800


@dataclass(frozen=True)
class Cluster:
    """A running cluster with the operator installed."""

    kubectl: Kubectl
    images: Images
    audit_log: Path

    def operator_pod(self) -> Object:
        """The operator's pod that is not on its way out."""
        pods = self.kubectl.get("pods", f"--namespace={OPERATOR_NAMESPACE}")["items"]
        running = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
        assert len(running) == 1, [pod["metadata"]["name"] for pod in pods]
        return dict(running[0])

    def kill_operator(self) -> None:
        """End the operator's pod without a goodbye."""
        name = self.operator_pod()["metadata"]["name"]
        self.kubectl("delete", "pod", name, f"--namespace={OPERATOR_NAMESPACE}", "--grace-period=0", "--force")

    def is_operator_ready(self) -> bool:
        """Report readiness from the pod: the Deployment may still show an earlier one."""
        conditions = self.operator_pod()["status"].get("conditions", ())
        return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)

    def wait_for_operator(self) -> None:
        """Wait until the operator's pod is ready."""
        eventually(self.is_operator_ready, seconds=120, what="the operator's readiness")

    def operator_log(self) -> str:
        """The operator's log."""
        return self.kubectl("logs", f"--namespace={OPERATOR_NAMESPACE}", "deployment/qlora-operator", "--tail=-1")


def processes_of(pod: Object) -> Iterator[Path]:
    """Folders in /proc of the processes of a trainer's pod: they know their pod's UID."""
    marker = f"QLORA_POD_UID={pod['metadata']['uid']}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker in (process / "environ").read_bytes().split(b"\0"):
                yield process
        except OSError:
            continue  # it has ended, or is a thread of the kernel


def signal_processes_of(pod: Object, number: signal.Signals) -> int:
    """Send a signal to the processes of a trainer's pod, and return their number."""
    processes = [int(process.name) for process in processes_of(pod)]
    for process in processes:
        os.kill(process, number)
    return len(processes)


def is_asked_to_end(pod: Object) -> bool:
    """Whether SIGTERM waits for a process of the pod that stands still."""
    pending = [re.search(r"ShdPnd:\s(\w+)", (process / "status").read_text()) for process in processes_of(pod)]
    return any(found and int(found[1], 16) & 1 << signal.SIGTERM - 1 for found in pending)


@dataclass(frozen=True)
class Tenant:
    """A new namespace at Pod Security level `restricted`, with a volume of inputs."""

    cluster: Cluster
    namespace: str

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        """Kubectl in this namespace."""
        return self.cluster.kubectl(f"--namespace={self.namespace}", *arguments, input_text=input_text)

    def get(self, *arguments: str) -> Object:
        """An object or a list of this namespace."""
        return self.cluster.kubectl.get(*arguments, f"--namespace={self.namespace}")

    def apply(self, manifest: Manifest) -> str:
        """Apply the manifest in this namespace and return its name."""
        manifest = {**manifest, "metadata": {**manifest["metadata"], "namespace": self.namespace}}
        self.kubectl("apply", "--filename=-", input_text=json.dumps(manifest))
        return str(manifest["metadata"]["name"])

    def claim(self, name: str) -> None:
        """Create a claim."""
        self.kubectl("apply", "--filename=-", input_text=json.dumps(claim(name, self.namespace)))

    def patch(self, name: str, **spec: object) -> None:
        """Change these fields of the job."""
        self.kubectl("patch", "qlorajob", name, "--type=merge", f"--patch={json.dumps({'spec': spec})}")

    def delete_pod(self, pod: Object, *options: str) -> None:
        """Ask the kubelet to end the pod."""
        self.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false", *options)

    def job(self, name: str) -> Object:
        """The QLoRAJob."""
        return self.get("qlorajob", name)

    def status(self, name: str) -> Object:
        """Its status."""
        return dict(self.job(name).get("status", {}))

    def condition(self, name: str, kind: str) -> Object:
        """The condition of that type; empty if it is not set."""
        return next((c for c in self.status(name).get("conditions", []) if c["type"] == kind), {})

    def wait(self, name: str, probe: Callable[[Object], object], *, what: str = "") -> Object:
        """The status as soon as `probe` holds for it. Fails if the job ends before."""

        def holds() -> Object:
            status = self.status(name)
            return status if probe(status) else {}

        try:
            return eventually(holds, seconds=SECONDS, what=what)
        except AssertionError as late:
            raise AssertionError(f"{late}\n{self.kubectl('describe', 'qlorajob', name)}") from late

    def wait_for_phase(self, name: str, *phases: str) -> Object:
        """The status as soon as the phase is one of these."""
        return self.wait(name, lambda s: s.get("phase") in phases, what=f"{name}: {' or '.join(phases)}")

    def wait_for_end(self, name: str) -> Object:
        """The status of the ended job."""
        return self.wait_for_phase(name, *ENDED)

    def succeed(self, name: str) -> Object:
        """The status of the job, which must have succeeded."""
        status = self.wait_for_end(name)
        assert status["phase"] == "Succeeded", self.kubectl("describe", "qlorajob", name)
        return status

    def require_rejected(self, name: str, reason: str, said: str) -> None:
        """`prepare` has failed for good, and its user reads why."""
        status = self.wait_for_end(name)
        assert status["phase"] == "Failed", status
        failed = self.condition(name, "Failed")
        assert failed["reason"] == reason
        assert said in failed["message"]
        assert failed["message"] in self.kubectl("describe", "qlorajob", name).replace("\n", " ")
        assert [job["metadata"]["name"] for job in self.children(name)] == [f"{name}-prepare-1"]
        assert self.condition(name, "Stalled")["status"] == "True"
        assert self.condition(name, "Succeeded")["status"] == "False"

    def sweep_succeeded(self, name: str) -> Object:
        """The status of the sweep, which must have succeeded."""

        def ended() -> Object | None:
            status = self.get("qlorasweep", name).get("status", {})
            return status if status.get("phase") in ENDED else None

        status = eventually(ended, seconds=SECONDS, every=2, what="the end of the sweep") or {}
        assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
        return status

    def children(self, name: str, kind: str = "jobs") -> list[Object]:
        """Jobs (or pods, …) that carry the job's label."""
        return list(self.get(kind, f"--selector=qlora.dev/job={name}")["items"])

    def running_pod(self, name: str, step: str) -> Object | None:
        """The step's pod whose container runs."""
        pods = self.get("pods", f"--selector=qlora.dev/job={name},qlora.dev/step={step}")["items"]
        running = [p for p in pods if p["status"]["phase"] == "Running" and "deletionTimestamp" not in p["metadata"]]
        return running[0] if running else None

    def started_pod(self, name: str, step: str) -> Object:
        """Wait for the step's pod whose container runs."""

        def running() -> Object | None:
            pod = self.running_pod(name, step)
            return pod if pod and pod["status"].get("podIP") else None

        return eventually(running, seconds=SECONDS, every=0.1, what=f"a running pod of {step}") or {}

    @contextmanager
    def stopped(self, name: str, step: str) -> Iterator[Object]:
        """The step's running pod, whose processes stand still."""
        pod = self.started_pod(name, step)
        assert signal_processes_of(pod, signal.SIGSTOP), "the pod has no process"
        try:
            yield pod
        finally:
            signal_processes_of(pod, signal.SIGCONT)

    @contextmanager
    def held(self, name: str, at: str = CHECKPOINT) -> Iterator[Object]:
        """The job's train pod, whose processes stand still from a line of its log on that matches `at`.

        So there is time to act, however fast the machine is. The status has its progress.
        """
        pod, kubectl = self.started_pod(name, "train"), self.cluster.kubectl
        logs: list[str | Path] = [kubectl.program, "--kubeconfig", kubectl.kubeconfig, "logs", "--follow"]
        logs += [f"--namespace={self.namespace}", pod["metadata"]["name"]]
        with subprocess.Popen(logs, stdout=subprocess.PIPE, text=True) as log:
            is_there = any(re.search(at, line) for line in log.stdout or ())
            signal_processes_of(pod, signal.SIGSTOP)
            log.kill()
        try:
            assert is_there, f"{name} has ended without {at}"
            self.wait(name, lambda status: status.get("progress", {}).get("loss"), what=f"progress of {name}")
            yield pod
        finally:
            signal_processes_of(pod, signal.SIGCONT)

    def held_until_asked(self, name: str, act: Callable[[Object], object]) -> Object:
        """Hold the job while `act` makes the kubelet end its train pod, which is returned."""
        with self.held(name) as pod:
            act(pod)
            eventually(lambda: is_asked_to_end(pod), every=0.1, what=f"SIGTERM for the pod of {name}")
        return pod

    @contextmanager
    def volume(self, name: str) -> Iterator[FilePod]:
        """A pod that sees the claim's files."""
        with file_pod(self.cluster.kubectl, self.namespace, name, self.cluster.images.trainer) as pod:
            yield pod

    def attempts(self, name: str) -> list[Object]:
        """Records of the job's train pods, from each one's begin."""
        workspace = self.status(name)["workspace"]
        with self.volume(workspace["claimName"]) as files:
            lines = files.run("cat", f"/volume/{workspace['path']}/records/attempts.jsonl").splitlines()
        return [json.loads(line) for line in lines]

    def adapter_sum(self, status: Object) -> str:
        """SHA-256 of the adapter's file on the volume."""
        name, _, folder = status["adapter"]["uri"].removeprefix("pvc://").partition("/")
        with self.volume(name) as pod:
            return pod.run("sha256sum", f"/volume/{folder}/adapter_model.safetensors").split()[0]


def tiny_job(name: str, *, steps: int = SHORT, **spec: object) -> Manifest:
    """A job over the tenant's inputs; `spec` replaces whole fields of the spec."""
    return {
        "apiVersion": "qlora.dev/v1beta1",
        "kind": "QLoRAJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"source": f"pvc://{INPUTS}/model"},
            "dataset": {
                "source": f"pvc://{INPUTS}/train.jsonl",
                "eval": {"source": f"pvc://{INPUTS}/held-out.jsonl"},
            },
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "training": {
                "maxSteps": steps,
                "gradientAccumulationSteps": 2,
                "learningRate": 5e-3,
                "maxSequenceLength": 128,
                "saveEverySteps": 20,
            },
            "workspace": {"size": "1Gi"},
            "resources": {"cpu": "500m", "memory": "3Gi"},
            **spec,
        },
    }


def tiny_sweep(name: str, **spec: object) -> Manifest:
    """A sweep over two learning rates of the tiny job."""
    return {
        "apiVersion": "qlora.dev/v1beta1",
        "kind": "QLoRASweep",
        "metadata": {"name": name},
        "spec": {"template": {"spec": tiny_job(name)["spec"]}, "grid": {"learningRate": [1e-5, 5e-3]}, **spec},
    }


def new_namespace(cluster: Cluster) -> str:
    """A fresh namespace that admits restricted pods only."""
    name = f"tenant-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("apply", "--filename=-", input_text=json.dumps(restricted_namespace(name)))
    return name
