"""An operator that serves several tenants: a real API server, the chart's roles, and no node.

The operator's process has the account and the rights that the chart gives it. A tenant is a user with the cluster role
`edit`, which the chart extends by QLoRAJobs, in a separate namespace with the Pod Security level `restricted`. One node
is a few lines of Python: it serves logs, and tests write what its kubelet would.
"""

import base64
import http.client
import http.server
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import yaml

from devcluster import toolchain
from devcluster.controlplane import ControlPlane, running
from devcluster.kubectl import Kubectl
from devcluster.layout import from_environment
from qlora_api.naming import JOB_LABEL, STEP_LABEL
from qlora_api.profile import PROFILE_KIND
from tests.support.chart.rendered import Helm
from tests.support.cluster.kubelet import add_node, bind, container_status, serve_kubelet, terminated
from tests.support.cluster.nodeless import apply_definitions
from tests.support.cluster.operator_process import OperatorProcess, running_operator
from tests.support.waiting import eventually

OPERATOR_NAMESPACE = "qlora-system"
OPERATOR = f"system:serviceaccount:{OPERATOR_NAMESPACE}:qlora-operator"
NODE = "node"
# The tenants by namespace: each has `edit` there, and nothing elsewhere.
TENANT, TENANT_USER = "tenant", "mallory"
CAPPED = "capped"
VICTIM, VICTIM_USER = "victim", "alice"
QUOTA = {"pods": "2", "persistentvolumeclaims": "3", "count/jobs.batch": "3"}

Object = dict[str, Any]

PATHS = {
    "qlorajobs": "/apis/qlora.dev/v1beta1",
    "qlorasweeps": "/apis/qlora.dev/v1beta1",
    "jobs": "/apis/batch/v1",
    "controllerrevisions": "/apis/apps/v1",
    "roles": "/apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "/apis/rbac.authorization.k8s.io/v1",
    "networkpolicies": "/apis/networking.k8s.io/v1",
}
_KINDS = (
    *("qlorajobs", "jobs", "pods", "persistentvolumeclaims", "secrets", "configmaps", "events"),
    *("serviceaccounts", "roles", "rolebindings", "networkpolicies"),
)


def path_of(namespace: str, plural: str, *rest: str) -> str:
    """The path of objects of a kind in a namespace, or of one of them."""
    return "/".join([f"{PATHS.get(plural, '/api/v1')}/namespaces/{namespace}/{plural}", *rest])


class Client:
    """One user's connection to the API server, with the rights of that user."""

    def __init__(self, server: str, context: ssl.SSLContext, headers: Mapping[str, str]) -> None:
        self._address = server.removeprefix("https://")
        self._context = context
        self._headers = headers
        self._connection: http.client.HTTPSConnection | None = None

    def send(
        self, method: str, path: str, body: object = None, *, kind: str = "application/json", **query: str
    ) -> tuple[int, Object]:
        """Status and answer."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        target = f"{path}?{urlencode(query)}" if query else path
        for fresh in (False, True):
            if self._connection is None or fresh:
                self._connection = http.client.HTTPSConnection(self._address, context=self._context, timeout=60)
            try:
                self._connection.request(method, target, content, {"Content-Type": kind, **self._headers})
                answer = self._connection.getresponse()
                text = answer.read().decode(errors="replace")
                break
            except (http.client.HTTPException, ConnectionError, ssl.SSLEOFError):
                if fresh:
                    raise
        try:
            return answer.status, dict(json.loads(text))
        except ValueError:
            return answer.status, {"message": text}

    def must(self, method: str, path: str, body: object = None, **more: str) -> Object:
        """The answer of a request that succeeds."""
        status, answer = self.send(method, path, body, **more)
        assert status < 300, f"{method} {path}: {status} {answer.get('message')}"
        return answer

    def get(self, namespace: str, plural: str, name: str) -> Object:
        return self.must("GET", path_of(namespace, plural, name))

    def list(self, namespace: str, plural: str, selector: str = "") -> list[Object]:
        return list(self.must("GET", path_of(namespace, plural), labelSelector=selector)["items"])

    def create(self, namespace: str, plural: str, body: Object) -> Object:
        return self.must("POST", path_of(namespace, plural), body)

    def patch(self, namespace: str, plural: str, name: str, body: Object, subresource: str = "") -> Object:
        path = path_of(namespace, plural, name, *([subresource] if subresource else []))
        return self.must("PATCH", path, body, kind="application/merge-patch+json")

    def delete(self, namespace: str, plural: str, name: str) -> None:
        self.must("DELETE", path_of(namespace, plural, name), {"propagationPolicy": "Background"})


@dataclass
class Logs:
    """The logs of the node's pods, by namespace and name."""

    texts: dict[tuple[str, str], str] = field(default_factory=dict)


class _LogHandler(BaseHTTPRequestHandler):
    logs: Logs

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        text = self.logs.texts.get((parts[2], parts[3]), "") if parts[1] == "containerLogs" else ""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())


@dataclass(frozen=True)
class Tenants:
    """The cluster, as its administrator and its tenants use it."""

    plane: ControlPlane
    admin: Client
    tenant: Client
    victim: Client

    def job(self, name: str, namespace: str = TENANT) -> Object:
        return self.admin.get(namespace, "qlorajobs", name)

    def wait(self, name: str, namespace: str = TENANT, **expected: object) -> Object:
        """The job, once `phase`, and `reason` of the condition Succeeded, are as expected."""

        def reached() -> Object | None:
            job = self.job(name, namespace)
            return job if expected.items() <= summary(job).items() else None

        return eventually(reached, seconds=30, every=0.1, what=f"{name} with {expected}") or {}

    def wait_for_pod(self, name: str, step: str, namespace: str = TENANT) -> Object:
        """The pod of the job's step."""
        selector = f"{JOB_LABEL}={name},{STEP_LABEL}={step}"

        def live() -> list[Object]:
            pods = self.admin.list(namespace, "pods", selector)
            return [pod for pod in pods if controlled(pod) and pod["status"]["phase"] in ("Pending", "Running")]

        return eventually(live, seconds=30, every=0.1, what=f"a pod of the {step} step of {name}")[-1]

    def everything(self, namespace: str) -> dict[str, Object]:
        """The objects of a namespace, by kind and name."""
        return {f"{kind}/{one['metadata']['name']}": one for kind in _KINDS for one in self.admin.list(namespace, kind)}

    def audited(self, since: int = 0) -> list[Object]:
        """The requests that the API server has answered since that byte of its audit log."""
        with self.plane.audit_log.open() as log:
            log.seek(since)
            return [json.loads(line) for line in log if line.endswith("}\n")]

    def audit_size(self) -> int:
        return self.plane.audit_log.stat().st_size


@dataclass(frozen=True)
class Tenancy(Tenants):
    """The same without a node: tests write a kubelet's statuses and containers' logs."""

    logs: Logs
    operator: OperatorProcess

    def run(self, pod: Object, log: str = "") -> None:
        """The pod starts on the node, and writes that log."""
        metadata = pod["metadata"]
        if not pod["spec"].get("nodeName"):
            bind(self.plane, metadata["namespace"], metadata["name"], NODE)
        self.logs.texts[metadata["namespace"], metadata["name"]] = log
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._report(pod, "Running", {"running": {"startedAt": now}})

    def end(self, pod: Object, message: str, code: int = 0) -> None:
        """The pod ends with that exit code and that termination message."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._report(pod, "Failed" if code else "Succeeded", terminated(code, message, now))

    def _report(self, pod: Object, phase: str, state: Object) -> None:
        metadata = pod["metadata"]
        status = {"phase": phase, "containerStatuses": [container_status(state)]}
        self.admin.patch(metadata["namespace"], "pods", metadata["name"], {"status": status}, "status")


def summary(job: Object) -> dict[str, object]:
    """The phase of a job, and the reason of its condition Succeeded."""
    status = job.get("status", {})
    reasons = {entry["type"]: entry["reason"] for entry in status.get("conditions", ())}
    return {"phase": status.get("phase"), "reason": reasons.get("Succeeded")}


def controlled(pod: Object) -> bool:
    """Whether the pod belongs to a Job."""
    return any(owner.get("controller") for owner in pod["metadata"].get("ownerReferences", ()))


def by_the_operator(entry: Object) -> bool:
    """Whether an entry of the audit log is a request of the operator."""
    # A request that the API server has had no time to authenticate has no user.
    return bool(entry["user"].get("username") == OPERATOR)


def used_by_the_operator(requests: list[Object]) -> dict[str, set[str]]:
    """Verbs by resource of the operator's requests."""
    verbs: dict[str, set[str]] = {}
    for entry in requests:
        if by_the_operator(entry) and "objectRef" in entry:
            where = entry["objectRef"]
            name = where["resource"] + (f"/{where['subresource']}" if where.get("subresource") else "")
            # An apply that creates the object needs both rights.
            created = {"create"} if entry.get("responseStatus", {}).get("code") == 201 else set()
            verbs.setdefault(name, set()).update({entry["verb"]} | created)
    return verbs


def denied_to_the_operator(requests: list[Object]) -> list[str]:
    """The addresses of the operator's requests that were denied."""
    codes = (401, 403)
    denied = [one for one in requests if by_the_operator(one) and one.get("responseStatus", {}).get("code") in codes]
    return [one["requestURI"] for one in denied]


def granted_to_the_operator() -> dict[str, set[str]]:
    """List the operator's verbs by resource, in the cluster and in its namespace."""
    granted: dict[str, set[str]] = {}
    for one in rendered({}):
        names = ("qlora-operator", "qlora-operator-profiles")
        own = one["kind"] == "ClusterRole" and one["metadata"]["name"] in names
        for rule in one["rules"] if own or one["kind"] == "Role" else ():
            for resource in rule["resources"]:
                granted.setdefault(resource, set()).update(rule["verbs"])
    return granted


def rendered(values: Object) -> list[Object]:
    """The objects of the chart with these values."""
    return Helm(toolchain.built(from_environment(), ["helm"])["helm"]).template(values)


@contextmanager
def tenancy(folder: Path, profiles: Object) -> Iterator[Tenancy]:
    """Run an operator with the chart's roles and three namespaces. Log to `folder`."""
    with running(controller_manager=True) as plane:
        objects = rendered({"profiles": profiles})
        roles = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
        wanted = ("ServiceAccount", *roles, "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
        apply_definitions(
            plane, **{each["metadata"]["name"]: each["spec"] for each in objects if each["kind"] == PROFILE_KIND}
        )
        plane.kubectl("create", "namespace", OPERATOR_NAMESPACE)
        plane.kubectl.apply(yaml.safe_dump_all([one for one in objects if one["kind"] in wanted]))
        admin = client(plane, folder)
        logs = Logs()
        with serve_kubelet(_LogHandler, folder, logs=logs, protocol_version="HTTP/1.0") as port:
            add_node(plane, NODE, port)
            add_namespaces(plane.kubectl)
            template = next(one for one in objects if one["kind"] == "Deployment")["spec"]["template"]
            settings = yaml.safe_load(template["metadata"]["annotations"]["qlora.dev/settings"])
            # In a pod it would read its namespace from a file.
            # No other operator takes over, and a busy machine must not make this one stop its work.
            settings["leaderElection"] |= {"namespace": OPERATOR_NAMESPACE, "leaseDurationSeconds": 300}
            with running_operator(folder / "operator", _operators_kubeconfig(plane, folder), settings) as process:
                tenant, victim = (client(plane, folder, user) for user in (TENANT_USER, VICTIM_USER))
                yield Tenancy(plane, admin, tenant, victim, logs, process)


def _operators_kubeconfig(plane: ControlPlane, folder: Path) -> Path:
    kubeconfig = yaml.safe_load(plane.kubeconfig.read_text())
    token = plane.kubectl("create", "token", "qlora-operator", f"--namespace={OPERATOR_NAMESPACE}").strip()
    kubeconfig["users"][0]["user"] = {"token": token}
    file = folder / "operator.kubeconfig"
    file.write_text(yaml.safe_dump(kubeconfig))
    return file


def client(plane: ControlPlane, folder: Path, user: str = "") -> Client:
    """The administrator, or a user that the administrator impersonates."""
    kubeconfig = yaml.safe_load(plane.kubeconfig.read_text())
    context = ssl.create_default_context(
        cadata=base64.b64decode(kubeconfig["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
    )
    identity = kubeconfig["users"][0]["user"]
    paths = (folder / "admin.crt", folder / "admin.key")
    for path, part in zip(paths, ("client-certificate-data", "client-key-data"), strict=True):
        path.write_bytes(base64.b64decode(identity[part]))
    context.load_cert_chain(*paths)
    return Client(plane.server, context, {"Impersonate-User": user} if user else {})


def add_namespaces(kubectl: Kubectl) -> None:
    """The namespaces of both tenants, who may `edit` them; one has a quota."""
    for namespace in (TENANT, CAPPED, VICTIM):
        _add_namespace(kubectl, namespace, VICTIM_USER if namespace == VICTIM else TENANT_USER)
    kubectl("create", "quota", "quota", f"--namespace={CAPPED}", f"--hard={_comma_separated(QUOTA)}")


def _add_namespace(kubectl: Kubectl, name: str, user: str) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "edit", "namespace": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "edit"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    kubectl.apply(yaml.safe_dump_all([namespace, binding]))

    def ready() -> bool:
        kubectl("get", "serviceaccount", "default", f"--namespace={name}")
        arguments = ("create", "qlorajobs.qlora.dev", f"--as={user}", f"--namespace={name}")
        return kubectl("auth", "can-i", *arguments).strip() == "yes"

    eventually(ready, seconds=60, what=f"the rights of {user}")


def _comma_separated(values: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())
