"""Starts the cluster and its add-ons in order, and reports their state."""

import datetime
import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from string import Template

from devcluster import (
    addresses,
    cleanup,
    console,
    controlplane,
    images,
    machine,
    node,
    packages,
    processes,
    toolchain,
)
from devcluster.addresses import Ports
from devcluster.errors import ClusterError
from devcluster.kubectl import Kubectl
from devcluster.layout import Layout
from devcluster.processes import Record

DEFAULT_GPUS = 2
_DAEMONS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "local-path-provisioner",
)
# kubectl asks the API server; CoreDNS runs in a pod.
_PROGRAMS = (*_DAEMONS, "kubectl", "coredns")
_NODE_SECONDS = 120
_DNS_SECONDS = 120


@contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Let one command at a time change the cluster, and release its lock if killed."""
    layout.cache.mkdir(parents=True, exist_ok=True)
    with layout.lock.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say("waiting for another devcluster command to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(layout: Layout, gpus: int = DEFAULT_GPUS, *, for_tests: bool = False) -> None:
    """Start the cluster and wait until its node is Ready, DNS answers and `gpus` GPUs can be scheduled.

    A running cluster is left alone but for the number of GPUs; a broken or half-started one is removed first. Raises
    ClusterError when the tests have started it, and `for_tests` is false, or the reverse.
    """
    reject_other(layout, for_tests=for_tests)
    if os.geteuid() != 0:
        raise ClusterError("`up` makes network devices and mounts: run it as root")
    packages.ensure(layout, packages.NODE)
    if reasons := broken(layout):
        if layout.cluster.exists():
            console.say(f"removing a cluster that is broken: {reasons[0]}")
            cleanup.down(layout)
        binaries = toolchain.build(layout, _PROGRAMS)
        machine.reject_conflicts()
        # From here on `down` can restore the machine, at whatever point this is cut short.
        machine.observe().save(layout.before)
        layout.cluster.mkdir(parents=True, exist_ok=True, mode=0o700)
        if for_tests:
            layout.for_tests.touch()
        _Start(layout, binaries).everything()
    kubectl = kubectl_of(layout)
    # A node that is late with its heartbeat on a busy machine is waited for; its volumes are worth more than a minute.
    _wait(layout, lambda: node_is_ready(kubectl), _NODE_SECONDS, "the node to be Ready", "kubelet")
    set_gpus(kubectl, gpus)
    _wait(layout, lambda: offered_gpus(kubectl) == gpus, _NODE_SECONDS, f"the scheduler to see {gpus} GPUs", "kubelet")
    layout.ready.touch()


def reject_other(layout: Layout, *, for_tests: bool) -> None:
    """Raise ClusterError if users need a cluster and tests have one, or the reverse.

    The machine has room for one, and the tests delete what is on theirs: jobs, volumes, definitions.
    """
    if not layout.cluster.exists() or layout.for_tests.exists() == for_tests:
        return
    if for_tests:
        raise ClusterError(
            f"the embedded cluster in {layout.cluster} may hold your work, and tests need one of their own: "
            "`make cluster-down` stops it, and deletes its jobs and volumes"
        )
    raise ClusterError(
        "tests have started the embedded cluster, and delete all work on it: wait for their end, or stop it with "
        "`make cluster-down`"
    )


@contextmanager
def used_by_tests(layout: Layout) -> Iterator[None]:
    """Keep others from the tests' cluster. Raises ClusterError if tests use it."""
    with layout.for_tests.open() as marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClusterError("other tests use the embedded cluster: wait for their end") from None
        yield


class _Start:
    """One run of `up`: a started program that dies is reported while later ones start."""

    def __init__(self, layout: Layout, binaries: dict[str, Path]) -> None:
        self._layout = layout
        self._binaries = binaries
        self._began = time.monotonic()

    def everything(self) -> None:
        layout = self._layout
        ports = addresses.free_ports()
        layout.ports.write_text(json.dumps(asdict(ports)))
        settings = controlplane.Settings(layout.cluster, addresses.BRIDGE_ADDRESS, ports, self._binaries, node=True)
        controlplane.write_credentials(settings, datetime.datetime.now(datetime.UTC))
        node.set_up_network()
        plane = controlplane.start_api(settings, self.program)
        controlplane.start_controllers(settings, self.program)
        self._say("API server ready")
        busybox, coredns = self._images(ports)
        node.start_kubelet(layout, ports, self.program)
        node.start_kube_proxy(layout, ports, self.program)
        apply_dns(plane.kubectl, coredns)
        start_storage(layout, plane.kubectl, self.program, busybox)
        _wait(layout, lambda: node_is_ready(plane.kubectl), _NODE_SECONDS, "the node to be Ready", "kubelet")
        self._say("node Ready")
        _wait(layout, dns_works, _DNS_SECONDS, "the cluster's DNS", "kubelet")
        self._say("DNS answers")
        console.say(f"cluster started in {time.monotonic() - self._began:.0f} s")

    def _images(self, ports: Ports) -> tuple[str, str]:
        busybox = images.busybox_image()
        coredns = images.program_image(self._binaries["coredns"])
        images.start_registry(self._layout, ports, self.program)
        node.start_containerd(self._layout, self.program, busybox)
        # Left by a containerd that was killed: its content outlives the cluster, its containers must not.
        node.remove_containers(self._layout)
        for image in (busybox, images.BUSYBOX_NAME, coredns):
            images.load(self._layout, ports, image)
        return busybox, coredns

    def program(self, name: str, arguments: Sequence[str]) -> Record:
        """Start one program of the cluster."""
        argv: list[str | Path] = [self._binaries.get(name, Path(name)), *arguments]
        return processes.start(name, argv, directory=self._layout.records, log=self._layout.log(name))

    def _say(self, what: str) -> None:
        console.mention(self._layout, f"{what} after {time.monotonic() - self._began:.1f} s")


def enforce_network_policies(layout: Layout) -> None:
    """Let NetworkPolicies decide about connections of pods in the running cluster, from now on until `down`.

    Raises ClusterError when there is no healthy cluster.
    """
    if reasons := broken(layout):
        raise ClusterError(reasons[0])
    if _enforces_network_policies(layout):
        return
    binaries = toolchain.build(layout, [node.POLICY_PROGRAM])
    allow_network_policies(kubectl_of(layout))
    node.start_network_policies(layout, _Start(layout, binaries).program)
    console.mention(layout, "NetworkPolicies are enforced")


def _enforces_network_policies(layout: Layout) -> bool:
    return any(record.name == node.POLICY_PROGRAM for record in processes.records(layout.records))


def start_node_again(layout: Layout, gpus: int = DEFAULT_GPUS) -> None:
    """Start the running cluster's kubelet after it has been ended, and kube-proxy, which ends when its Node is deleted.

    Waits until the node is Ready and offers `gpus` GPUs.
    """
    starting = _Start(layout, toolchain.build(layout, ["kubelet", "kube-proxy"]))
    alive = {record.name for record in processes.records(layout.records) if processes.alive(record)}
    if "kubelet" not in alive:
        node.start_kubelet(layout, ports_of(layout), starting.program)
    if "kube-proxy" not in alive:
        node.start_kube_proxy(layout, ports_of(layout), starting.program)
    kubectl = kubectl_of(layout)
    _wait(layout, lambda: node_is_ready(kubectl), _NODE_SECONDS, "the node to be Ready", "kubelet")
    set_gpus(kubectl, gpus)
    _wait(layout, lambda: offered_gpus(kubectl) == gpus, _NODE_SECONDS, f"the scheduler to see {gpus} GPUs", "kubelet")


def broken(layout: Layout) -> list[str]:
    """Reasons why the cluster cannot become healthy without help, one line each."""
    if not layout.cluster.exists():
        return ["there is no cluster; start one with `python -m devcluster up`"]
    found = [] if layout.ready.exists() else ["the last `up` did not finish"]
    known = {record.name: record for record in processes.records(layout.records)}
    for name in _expected(layout):
        if name not in known or not processes.alive(known[name]):
            found.append(f"{name} is not running; its log is {layout.log(name)}")
    return found


def trouble(layout: Layout) -> list[str]:
    """Reasons why the cluster is not healthy now, one line each."""
    found = broken(layout)
    if not found and not node_is_ready(kubectl_of(layout)):
        found.append(f"the node is not Ready; see {layout.log('kubelet')}")
    return found


def status(layout: Layout) -> str:
    """A table of programs, their pids and logs, and the node's state."""
    known = {record.name: record for record in processes.records(layout.records)}
    lines = []
    for name in _expected(layout):
        running = name in known and processes.alive(known[name])
        pid = str(known[name].pid) if running else "-"
        lines.append(f"{name:24} {'running' if running else 'stopped':8} {pid:>8}  {layout.log(name)}")
    if not trouble(layout):
        kubectl = kubectl_of(layout)
        lines.append(f"node {addresses.NODE} is Ready and offers {offered_gpus(kubectl)} {addresses.GPU_RESOURCE}")
    return "\n".join(lines)


def ports_of(layout: Layout) -> Ports:
    """The running cluster's ports; raises ClusterError when there is none."""
    if not layout.ports.exists():
        raise ClusterError("there is no cluster; start one with `python -m devcluster up`")
    return Ports(**json.loads(layout.ports.read_text()))


def kubectl_of(layout: Layout) -> Kubectl:
    return Kubectl(toolchain.build(layout, ["kubectl"])["kubectl"], layout.kubeconfig)


def node_is_ready(kubectl: Kubectl) -> bool:
    try:
        conditions = kubectl.get("node", addresses.NODE)["status"].get("conditions", [])
    except ClusterError:
        return False  # not registered yet
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _expected(layout: Layout) -> list[str]:
    chosen = [node.POLICY_PROGRAM] if _enforces_network_policies(layout) else []
    return [*_DAEMONS, *chosen, "containerd", "docker-registry"]


def _wait(layout: Layout, condition: processes.Condition, seconds: float, what: str, suspect: str) -> None:
    needs = list(processes.records(layout.records))
    processes.until(condition, seconds, what, layout.log(suspect), needs, layout.log)


_MANIFESTS = Path(__file__).parent / "manifests"


def apply_dns(kubectl: Kubectl, image: str) -> None:
    """Install CoreDNS as a Deployment behind the Service of pods' resolv.conf."""
    values = {"image": image, "domain": addresses.DNS_DOMAIN, "address": addresses.DNS_ADDRESS}
    kubectl.apply(Template((_MANIFESTS / "dns.yaml").read_text()).substitute(values))


def dns_works() -> bool:
    """Whether the cluster's DNS, at its Service, resolves the API server's Service."""
    name = f"kubernetes.default.svc.{addresses.DNS_DOMAIN}"
    identity = secrets.token_bytes(2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        try:
            client.sendto(dns_query(identity, name), (addresses.DNS_ADDRESS, 53))
            answer = client.recv(512)
        except OSError:
            return False
    return answer[:2] == identity and socket.inet_aton(addresses.API_SERVICE_ADDRESS) in answer


def dns_query(identity: bytes, name: str) -> bytes:
    """Return a recursive DNS question for the A records of `name` (RFC 1035, 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return identity + struct.pack(">HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


def allow_network_policies(kubectl: Kubectl) -> None:
    """Let the enforcer of NetworkPolicies read them, and their pods and namespaces."""
    kubectl.apply((_MANIFESTS / "network-policies.yaml").read_text())


def start_storage(layout: Layout, kubectl: Kubectl, start: Callable[[str, list[str]], Record], image: str) -> Record:
    """Install the default StorageClass `local-path`, and start its provisioner."""
    values = {"image": image, "volumes": str(layout.volumes)}
    kubectl.apply(Template((_MANIFESTS / "storage.yaml").read_text()).substitute(values))
    arguments = [
        "start",
        f"--kubeconfig={layout.cluster / 'local-path-provisioner.kubeconfig'}",
        f"--helper-image={image}",
        "--service-account-name=local-path-provisioner",
    ]
    return start("local-path-provisioner", arguments)


def set_gpus(kubectl: Kubectl, count: int) -> None:
    """Make the node claim `count` GPUs, again after each restart of the kubelet."""
    node = kubectl.get("node", addresses.NODE)
    if offered_gpus(kubectl) == count:
        return
    key = addresses.GPU_RESOURCE.replace("/", "~1")
    fields = [field for field in ("capacity", "allocatable") if field in node["status"]]
    operations = [{"op": "add", "path": f"/status/{field}/{key}", "value": str(count)} for field in fields]
    kubectl.patch_status(f"node/{addresses.NODE}", operations)


def offered_gpus(kubectl: Kubectl) -> int:
    """The number of GPUs that the scheduler may assign."""
    return int(kubectl.get("node", addresses.NODE)["status"].get("allocatable", {}).get(addresses.GPU_RESOURCE, 0))
