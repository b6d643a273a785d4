"""Claims and the files on them, copied to and from them through a pod, as any user of a cluster can."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.kubectl import Kubectl


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
