"""Names and addresses of the cluster: change them here when they collide with a machine's network."""

import random
import socket
from dataclasses import dataclass, fields

from devcluster.errors import ClusterError

NODE = "devcluster"
BRIDGE = "qlora0"
# The bridge is also the node's and the API server's address, so nothing listens on the machine's network.
BRIDGE_ADDRESS = "10.244.0.1"
POD_SUBNET = "10.244.0.0/24"
SERVICE_SUBNET = "10.96.0.0/24"
API_SERVICE_ADDRESS = "10.96.0.1"
DNS_ADDRESS = "10.96.0.10"
DNS_DOMAIN = "cluster.local"
LOOPBACK = "127.0.0.1"
# A chain of this prefix is ours; kube-proxy owns those that start with KUBE-.
CHAIN_PREFIX = "QLORA-"
# Of netfilter: where new connections of pods wait for a verdict. Other programs like 0 and 100.
POLICY_QUEUE = 24_410
# Below the kernel's ports for outgoing connections: such a connection could take a port between choice and use.
_CHOSEN_PORTS = range(20_000, 30_000)
GPU_RESOURCE = "nvidia.com/gpu"
CONTAINERD_NAMESPACE = "k8s.io"


@dataclass(frozen=True)
class Ports:
    """TCP ports chosen free at start, so that the cluster shares no fixed port."""

    etcd_client: int
    etcd_peer: int
    api: int
    kubelet: int
    registry: int
    proxy_health: int
    proxy_metrics: int


def free_ports() -> Ports:
    """Choose ports free on every address, all held until the last is chosen."""
    sockets: list[socket.socket] = []
    try:
        sockets.extend(_bound() for _ in fields(Ports))
        return Ports(*(listener.getsockname()[1] for listener in sockets))
    finally:
        for listener in sockets:
            listener.close()


def free_port() -> int:
    """One such port."""
    with _bound() as listener:
        return int(listener.getsockname()[1])


def _bound() -> socket.socket:
    """A socket that holds a port of the chosen range on every address."""
    for port in random.sample(_CHOSEN_PORTS, len(_CHOSEN_PORTS)):
        listener = socket.socket()
        try:
            listener.bind(("", port))
        except OSError:
            listener.close()
        else:
            return listener
    raise ClusterError(f"no free port from {_CHOSEN_PORTS.start} to {_CHOSEN_PORTS.stop - 1}")
