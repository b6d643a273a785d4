"""Does a kubelet's part for the API server: a node, a server behind its port, and the status of pods."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from devcluster.addresses import LOOPBACK
from devcluster.certificates import Authority
from devcluster.controlplane import ControlPlane
from qlora_api.contract import TRAINER_CONTAINER

Object = dict[str, Any]


@contextmanager
def serve_kubelet(handler: type[BaseHTTPRequestHandler], folder: Path, **attributes: object) -> Iterator[int]:
    """Serve the handler with these attributes. `folder` gets the certificate."""
    # Standard error is the test's.
    quiet = {"log_message": lambda *_: None, "protocol_version": "HTTP/1.1"}
    server = ThreadingHTTPServer((LOOPBACK, 0), type("Handler", (handler,), quiet | attributes))
    server.daemon_threads, server.block_on_close = True, False
    certificate, key = Authority(datetime.now(UTC)).issue("kubelet", serves=[LOOPBACK]).write(folder, "kubelet")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def add_node(plane: ControlPlane, name: str, port: int) -> None:
    """Register the node, whose kubelet answers at the port."""
    plane.kubectl.apply(json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}))
    status = {
        "addresses": [{"type": "InternalIP", "address": LOOPBACK}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}},
    }
    patch = f"--patch={json.dumps({'status': status})}"
    plane.kubectl("patch", "node", name, "--subresource=status", "--type=merge", patch)


def bind(plane: ControlPlane, namespace: str, pod: str, node: str) -> None:
    """Give the pod the node, as the scheduler does."""
    target = {"apiVersion": "v1", "kind": "Node", "name": node}
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}, "target": target}
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/binding"
    plane.kubectl("create", "--raw", path, "--filename=-", input_text=json.dumps(binding))


def container_status(state: Object, name: str = TRAINER_CONTAINER) -> Object:
    """The status of a container in that state."""
    return {"name": name, "image": "", "imageID": "", "ready": False, "restartCount": 0, "state": state}


def report_pod(plane: ControlPlane, namespace: str, pod: str, phase: str, *containers: Object, **fields: Any) -> None:
    """Write the status of the pod."""
    status = {"phase": phase, "containerStatuses": containers, **fields}
    options = ("--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}")
    plane.kubectl("patch", "pod", pod, f"--namespace={namespace}", *options)


def terminated(code: int, message: str, time: str) -> Object:
    """The state of a container that has ended with that code and termination message."""
    reason = "Error" if code else "Completed"
    ended = {"exitCode": code, "reason": reason, "message": message, "startedAt": time, "finishedAt": time}
    return {"terminated": ended}
