"""A node that runs the pods of users who read claims: a folder of this machine is the claim.

The API server is real, and so is the command that it passes on: it runs here, as in the pod, and its output goes back
through the channels of a WebSocket (v4.channel.k8s.io), as a kubelet sends it.
"""

import base64
import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from tests.support.cluster.kubelet import (
    add_node,
    bind,
    container_status,
    report_pod,
    serve_kubelet,
)
from tests.support.waiting import eventually

NODE = "claims"
_PROTOCOL = "v4.channel.k8s.io"
_ACCEPT = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""By which a server shows that it has understood the request (RFC 6455, section 1.3)."""
_OUTPUT, _ERRORS, _RESULT = 1, 2, 3
_BINARY, _CLOSE = 0x82, 0x88

Object = dict[str, Any]


@dataclass
class ClaimNode:
    """The node; `claims` has the folder of each claim."""

    plane: ControlPlane
    namespace: str
    claims: dict[str, Path] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)
    """What has been run in pods."""
    pods: list[Object] = field(default_factory=list)
    """The pods that have been started, as they were created."""
    hold: bool = False
    """Start no pod."""
    instead: list[str] | None = None
    """Run this instead of what is asked for."""
    port: int = 0

    def readers(self) -> list[Object]:
        """The current pods of readers."""
        selector = "--selector=app.kubernetes.io/name=qlora-reader"
        return list(self.plane.kubectl.get("pods", f"--namespace={self.namespace}", selector)["items"])

    def start(self, pod: Object) -> None:
        """The pod gets the node and runs."""
        name = pod["metadata"]["name"]
        bind(self.plane, self.namespace, name, NODE)
        (container,) = pod["spec"]["containers"]
        running = container_status({"running": {"startedAt": "2026-01-02T03:04:05Z"}}, container["name"])
        # Before the status: a client that sees the pod run executes a command in it immediately.
        self.pods.append(pod)
        report_pod(self.plane, self.namespace, name, "Running", running | {"ready": True})

    def folder(self, name: str) -> Path:
        """The folder of the claim that the pod has mounted."""
        (pod,) = [each for each in self.pods if each["metadata"]["name"] == name]
        (volume,) = pod["spec"]["volumes"]
        return self.claims[volume["persistentVolumeClaim"]["claimName"]]


@contextmanager
def claim_node(plane: ControlPlane, folder: Path, namespace: str) -> Iterator[ClaimNode]:
    """Run the node of the namespace's readers. `folder` gets its certificate."""
    node, ended = ClaimNode(plane, namespace), threading.Event()
    with serve_kubelet(_Handler, folder, node=node) as node.port:
        thread = threading.Thread(target=_start_readers, args=(node, ended), daemon=True)
        add_node(plane, NODE, node.port)
        thread.start()
        try:
            yield node
            # Pods that are bound to a node end once its kubelet has reported it.
            eventually(lambda: not _remove_deleted(node), what="readers that are gone")
        finally:
            ended.set()
            thread.join(timeout=120)
            plane.kubectl("delete", "node", NODE)


def _start_readers(node: ClaimNode, ended: threading.Event) -> None:
    started: set[str] = set()
    while not ended.wait(0.2):
        try:
            _remove_deleted(node)
            for pod in () if node.hold else node.readers():
                if pod["metadata"]["uid"] not in started:
                    started.add(pod["metadata"]["uid"])
                    node.start(pod)
        except ClusterError:
            # It has been deleted in between.
            continue


def _remove_deleted(node: ClaimNode) -> list[Object]:
    """Remove the pods that are being deleted, as a kubelet does once they have ended."""
    ending = [pod for pod in node.readers() if "deletionTimestamp" in pod["metadata"]]
    for pod in ending:
        options = ("--grace-period=0", "--force", "--ignore-not-found", "--wait=false")
        node.plane.kubectl("delete", "pod", pod["metadata"]["name"], f"--namespace={node.namespace}", *options)
    return ending


class _Handler(BaseHTTPRequestHandler):
    node: ClaimNode

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        _, kind, _namespace, pod, _container = address.path.split("/")
        assert kind == "exec"
        command = parse_qs(address.query)["command"]
        self.node.commands.append(command)
        self._accept()
        root = str(self.node.folder(pod))
        here = [word.replace("/volume", root) for word in self.node.instead or command]
        ended = subprocess.run(here, capture_output=True)
        for channel, content in ((_OUTPUT, ended.stdout), (_ERRORS, ended.stderr)):
            for start in range(0, len(content), 30_000):
                self._send(_BINARY, bytes([channel]) + content[start : start + 30_000])
        causes = [{"reason": "ExitCode", "message": str(ended.returncode)}]
        failure = {"status": "Failure", "message": "non-zero exit code", "details": {"causes": causes}}
        self._send(
            _BINARY, bytes([_RESULT]) + json.dumps(failure if ended.returncode else {"status": "Success"}).encode()
        )
        self._send(_CLOSE, b"")
        self.close_connection = True

    def _accept(self) -> None:
        key = self.headers["Sec-WebSocket-Key"].encode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + _ACCEPT).digest()).decode())
        self.send_header("Sec-WebSocket-Protocol", _PROTOCOL)
        self.end_headers()

    def _send(self, kind: int, content: bytes) -> None:
        size = len(content)
        length = bytes([size]) if size < 126 else b"\x7e" + size.to_bytes(2, "big")
        self.wfile.write(bytes([kind]) + length + content)
