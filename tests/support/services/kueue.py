"""Kueue's controller as a process with an API server, with Kueue's definitions and webhooks."""

import base64
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from devcluster import toolchain
from devcluster.addresses import free_ports
from devcluster.errors import ClusterError
from devcluster.kubectl import Kubectl
from devcluster.layout import from_environment
from tests.support.waiting import eventually

SHIPPED = Path(__file__).parents[3] / "gitops" / "kueue"
NAMESPACE = "kueue-system"
GPU = "nvidia.com/gpu"
FLAVOR = "any"
_API = "kueue.x-k8s.io/v1beta2"
_SERVICE, _SECRET = "kueue-webhook-service", "kueue-webhook-server-cert"
_HOST = "127.0.0.1"
_AWAY = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "away",
    "contexts": [{"name": "away", "context": {"cluster": "away", "user": "away"}}],
    "clusters": [{"name": "away", "cluster": {"server": "https://127.0.0.1:9", "certificate-authority-data": "eA=="}}],
    "users": [{"name": "away", "user": {"token": "none"}}],
}

Object = dict[str, Any]


class Kueue:
    """Actions of an administrator of Kueue, who manages LocalQueues in one namespace."""

    def __init__(self, kubectl: Kubectl, folder: Path, namespace: str) -> None:
        self.kubectl, self.namespace = kubectl, namespace
        self._folder = folder
        ports = free_ports()
        self._webhook_port, self._health_port = ports.etcd_client, ports.etcd_peer
        layout = from_environment()
        self._program = toolchain.built(layout, ["kueue"])["kueue"]
        self._manifests = toolchain.manifests(layout, "kueue") / "default"
        self._process: subprocess.Popen[bytes] | None = None

    def install(self) -> None:
        """The definitions, the flavor, and the webhooks for the one namespace."""
        everything = yaml.safe_load_all(self.kubectl("kustomize", str(self._manifests)))
        kept = [changed for body in everything if (changed := self._adapted(body))]
        self.kubectl("apply", "--server-side", "--filename=-", input_text=yaml.safe_dump_all(kept))

    def start(self, *, unlabeled: bool = False) -> None:
        """Start the controller and its webhooks. `unlabeled`: hold Jobs without a queue."""
        configuration = {
            **yaml.safe_load((SHIPPED / "configuration.yaml").read_text()),
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"{_HOST}:{self._health_port}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": _HOST, "port": self._webhook_port, "certDir": str(self._folder / "certificates")},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": True, "webhookServiceName": _SERVICE, "webhookSecretName": _SECRET},
            "manageJobsWithoutQueueName": unlabeled,
            "managedJobsNamespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}},
        }
        (self._folder / "kueue.yaml").write_text(yaml.safe_dump(configuration))
        with (self._folder / "kueue.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, f"--config={self._folder / 'kueue.yaml'}", "--feature-gates=VisibilityOnDemand=false"],
                env={**os.environ, "KUBECONFIG": str(self.kubectl.kubeconfig)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        eventually(self._bring_certificate, seconds=60, every=0.2, what="Kueue's certificate")
        eventually(self._answers, seconds=90, every=0.5, what="Kueue's webhooks")

    def stop(self) -> None:
        """End the controller; its webhooks stay, and nothing answers them."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=60)
            self._process = None

    def queue(self, name: str, gpus: int, *, cohort: str = "", **spec: Any) -> None:
        """A LocalQueue with a ClusterQueue of the same name that has so many GPUs."""
        quota = {"name": GPU, "nominalQuota": str(gpus)}
        group = {"coveredResources": [GPU], "flavors": [{"name": FLAVOR, "resources": [quota]}]}
        preemption = {"withinClusterQueue": "LowerPriority"}
        if cohort:
            preemption |= {"reclaimWithinCohort": "Any"}
            spec |= {"cohortName": cohort}
        shared = {"namespaceSelector": {}, "preemption": preemption, "resourceGroups": [group]}
        self.apply("ClusterQueue", name, {"spec": shared | spec}, namespaced=False)
        self.local_queue(name, name)

    def local_queue(self, name: str, cluster_queue: str) -> None:
        """Apply the LocalQueue, and wait until the controller uses it if named `default`."""
        self.apply("LocalQueue", name, {"spec": {"clusterQueue": cluster_queue}})

        def conditions() -> list[Object] | None:
            queue = self.kubectl.get("localqueues.kueue.x-k8s.io", name, f"--namespace={self.namespace}")
            return queue["status"].get("conditions")

        eventually(conditions, seconds=60, every=0.2, what=f"the conditions of LocalQueue {name}")

    def dispatch(self, name: str) -> None:
        """Let the queue of that name run its Jobs in another cluster, which does not answer."""
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}}
        self.kubectl.apply(json.dumps(secret | {"stringData": {"kubeconfig": json.dumps(_AWAY)}}))
        source = {"kubeConfig": {"location": name, "locationType": "Secret"}}
        self.apply("MultiKueueCluster", name, {"spec": {"clusterSource": source}}, namespaced=False)
        self.apply("MultiKueueConfig", name, {"spec": {"clusters": [name]}}, namespaced=False)
        parameters = {"apiGroup": "kueue.x-k8s.io", "kind": "MultiKueueConfig", "name": name}
        check = {"controllerName": "kueue.x-k8s.io/multikueue", "parameters": parameters}
        self.apply("AdmissionCheck", name, {"spec": check}, namespaced=False)
        self.queue(name, 1, admissionChecksStrategy={"admissionChecks": [{"name": name}]})

        def knows_the_check() -> bool:
            conditions = self.kubectl.get("clusterqueues.kueue.x-k8s.io", name)["status"].get("conditions", ())
            return any("AdmissionCheck" in each["reason"] for each in conditions)

        eventually(knows_the_check, seconds=60, every=0.2, what=f"the admission check of ClusterQueue {name}")

    def priority(self, name: str, value: int) -> None:
        self.apply("WorkloadPriorityClass", name, {"value": value, "description": name}, namespaced=False)

    def apply(self, kind: str, name: str, content: Mapping[str, Any], *, namespaced: bool = True) -> None:
        metadata = {"name": name} | ({"namespace": self.namespace} if namespaced else {})
        body = {"apiVersion": _API, "kind": kind, "metadata": metadata, **content}
        self.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", input_text=json.dumps(body))

    def workloads(self) -> list[Object]:
        return list(self.kubectl.get("workloads.kueue.x-k8s.io", f"--namespace={self.namespace}")["items"])

    def remove(self) -> None:
        """Remove Kueue while its controller runs, which removes its finalizers."""
        for kind in ("workloads", "localqueues", "clusterqueues", "resourceflavors"):
            where = [f"--namespace={self.namespace}"] if kind in ("workloads", "localqueues") else []
            self.kubectl("delete", f"{kind}.kueue.x-k8s.io", "--all", *where, "--timeout=60s")
        for kind in ("mutating", "validating"):
            self.kubectl("delete", f"{kind}webhookconfiguration", f"kueue-{kind}-webhook-configuration")
        self.stop()
        self.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
        listed = self.kubectl("get", "customresourcedefinitions", "--output=name").split()
        self.kubectl("delete", "--wait=false", *(name for name in listed if name.endswith("kueue.x-k8s.io")))

    def _adapted(self, body: Object) -> Object | None:
        """The manifests for a controller outside the cluster; None for the rest."""
        kind, name = body["kind"], body["metadata"]["name"]
        if kind in ("Namespace", "Secret"):
            return body
        if kind == "CustomResourceDefinition":
            if webhook := body["spec"].get("conversion", {}).get("webhook"):
                webhook["clientConfig"]["service"]["port"] = self._webhook_port
            return body
        if kind == "Service" and name == _SERVICE:
            # The API server runs on the same machine.
            return body | {"spec": {"type": "ExternalName", "externalName": "localhost"}}
        if kind.endswith("WebhookConfiguration"):
            return body | {"webhooks": [hook for hook in body["webhooks"] if self._aim(hook)]}
        return None

    def _aim(self, hook: Object) -> bool:
        """Point the webhook to the controller, and return whether it is needed."""
        groups = {group for rule in hook["rules"] for group in rule["apiGroups"]}
        hook["clientConfig"]["service"]["port"] = self._webhook_port
        if groups == {"batch"}:
            hook["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": self.namespace}}
        return groups in ({"kueue.x-k8s.io"}, {"batch"})

    def _bring_certificate(self) -> bool:
        """The kubelet's handling of a Secret volume."""
        data = self.kubectl.get("secret", _SECRET, f"--namespace={NAMESPACE}").get("data", {})
        folder = self._folder / "certificates"
        folder.mkdir(exist_ok=True)
        for name in ("tls.crt", "tls.key", "ca.crt"):
            if name in data:
                (folder / name).write_bytes(base64.b64decode(data[name]))
        return "tls.crt" in data and "tls.key" in data

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise AssertionError((self._folder / "kueue.log").read_text()[-4000:])
        try:
            self.apply("ResourceFlavor", FLAVOR, {}, namespaced=False)
        except ClusterError:
            return False
        return True


@contextmanager
def kueue(kubectl: Kubectl, folder: Path, namespace: str) -> Iterator[Kueue]:
    """Kueue for the Jobs of one namespace; `folder` gets its log. Its objects stay."""
    controller = Kueue(kubectl, folder, namespace)
    controller.install()
    controller.start()
    try:
        yield controller
    finally:
        controller.stop()
