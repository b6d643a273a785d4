"""Starts etcd, the API server, the controller manager and the scheduler."""

import datetime
import ssl
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from devcluster import addresses, certificates, processes, toolchain
from devcluster.addresses import Ports
from devcluster.kubectl import Kubectl
from devcluster.layout import Layout, from_environment
from devcluster.processes import Record

_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}
_START_SECONDS = 90


@dataclass(frozen=True)
class ControlPlane:
    """A running API server and the files that belong to it, all below `directory`."""

    directory: Path
    server: str
    kubeconfig: Path
    audit_log: Path
    kubectl: Kubectl


@dataclass(frozen=True)
class Settings:
    """Differences between the cluster and a control plane without a node."""

    directory: Path
    address: str
    ports: Ports
    binaries: dict[str, Path]
    # With a node: reach its kubelet, and publish the API server's address as the Service `kubernetes`.
    node: bool

    @property
    def certificates(self) -> Path:
        return self.directory / "certificates"

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.ports.api}"

    @property
    def etcd(self) -> str:
        return f"http://{addresses.LOOPBACK}:{self.ports.etcd_client}"

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def write_credentials(settings: Settings, now: datetime.datetime) -> None:
    """Create authority, certificates, ServiceAccount key, and all kubeconfig files."""
    authority = certificates.Authority(now)
    where = settings.certificates
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    (where / "ca.crt").write_bytes(authority.certificate)
    (where / "service-account.key").write_bytes(certificates.service_account_key())
    (where / "service-account.key").chmod(0o600)
    service = "kubernetes.default.svc"
    serves = ["kubernetes", "kubernetes.default", service, f"{service}.{addresses.DNS_DOMAIN}", "localhost"]
    serves += [addresses.LOOPBACK, addresses.API_SERVICE_ADDRESS, addresses.BRIDGE_ADDRESS]
    authority.issue("kube-apiserver", serves=serves).write(where, "kube-apiserver")
    authority.issue("kube-apiserver-kubelet-client", ["system:masters"]).write(where, "kubelet-client")
    node = f"system:node:{addresses.NODE}"
    authority.issue(node, ["system:nodes"], [addresses.NODE, addresses.BRIDGE_ADDRESS]).write(where, "kubelet")
    users = {
        "admin": ("admin", ["system:masters"]),
        "kube-controller-manager": ("system:kube-controller-manager", []),
        "kube-scheduler": ("system:kube-scheduler", []),
        "kube-proxy": ("system:kube-proxy", []),
        "kubelet": (node, ["system:nodes"]),
        "kube-network-policies": ("kube-network-policies", []),
        "local-path-provisioner": ("local-path-provisioner", []),
    }
    for name, (user, groups) in users.items():
        path = settings.directory / f"{name}.kubeconfig"
        certificates.write_kubeconfig(path, settings.server, authority.certificate, authority.issue(user, groups))


def etcd_arguments(settings: Settings) -> list[str]:
    """Etcd for throw-away data: it never waits for the disk."""
    peer = f"http://{addresses.LOOPBACK}:{settings.ports.etcd_peer}"
    return [
        f"--data-dir={settings.directory / 'etcd'}",
        f"--listen-client-urls={settings.etcd}",
        f"--advertise-client-urls={settings.etcd}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync=true",
        "--log-level=warn",
    ]


def apiserver_arguments(settings: Settings) -> list[str]:
    """Return options for RBAC, default admission plugins, and an audit of requests."""
    where = settings.certificates
    arguments = [
        f"--etcd-servers={settings.etcd}",
        f"--bind-address={settings.address}",
        f"--secure-port={settings.ports.api}",
        f"--tls-cert-file={where / 'kube-apiserver.crt'}",
        f"--tls-private-key-file={where / 'kube-apiserver.key'}",
        f"--client-ca-file={where / 'ca.crt'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--service-cluster-ip-range={addresses.SERVICE_SUBNET}",
        f"--service-account-issuer=https://kubernetes.default.svc.{addresses.DNS_DOMAIN}",
        f"--service-account-key-file={where / 'service-account.key'}",
        f"--service-account-signing-key-file={where / 'service-account.key'}",
        f"--audit-policy-file={settings.directory / 'audit-policy.yaml'}",
        f"--audit-log-path={settings.logs / 'audit.log'}",
        "--audit-log-maxsize=1024",
        "--audit-log-mode=blocking",
    ]
    if settings.node:
        return [
            *arguments,
            f"--advertise-address={settings.address}",
            f"--kubelet-certificate-authority={where / 'ca.crt'}",
            f"--kubelet-client-certificate={where / 'kubelet-client.crt'}",
            f"--kubelet-client-key={where / 'kubelet-client.key'}",
            "--kubelet-preferred-address-types=InternalIP",
        ]
    return [*arguments, "--endpoint-reconciler-type=none"]


def controller_manager_arguments(settings: Settings) -> list[str]:
    """Return options for controllers with ServiceAccounts, without a metrics port."""
    where = settings.certificates
    return [
        f"--kubeconfig={settings.directory / 'kube-controller-manager.kubeconfig'}",
        f"--service-account-private-key-file={where / 'service-account.key'}",
        f"--root-ca-file={where / 'ca.crt'}",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--secure-port=0",
    ]


def scheduler_arguments(settings: Settings) -> list[str]:
    return [
        f"--config={settings.directory / 'kube-scheduler.yaml'}",
        "--secure-port=0",
    ]


def start_api(
    settings: Settings, start: Callable[[str, list[str]], Record], options: Sequence[str] = ()
) -> ControlPlane:
    """Start etcd and the API server with these options, and wait until it is ready to serve."""
    settings.logs.mkdir(parents=True, exist_ok=True)
    (settings.directory / "audit-policy.yaml").write_text(yaml.safe_dump(_AUDIT_POLICY))
    running = [
        start("etcd", etcd_arguments(settings)),
        start("kube-apiserver", [*apiserver_arguments(settings), *options]),
    ]
    log = settings.log("kube-apiserver")
    processes.until(lambda: is_ready(settings), _START_SECONDS, "the API server", log, running, settings.log)
    kubeconfig = settings.directory / "admin.kubeconfig"
    return ControlPlane(
        directory=settings.directory,
        server=settings.server,
        kubeconfig=kubeconfig,
        audit_log=settings.logs / "audit.log",
        kubectl=Kubectl(settings.binaries["kubectl"], kubeconfig),
    )


def start_controllers(
    settings: Settings, start: Callable[[str, list[str]], Record], options: Sequence[str] = ()
) -> list[Record]:
    """Start the controller manager with these options, and with a node the scheduler."""
    running = [start("kube-controller-manager", [*controller_manager_arguments(settings), *options])]
    if settings.node:
        configuration = {
            "apiVersion": "kubescheduler.config.k8s.io/v1",
            "kind": "KubeSchedulerConfiguration",
            "clientConnection": {"kubeconfig": str(settings.directory / "kube-scheduler.kubeconfig")},
            "leaderElection": {"leaderElect": False},
        }
        (settings.directory / "kube-scheduler.yaml").write_text(yaml.safe_dump(configuration))
        running.append(start("kube-scheduler", scheduler_arguments(settings)))
    return running


def is_ready(settings: Settings) -> bool:
    """Whether the API server answers that it is ready, without credentials."""
    context = ssl.create_default_context(cafile=settings.certificates / "ca.crt")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"{settings.server}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def running(
    *,
    controller_manager: bool = False,
    controller_options: Sequence[str] = (),
    api_options: Sequence[str] = (),
    layout: Layout | None = None,
) -> Iterator[ControlPlane]:
    """Etcd and an API server on loopback, for tests that need the real API and no pods; no root needed.

    Everything is in a temporary folder and ends with the block, or with the calling process.
    `controller_manager` adds the controllers: garbage collection, Jobs (whose pods stay pending), ServiceAccounts.
    `controller_options` are their options, `api_options` those of the API server.
    Raises ClusterError where a program has not been built before: a test builds nothing.
    """
    layout = layout or from_environment()
    names = ["etcd", "kubectl", "kube-apiserver", *(["kube-controller-manager"] if controller_manager else [])]
    binaries = toolchain.built(layout, names)
    with tempfile.TemporaryDirectory(prefix="qlora-controlplane-") as name:
        settings = Settings(Path(name), addresses.LOOPBACK, addresses.free_ports(), binaries, node=False)
        write_credentials(settings, datetime.datetime.now(datetime.UTC))
        records = settings.directory / "processes"

        def start(name: str, arguments: list[str]) -> Record:
            argv: list[str | Path] = [binaries[name], *arguments]
            return processes.start(name, argv, directory=records, log=settings.log(name), with_parent=True)

        try:
            plane = start_api(settings, start, api_options)
            if controller_manager:
                start_controllers(settings, start, controller_options)
            yield plane
        finally:
            for record in reversed(list(processes.records(records))):
                processes.stop(record, grace=5)
