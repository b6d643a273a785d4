"""Jobs whose status, pods, logs and Events a test reports, in place of the operator and a kubelet.

The API server is real, and so are its authorization rules. It reads logs from the kubelet of a pod's node, which is a
server of this process.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from devcluster.controlplane import ControlPlane
from qlora_api.contract import TRAINER_CONTAINER, ProgressRecord, encode_record
from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, STEP_LABEL
from tests.support.cluster.kubelet import add_node, container_status, report_pod, serve_kubelet

_BEGIN = datetime(2026, 1, 2, 3, 4, 5, 250_000, tzinfo=UTC)

Object = dict[str, Any]


@dataclass
class Log:
    """A container's output. Each line is half a second after the one before."""

    lines: list[str] = field(default_factory=list)
    ended: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, *lines: str) -> None:
        with self.changed:
            self.lines += lines
            self.changed.notify_all()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify_all()


@dataclass
class Kubelet:
    """Serves logs as a kubelet does, by pod."""

    logs: dict[str, Log] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    """Pods whose containers the runtime no longer knows."""
    port: int = 0
    connections: set[Any] = field(default_factory=set)

    def cut(self) -> None:
        """End each answer where it is."""
        for connection in tuple(self.connections):
            connection.shutdown(2)


@contextmanager
def kubelet(folder: Path) -> Iterator[Kubelet]:
    """Serve until the block ends; `folder` gets the certificate, which is not checked."""
    served = Kubelet()
    with serve_kubelet(_Handler, folder, kubelet=served) as served.port:
        yield served
        served.cut()


class _Handler(BaseHTTPRequestHandler):
    kubelet: Kubelet

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        _, kind, _namespace, pod, container = address.path.split("/")
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        assert (kind, container) == ("containerLogs", TRAINER_CONTAINER)
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.kubelet.connections.add(self.connection)
        try:
            if pod in self.kubelet.lost:
                self._send(b"unable to retrieve container logs")
            else:
                self._write(self.kubelet.logs[pod], query)
            self._send(b"")
        except OSError:
            self.close_connection = True
        finally:
            self.kubelet.connections.discard(self.connection)

    def _write(self, log: Log, query: dict[str, str]) -> None:
        since = datetime.fromisoformat(query["sinceTime"]) if "sinceTime" in query else _BEGIN - timedelta(days=1)
        number = 0
        while True:
            with log.changed:
                while "follow" in query and len(log.lines) == number and not log.ended:
                    log.changed.wait(timeout=1)
                lines, ended = log.lines[number:], log.ended
            for line in lines:
                time = _BEGIN + timedelta(seconds=number / 2)
                number += 1
                if time >= since:
                    self._send(f"{time:%Y-%m-%dT%H:%M:%S.%f}000Z {line}\n".encode())
            if "follow" not in query or (ended and not lines):
                return

    def _send(self, part: bytes) -> None:
        """A chunk of the answer; an empty one ends it."""
        self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))


@dataclass(frozen=True)
class Reported:
    """A namespace with its jobs, as a reader of their report sees it."""

    plane: ControlPlane
    kubelet: Kubelet
    namespace: str

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.plane.kubectl(*arguments, f"--namespace={self.namespace}", **options)

    def create(self, body: Object) -> Object:
        created: Object = json.loads(
            self.kubectl("create", "--filename=-", "--output=json", input_text=json.dumps(body))
        )
        return created

    def job(self, name: str, spec: Object | None = None, **labels: str) -> Object:
        """A new job."""
        content = {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **(spec or {})}
        metadata = {"name": name, "labels": labels}
        return self.create(
            {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": metadata, "spec": content}
        )

    def stored(self, name: str) -> Object:
        return self.plane.kubectl.get("qlorajob", name, f"--namespace={self.namespace}")

    def report(self, name: str, phase: str, message: str = "", **fields: Any) -> None:
        """The status of the job, as the operator would write it."""
        kind = phase if phase in ("Failed", "Suspended") else "Succeeded"
        condition = {
            "type": kind,
            "status": "True" if phase in ("Failed", "Suspended", "Succeeded") else "False",
            "reason": phase,
            "message": message,
            "lastTransitionTime": "2026-01-02T03:04:05Z",
        }
        status = {"phase": phase, "conditions": [condition], **fields}
        patch = f"--patch={json.dumps({'status': status})}"
        self.kubectl("patch", "qlorajob", name, "--subresource=status", "--type=merge", patch)

    def event(self, name: str, reason: str, message: str, kind: str = "Normal") -> None:
        job = self.stored(name)
        about = {"apiVersion": job["apiVersion"], "kind": "QLoRAJob", "name": name, "uid": job["metadata"]["uid"]}
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"generateName": f"{name}."},
                "involvedObject": about | {"namespace": self.namespace},
                "reason": reason,
                "message": message,
                "type": kind,
                "firstTimestamp": now,
                "lastTimestamp": now,
            }
        )

    def pod(self, job: Object, name: str, step: str, lines: tuple[str, ...] = ()) -> Log:
        """A pod of the job's step that has no log yet; `lines` are the first of it."""
        labels = {JOB_LABEL: job["metadata"]["name"], JOB_UID_LABEL: job["metadata"]["uid"], STEP_LABEL: step}
        containers = [{"name": each, "image": "none"} for each in ("mesh", TRAINER_CONTAINER)]
        spec = {"nodeName": "reported", "containers": containers, "automountServiceAccountToken": False}
        self.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec})
        log = self.kubelet.logs[name] = Log(list(lines))
        return log

    def pod_uid(self, name: str) -> str:
        return self.kubectl("get", "pod", name, "--output=jsonpath={.metadata.uid}")

    def wait(self, pod: str, reason: str, message: str) -> None:
        """The pod waits, as the kubelet reports it."""
        self._report_pod(pod, "Pending", {"waiting": {"reason": reason, "message": message}})

    def start(self, pod: str) -> None:
        self._report_pod(pod, "Running", {"running": {"startedAt": "2026-01-02T03:04:05Z"}})

    def end(self, pod: str, code: int = 0) -> None:
        self.kubelet.logs[pod].end()
        self._report_pod(pod, "Failed" if code else "Succeeded", {"terminated": {"exitCode": code}})

    def _report_pod(self, pod: str, phase: str, state: Object) -> None:
        mesh, trainer = container_status({"running": {}}, "mesh"), container_status(state)
        report_pod(self.plane, self.namespace, pod, phase, mesh, trainer)

    def kubeconfig(self, folder: Path, user: str, *rules: Object, server: str = "") -> Path:
        """Return a kubeconfig with these rights in the namespace. `server` is a proxy."""
        self.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": user}})
        group = "rbac.authorization.k8s.io"
        role = {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": user}, "rules": list(rules)}
        self.create(role)
        subject = {"kind": "ServiceAccount", "name": user, "namespace": self.namespace}
        reference = {"apiGroup": group, "kind": "Role", "name": user}
        binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": {"name": user}}
        self.create(binding | {"roleRef": reference, "subjects": [subject]})
        document = yaml.safe_load(self.plane.kubeconfig.read_text())
        document["users"][0]["user"] = {"token": self.kubectl("create", "token", user).strip()}
        document["contexts"][0]["context"]["namespace"] = self.namespace
        if server:
            document["clusters"][0]["cluster"] = {"server": server}
        file = folder / f"{user}.kubeconfig"
        file.write_text(yaml.safe_dump(document))
        return file


@contextmanager
def reported(plane: ControlPlane, folder: Path, namespace: str) -> Iterator[Reported]:
    """A new namespace of the control plane, with a node whose kubelet this is."""
    with kubelet(folder) as served:
        plane.kubectl("create", "namespace", namespace)
        # Without the controllers no process creates it.
        plane.kubectl("create", "serviceaccount", "default", f"--namespace={namespace}")
        add_node(plane, "reported", served.port)
        yield Reported(plane, served, namespace)


def progress(job: Object, pod_uid: str, step: int, loss: float, total: int = 100) -> str:
    """A line of the trainer's log."""
    return encode_record(
        ProgressRecord(
            job_uid=job["metadata"]["uid"],
            pod_uid=pod_uid,
            step="train",
            time="2026-01-02T03:04:05Z",
            activity="training",
            training_step=step,
            total_steps=total,
            loss=loss,
            tokens_per_second=850,
            remaining_seconds=(total - step) * 60,
        )
    )
