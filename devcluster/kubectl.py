"""Sends requests to the API server through kubectl, and copies files to and from volumes."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.processes import run


@dataclass(frozen=True)
class Kubectl:
    """kubectl with one kubeconfig. Every method raises ClusterError with its message."""

    program: Path
    kubeconfig: Path

    def __call__(self, *arguments: str, input_text: str | None = None) -> str:
        return run([self.program, "--kubeconfig", self.kubeconfig, *arguments], input_text=input_text, seconds=120)

    def get(self, *arguments: str) -> dict[str, Any]:
        """One object, or a list of objects, as parsed JSON."""
        answer = self("get", *arguments, "--output=json")
        return dict(json.loads(answer))

    def apply(self, manifest: str) -> None:
        """Server-side apply of a YAML stream."""
        self("apply", "--server-side", "--force-conflicts", "--filename=-", input_text=manifest)

    def patch_status(self, target: str, operations: Sequence[dict[str, Any]]) -> None:
        """JSON patch (RFC 6902) of an object's status."""
        self("patch", target, "--subresource=status", "--type=json", f"--patch={json.dumps(list(operations))}")


@dataclass(frozen=True)
class FilePod:
    """A pod that has a claim mounted, to copy files to and from it as any user can."""

    kubectl: Kubectl
    namespace: str
    name: str

    def put(self, source: Path, target: str) -> None:
        """Copy a file or folder to the path on the claim, and replace an earlier one."""
        self._run("exec", self.name, "--", "rm", "-rf", f"/volume/{target}")
        self._run("cp", "--no-preserve", str(source), f"{self.name}:/volume/{target}")

    def get(self, source: str, target: Path) -> None:
        """Copy a file or folder from the path on the claim."""
        self._run("cp", f"{self.name}:/volume/{source}", str(target))

    def run(self, *command: str) -> str:
        """The output of a command in the pod."""
        return self._run("exec", self.name, "--", *command)

    def _run(self, *arguments: str) -> str:
        return self.kubectl(f"--namespace={self.namespace}", *arguments)


@contextmanager
def file_pod(kubectl: Kubectl, namespace: str, claim: str, image: str) -> Iterator[FilePod]:
    """A restricted pod with the claim at /volume, deleted at the end."""
    name = f"files-{claim}"[:60]
    container = {
        "name": "files",
        "image": image,
        "command": ["sleep", "3600"],
        "volumeMounts": [{"name": "volume", "mountPath": "/volume"}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "containers": [container],
            "volumes": [{"name": "volume", "persistentVolumeClaim": {"claimName": claim}}],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "fsGroup": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": 0,
        },
    }
    kubectl("apply", "--filename=-", input_text=json.dumps(pod))
    try:
        kubectl("wait", f"--namespace={namespace}", "--for=condition=Ready", f"pod/{name}", "--timeout=100s")
        yield FilePod(kubectl, namespace, name)
    finally:
        kubectl("delete", "pod", name, f"--namespace={namespace}", "--ignore-not-found")


def claim(name: str, namespace: str, size: str = "1Gi") -> dict[str, Any]:
    """A PersistentVolumeClaim of the cluster's default storage class."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    }
