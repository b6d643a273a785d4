"""Starts Kubeflow Trainer and JobSet with a control plane, for a comparison: both as released, with their webhooks.

They run on this machine and not in pods, so the work of a cluster for their pods is done here: certificates come from
their Secrets as files, and the API server finds their webhooks on this machine.
"""

import base64
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.operator.objects import NAMESPACE
from benchmarks.operator.site import program
from devcluster import toolchain
from devcluster.addresses import free_port
from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from devcluster.layout import from_environment

JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
TRAIN_JOBS = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
# Trainer expects the certificate's file there, in whatever folder it then reads it from.
_CERTIFICATES = Path("/tmp/k8s-webhook-server/serving-certs")
_RUNTIME = "torch-distributed"
_START_SECONDS = 90
_LIMITS_OF_JOBSET = ("--kube-api-qps=500", "--kube-api-burst=500")

Object = dict[str, Any]


@dataclass(frozen=True)
class _Controller:
    """One of the two programs, with names of its namespace, Service and Secret."""

    tool: str
    kustomization: tuple[str, ...]
    namespace: str
    service: str
    secret: str


_TRAINER = _Controller(
    "kubeflow-trainer",
    ("crds", "webhook"),
    "kubeflow-system",
    "kubeflow-trainer-controller-manager",
    "kubeflow-trainer-webhook-cert",
)
_JOBSET = _Controller("jobset", ("default",), "jobset-system", "jobset-webhook-service", "jobset-webhook-server-cert")


def train_job(number: int) -> Object:
    """A job with the required fields."""
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": f"job-{number}", "namespace": NAMESPACE},
        "spec": {"runtimeRef": {"name": _RUNTIME}},
    }


def build() -> None:
    """Build both, unless they have been built before."""
    toolchain.build(from_environment(), tuple(toolchain.BENCHMARK_TOOLS))


@contextmanager
def kubeflow_trainer(plane: ControlPlane, *, unlimited: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], ...]]:
    """Both programs with their defaults, and the runtime that Trainer ships for PyTorch, during the block.

    `unlimited`: Trainer's client, which takes 20 requests per second, takes as many as JobSet's.
    """
    ports = {_TRAINER: free_port(), _JOBSET: free_port()}
    with tempfile.TemporaryDirectory(prefix="qlora-kubeflow-") as name, ExitStack() as stack:
        folder = Path(name)
        for controller, port in ports.items():
            _install(plane, controller, port)
        started = (
            stack.enter_context(program(plane, _jobset_command(folder, ports[_JOBSET]))),
            stack.enter_context(program(plane, _trainer_command(ports[_TRAINER], unlimited), TMPDIR=str(folder))),
        )
        stack.enter_context(_mounted(plane, folder))
        _install_runtime(plane)
        yield started


def _trainer_command(port: int, unlimited: bool) -> list[str | Path]:
    tool = f"{_TRAINER.tool}-unlimited" if unlimited else _TRAINER.tool
    program = toolchain.built(from_environment(), [tool])[tool]
    options = [f"--webhook-server-port={port}", f"--health-probe-bind-address=127.0.0.1:{free_port()}"]
    return [program, *options, *(_LIMITS_OF_JOBSET if unlimited else ())]


def _jobset_command(folder: Path, port: int) -> list[str | Path]:
    program = toolchain.built(from_environment(), [_JOBSET.tool])[_JOBSET.tool]
    configuration = {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "webhook": {"host": "127.0.0.1", "port": port, "certDir": str(folder / _JOBSET.tool)},
    }
    (folder / "jobset.yaml").write_text(yaml.safe_dump(configuration))
    probe = f"--health-probe-bind-address=127.0.0.1:{free_port()}"
    return [program, f"--config={folder / 'jobset.yaml'}", probe, "--metrics-bind-address=0"]


def _install(plane: ControlPlane, controller: _Controller, port: int) -> None:
    """The definitions and the webhooks, which are found on this machine."""
    manifests = toolchain.manifests(from_environment(), controller.tool)
    bodies: list[Object] = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": controller.namespace}}]
    for folder in controller.kustomization:
        bodies += yaml.safe_load_all(plane.kubectl("kustomize", str(manifests / folder)))
    where = {"name": controller.service, "namespace": controller.namespace}
    kept = []
    for body in bodies:
        for hook in body.get("webhooks", ()):
            hook["clientConfig"]["service"] |= where | {"port": port}
        if body["kind"] in ("Namespace", "CustomResourceDefinition") or "webhooks" in body:
            kept.append(body)
    metadata = {"name": controller.secret, "namespace": controller.namespace}
    kept += [
        {"apiVersion": "v1", "kind": "Secret", "metadata": metadata},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": where,
            "spec": {"type": "ExternalName", "externalName": "localhost"},
        },
    ]
    plane.kubectl("apply", "--server-side", "--filename=-", input_text=yaml.safe_dump_all(kept))


@contextmanager
def _mounted(plane: ControlPlane, folder: Path) -> Iterator[None]:
    """Write the certificates to files once they exist, as the kubelet does."""
    folders = {_JOBSET: folder / _JOBSET.tool, _TRAINER: folder / "k8s-webhook-server" / "serving-certs"}
    for controller, path in folders.items():
        path.mkdir(parents=True)
        for name, content in _secret(plane, controller).items():
            (path / name).write_bytes(content)
    # It only has to exist.
    _CERTIFICATES.mkdir(parents=True)
    certificate = _CERTIFICATES / "tls.crt"
    try:
        certificate.touch()
        yield
    finally:
        certificate.unlink()
        _CERTIFICATES.rmdir()
        _CERTIFICATES.parent.rmdir()


def _secret(plane: ControlPlane, controller: _Controller) -> dict[str, bytes]:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        data = plane.kubectl.get("secret", controller.secret, f"--namespace={controller.namespace}").get("data", {})
        if "tls.crt" in data:
            return {name: base64.b64decode(content) for name, content in data.items()}
        time.sleep(0.2)
    raise TimeoutError(f"{controller.tool} has made no certificate after {_START_SECONDS} s")


def _install_runtime(plane: ControlPlane) -> None:
    """Install the runtime once the webhooks answer, and a TrainJob as a trial."""
    manifests = toolchain.manifests(from_environment(), _TRAINER.tool)
    runtime = (manifests / "runtimes" / "torch_distributed.yaml").read_text()
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            plane.kubectl.apply(runtime)
            plane.kubectl("create", "--dry-run=server", "--filename=-", input_text=json.dumps(train_job(0)))
        except ClusterError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return
