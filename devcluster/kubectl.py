"""Sends requests to the API server through kubectl."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.processes import run


@dataclass(frozen=True)
class Kubectl:
    """kubectl with one kubeconfig. Every method raises ClusterError with kubectl's message."""

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
