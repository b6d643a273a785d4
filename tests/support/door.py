"""The door as a separate process with the chart's account and rights, and tenants with their keys."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from openai import OpenAI

from devcluster import toolchain
from devcluster.addresses import free_port
from devcluster.controlplane import ControlPlane
from devcluster.layout import from_environment
from qlora_api.artifact_status import AdapterStatus
from qlora_api.status import Condition, DatasetStatus, ProgressStatus, QLoRAJobStatus
from tests.support.chart.rendered import NAMESPACE, Helm, Object, only
from tests.support.waiting import eventually

ACCOUNT = "qlora-operator-door"
AUDIENCE = "qlora-door"
MODEL = "smollm2-135m"
TEMPLATE: Object = {
    "model": {"source": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
    "training": {"learningRate": 0.002},
}
ROWS = b'{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}\n' * 10
LARGE = (json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}) + "\n").encode() * 2000
NOW, SHA256 = "2026-01-02T03:04:05Z", "ab" * 32
_RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")


@dataclass(frozen=True)
class Tenant:
    """A ServiceAccount that may use QLoRAJobs and ConfigMaps in its namespace."""

    plane: ControlPlane
    namespace: str
    account: str = "trainer"

    def key(self, *options: str) -> str:
        """A new token of the door's audience, or with these options."""
        where = f"--namespace={self.namespace}"
        return self.plane.kubectl(
            "create", "token", self.account, where, *(options or (f"--audience={AUDIENCE}",))
        ).strip()


def add_tenant(plane: ControlPlane, namespace: str) -> Tenant:
    """Create a namespace with a tenant."""
    tenant = Tenant(plane, namespace)
    metadata = {"name": tenant.account, "namespace": namespace}
    rbac = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs"], "verbs": ["*"]},
        {"apiGroups": [""], "resources": ["configmaps", "secrets"], "verbs": ["*"]},
    ]
    documents = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": metadata, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": tenant.account},
            "subjects": [{"kind": "ServiceAccount", **metadata}],
        },
    ]
    plane.kubectl.apply(yaml.safe_dump_all(documents))
    return tenant


def upload(client: OpenAI, rows: bytes = ROWS) -> str:
    """Upload rows, and return the id of the file."""
    return client.files.create(file=("train.jsonl", rows), purpose="fine-tune").id


def end_well(plane: ControlPlane, namespace: str, name: str) -> None:
    """Write the status that the operator would."""
    adapter = AdapterStatus(
        uri="pvc://a/b",
        sha256=SHA256,
        size_bytes=1,
        base_model="hf://a/b",
        base_revision="c",
        rank=16,
        quantization="nf4",
        step=8,
    )
    status = QLoRAJobStatus(
        phase="Succeeded",
        conditions=(
            Condition(type="Prepared", status="True", reason="Done", message="ready", last_transition_time=NOW),
            Condition(type="Succeeded", status="True", reason="Succeeded", message="done", last_transition_time=NOW),
        ),
        dataset=DatasetStatus(format="chat", rows=10, used_rows=10, tokens=100),
        progress=ProgressStatus(step=8, total_steps=8, percent=100, epoch=2.0, loss=1.5, eval_loss=1.25),
        history="step,train_loss,valid_loss\n4,2.5,\n8,1.5,1.25",
        adapter=adapter,
        completion_time=NOW,
    )
    write_status(plane, namespace, name, status)


def write_status(plane: ControlPlane, namespace: str, name: str, status: QLoRAJobStatus) -> None:
    """Write the status of a job."""
    change = [{"op": "add", "path": "/status", "value": status.dump()}]
    target = ("patch", f"qlorajob/{name}", f"--namespace={namespace}", "--subresource=status", "--type=json")
    plane.kubectl(*target, f"--patch={json.dumps(change)}")


def door_objects(settings: Mapping[str, Any]) -> list[Object]:
    """The objects of the chart for the door."""
    helm = Helm(toolchain.built(from_environment(), ["helm"])["helm"])
    rendered = helm.template({"door": {"enabled": True, "settings": dict(settings)}})
    return [each for each in rendered if each["metadata"]["name"] == ACCOUNT]


@dataclass
class DoorProcess:
    """A running door."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int
    probe_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str, **options: Any) -> OpenAI:
        """OpenAI's client, which checks each answer against the models of the client."""
        return OpenAI(base_url=self.url, api_key=key, _strict_response_validation=True, **options)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of an answer to a probe or scrape; 0 without one."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.probe_port}{path}", timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def kill(self) -> None:
        """End it without any notice."""
        self.process.kill()
        self.process.wait()


@contextmanager
def running_door(
    folder: Path, plane: ControlPlane, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[DoorProcess]:
    """Install the chart's objects for the door, and start it with their account."""
    objects = door_objects(settings)
    plane.kubectl.apply(yaml.safe_dump({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))
    plane.kubectl.apply(yaml.safe_dump_all([each for each in objects if each["kind"] in _RIGHTS]))
    template = only(objects, "Deployment")["spec"]["template"]
    stated = yaml.safe_load(template["metadata"]["annotations"]["qlora.dev/settings"])
    with door_process(folder, _kubeconfig(folder, plane), stated, environment) as door:
        yield door


@contextmanager
def door_process(
    folder: Path, kubeconfig: Path, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[DoorProcess]:
    """Run a door with these settings, on free ports."""
    folder.mkdir(parents=True, exist_ok=True)
    port, probe_port = free_port(), free_port()
    path = folder / f"door-{port}.yaml"
    path.write_text(yaml.safe_dump({**settings, "port": port, "probePort": probe_port, "metricsPort": probe_port}))
    log = folder / f"door-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "qlora_door", "--settings", str(path)],
            env={**os.environ, "KUBECONFIG": str(kubeconfig), **(environment or {})},
            stdout=output,
            stderr=output,
        )
    door = DoorProcess(process, log, port, probe_port)
    try:
        eventually(lambda: _is_ready(door), seconds=60, every=0.1, what="the door")
        yield door
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _is_ready(door: DoorProcess) -> bool:
    assert door.process.poll() is None, door.log.read_text()[-2000:]
    return "serving" in door.log.read_text() and door.get("/readyz")[0] == 200


def _kubeconfig(folder: Path, plane: ControlPlane) -> Path:
    """A kubeconfig with the token of the door's account, as its pod has it."""
    folder.mkdir(parents=True, exist_ok=True)
    kubeconfig = yaml.safe_load(plane.kubeconfig.read_text())
    token = plane.kubectl("create", "token", ACCOUNT, f"--namespace={NAMESPACE}").strip()
    kubeconfig["users"][0]["user"] = {"token": token}
    file = folder / "door.kubeconfig"
    file.write_text(yaml.safe_dump(kubeconfig))
    return file
