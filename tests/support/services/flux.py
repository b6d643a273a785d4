"""Flux's kustomize-controller with an API server; sources are the test server's archives."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from devcluster import toolchain
from devcluster.addresses import free_ports
from devcluster.kubectl import Kubectl
from devcluster.layout import from_environment
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
FLUX = ROOT / "gitops" / "flux"
NAMESPACE = "flux-system"
_GROUP = "source.toolkit.fluxcd.io"
_SOURCES = {
    "ExternalArtifact": "externalartifacts",
    "GitRepository": "gitrepositories",
    "OCIRepository": "ocirepositories",
    "Bucket": "buckets",
}
_TIME = "2026-01-02T03:04:05Z"


class Flux:
    """Actions of an administrator of Flux."""

    def __init__(self, kubectl: Kubectl, folder: Path, address: str) -> None:
        self.kubectl = kubectl
        self._folder, self._address = folder, address
        self._requests = 0

    def publish(self, name: str, manifests: Sequence[dict[str, Any]]) -> str:
        """Make a revision of the source with these manifests in `jobs`; returns it."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w:gz") as tar:
            content = yaml.safe_dump_all(manifests).encode()
            entry = tarfile.TarInfo("jobs/jobs.yaml")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        digest = hashlib.sha256(archive.getvalue()).hexdigest()
        file = f"{name}-{digest}.tar.gz"
        (self._folder / file).write_bytes(archive.getvalue())
        revision = f"latest@sha256:{digest}"
        self._apply({"apiVersion": f"{_GROUP}/v1", "kind": "ExternalArtifact", "metadata": _in_flux(name), "spec": {}})
        artifact = {
            "path": file,
            "url": f"{self._address}/{file}",
            "revision": revision,
            "digest": f"sha256:{digest}",
            "lastUpdateTime": _TIME,
            "size": len(archive.getvalue()),
        }
        ready = {"type": "Ready", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": _TIME}
        self.kubectl(
            "patch",
            "externalartifact",
            name,
            f"--namespace={NAMESPACE}",
            "--subresource=status",
            "--type=merge",
            f"--patch={json.dumps({'status': {'artifact': artifact, 'conditions': [ready]}})}",
        )
        return revision

    def deploy(self, name: str, file: str) -> None:
        """The shipped Kustomization, with the source of that name in place of the user's."""
        manifest = yaml.safe_load((FLUX / file).read_text())
        manifest["metadata"] = _in_flux(name)
        manifest["spec"]["sourceRef"] = {"kind": "ExternalArtifact", "name": name}
        self._apply(manifest)

    def reconcile(self, name: str) -> None:
        """Wait for a pass that begins after this call, as the `flux` command does."""
        self._requests += 1
        wanted = f"request-{self._requests}"
        request = f"reconcile.fluxcd.io/requestedAt={wanted}"
        self.kubectl("annotate", "kustomization", name, f"--namespace={NAMESPACE}", "--overwrite", request)

        def handled() -> bool:
            return bool(self._get(name)["status"].get("lastHandledReconcileAt") == wanted)

        eventually(handled, seconds=60, every=0.2, what=f"a reconciliation of {name}")

    def ready(self, name: str) -> tuple[str, str, str]:
        """Value, reason and message of the condition Ready; empty before the first pass."""
        for condition in self._get(name).get("status", {}).get("conditions", ()):
            if condition["type"] == "Ready":
                return condition["status"], condition["reason"], condition["message"]
        return "", "", ""

    def wait_for_ready(self, name: str, value: str, reason: str) -> str:
        """The message, once Ready has the value and reason."""

        def reached() -> tuple[str, str, str] | None:
            found = self.ready(name)
            return found if found[:2] == (value, reason) else None

        return (eventually(reached, seconds=90, every=0.2, what=f"{name} {value} {reason}") or ("", "", ""))[2]

    def wait_for_revision(self, name: str, revision: str) -> None:
        """Until the revision has been applied."""

        def applied() -> bool:
            return bool(self._get(name)["status"].get("lastAppliedRevision") == revision)

        eventually(applied, seconds=90, every=0.2, what=f"{name} at {revision}")

    def remove(self, name: str) -> None:
        """Delete the Kustomization, and with it the objects that it has applied."""
        self.kubectl("delete", "kustomization", name, f"--namespace={NAMESPACE}", "--timeout=60s")

    def _get(self, name: str) -> dict[str, Any]:
        return self.kubectl.get("kustomization", name, f"--namespace={NAMESPACE}")

    def _apply(self, manifest: dict[str, Any]) -> None:
        self.kubectl.apply(json.dumps(manifest))


def _in_flux(name: str) -> dict[str, str]:
    return {"name": name, "namespace": NAMESPACE}


def _source_definition(kind: str, plural: str) -> dict[str, Any]:
    """Define a kind of source without checks, as the controller watches all of them."""
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{_GROUP}"},
        "spec": {
            "group": _GROUP,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower(), "listKind": f"{kind}List"},
            "versions": [version | {"schema": {"openAPIV3Schema": schema}}],
        },
    }


def _is_served(kubectl: Kubectl, plural: str) -> bool:
    kubectl("get", plural)
    return True


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        pass


@contextmanager
def kustomize_controller(kubectl: Kubectl, folder: Path, *features: str) -> Iterator[Flux]:
    """The controller with these feature gates; `folder` gets its log and the archives."""
    layout = from_environment()
    program = toolchain.built(layout, ["kustomize-controller"])["kustomize-controller"]
    for file in toolchain.manifests(layout, "kustomize-controller").glob("*.yaml"):
        kubectl.apply(file.read_text())
    for kind, plural in _SOURCES.items():
        kubectl.apply(json.dumps(_source_definition(kind, plural)))
    for plural in ("kustomizations", *_SOURCES.values()):
        eventually(partial(_is_served, kubectl, plural), seconds=60, what=plural)
    kubectl("create", "namespace", NAMESPACE)
    archives = folder / "archives"
    archives.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(archives)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = free_ports()
    gates = ",".join(f"{feature}=true" for feature in ("ExternalArtifact", *features))
    with (folder / "kustomize-controller.log").open("w") as log:
        controller = subprocess.Popen(
            [
                program,
                "--enable-leader-election=false",
                f"--feature-gates={gates}",
                f"--health-addr=127.0.0.1:{ports.etcd_client}",
                f"--metrics-addr=127.0.0.1:{ports.etcd_peer}",
            ],
            env={**os.environ, "KUBECONFIG": str(kubectl.kubeconfig), "RUNTIME_NAMESPACE": NAMESPACE},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Flux(kubectl, archives, f"http://127.0.0.1:{server.server_port}")
    finally:
        controller.terminate()
        controller.wait(timeout=60)
        server.shutdown()
        server.server_close()
