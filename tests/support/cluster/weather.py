"""An operator behind a proxy of a real API server, which rejects, freezes, cuts and goes away."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from tests.support.cluster.operator_process import OperatorProcess, running_operator
from tests.support.services.api_proxy import ApiProxy
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[3]
OWN = "weather-system"
"""The namespace of the operators' account and of their Lease."""
QUICK = {"resyncSeconds": 5, "watchSilenceSeconds": 5, "progress": {"enabled": False}}
RULES = [
    {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs", "qlorasweeps"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs/status", "qlorasweeps/status"], "verbs": ["patch"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch", "create", "delete"]},
    {"apiGroups": ["apps"], "resources": ["controllerrevisions"], "verbs": ["get", "list", "create"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get", "create"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies"], "verbs": ["create", "patch"]},
]
LEASES = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}]

Object = dict[str, Any]


def election(name: str) -> Object:
    return {"enabled": True, "namespace": OWN, "leaseName": name, "leaseDurationSeconds": 6}


@dataclass(frozen=True)
class Tenant:
    """A namespace, as its user and the administrator see it: never through the proxy."""

    plane: ControlPlane
    namespace: str

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.plane.kubectl(*arguments, f"--namespace={self.namespace}", **options)

    def create(self, name: str, **spec: Any) -> None:
        self.apply(
            {
                "apiVersion": "qlora.dev/v1beta1",
                "kind": "QLoRAJob",
                "metadata": {"name": name},
                "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
            }
        )

    def apply(self, manifest: Mapping[str, Any]) -> None:
        self.kubectl("apply", "--filename=-", input_text=json.dumps(manifest))

    def suspend(self, name: str) -> None:
        self.kubectl("patch", "qlorajob", name, "--type=merge", '--patch={"spec": {"suspend": true}}')

    def status(self, name: str) -> Object:
        job = self.plane.kubectl.get("qlorajob", name, f"--namespace={self.namespace}")
        return dict(job.get("status") or {})

    def wait_for_phase(self, name: str, phase: str, seconds: float = 60) -> None:
        eventually(
            lambda: self.status(name).get("phase") == phase, seconds=seconds, every=0.2, what=f"{name} to be {phase}"
        )

    def jobs(self, name: str) -> list[str]:
        """UIDs of the Jobs of a QLoRAJob."""
        listed = self.plane.kubectl.get("jobs", f"--namespace={self.namespace}", f"--selector=qlora.dev/job={name}")
        return [item["metadata"]["uid"] for item in listed["items"]]

    def grant(self, *, rules: list[Object] = RULES) -> None:
        """Give the operators' account these rights in this namespace."""
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "operator"}}
        subject = {"kind": "ServiceAccount", "name": "operator", "namespace": OWN}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"}
        self.apply(role | {"kind": "Role", "rules": rules})
        self.apply(role | {"kind": "RoleBinding", "roleRef": reference, "subjects": [subject]})

    def deny(self) -> None:
        """Take the rights away, and wait until the API server denies them."""
        self.kubectl("delete", "rolebinding", "operator")
        eventually(self._is_denied, seconds=60, every=0.2, what="the denial")

    def _is_denied(self) -> bool:
        account = f"--as=system:serviceaccount:{OWN}:operator"
        try:
            self.kubectl("auth", "can-i", "list", "qlorajobs.qlora.dev", account)
        except ClusterError:
            return True
        return False


@dataclass(frozen=True)
class Site:
    """Resources of one test: a namespace, a proxy, and a folder."""

    plane: ControlPlane
    tenant: Tenant
    proxy: ApiProxy
    folder: Path
    token: str

    def kubeconfig(self, proxy: ApiProxy, **cluster: str) -> Path:
        path = self.folder / f"kubeconfig-{proxy.port}"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": proxy.url} | cluster}],
            "users": [{"name": "operator", "user": {"token": self.token}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "operator"}}],
            "current-context": "proxy",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    @contextlib.contextmanager
    def operator(
        self,
        name: str = "operator",
        *,
        proxy: ApiProxy | None = None,
        kubeconfig: Path | None = None,
        **settings: Any,
    ) -> Iterator[OperatorProcess]:
        """Run an operator here. Check at the end that it is alive and its log is JSON."""
        chosen = {"namespaces": [self.tenant.namespace], **QUICK, **settings}
        path = kubeconfig or self.kubeconfig(proxy or self.proxy)
        with running_operator(self.folder / name, path, chosen) as operator:
            yield operator
            if operator.alive:
                assert operator.stop() == 0
            operator.entries()


def proxy_of(plane: ControlPlane, **options: Any) -> ApiProxy:
    authority = plane.directory / "certificates" / "ca.crt"
    return ApiProxy(plane.server.removeprefix("https://"), authority, **options)


def problems(operator: OperatorProcess) -> list[str]:
    """The warnings in the log. Raises AssertionError for a traceback."""
    entries = operator.entries()
    assert not [entry for entry in entries if "exception" in entry]
    return [entry["message"] for entry in entries if entry["level"] in ("warning", "error", "critical")]


def warnings(operator: OperatorProcess, part: str) -> int:
    """The number of warnings with this part."""
    return sum(part in line for line in problems(operator))
