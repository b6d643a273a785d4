"""Adds DNS, volumes, and simulated GPUs, which only the scheduler uses."""

import secrets
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from string import Template

from devcluster import addresses
from devcluster.kubectl import Kubectl
from devcluster.layout import Layout
from devcluster.processes import Record

_MANIFESTS = Path(__file__).parent / "manifests"


def apply_dns(kubectl: Kubectl, image: str) -> None:
    """Install CoreDNS as a Deployment behind the Service that the kubelet writes into each pod's resolv.conf."""
    values = {"image": image, "domain": addresses.DNS_DOMAIN, "address": addresses.DNS_ADDRESS}
    kubectl.apply(Template((_MANIFESTS / "dns.yaml").read_text()).substitute(values))


def dns_works() -> bool:
    """Whether the cluster's DNS resolves the API server's Service, asked through the Service's own address."""
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
    """A DNS question for the A records of `name`, with recursion desired (RFC 1035, section 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return identity + struct.pack(">HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


def allow_network_policies(kubectl: Kubectl) -> None:
    """Let the program that enforces NetworkPolicies read them, and the pods and namespaces that they select."""
    kubectl.apply((_MANIFESTS / "network-policies.yaml").read_text())


def start_storage(layout: Layout, kubectl: Kubectl, start: Callable[[str, list[str]], Record], image: str) -> Record:
    """Install the default StorageClass `local-path` and start its provisioner on the host."""
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
    """Make the node claim `count` GPUs. The kubelet drops them when it restarts, so set them again after that."""
    node = kubectl.get("node", addresses.NODE)
    if gpus(kubectl) == count:
        return
    key = addresses.GPU_RESOURCE.replace("/", "~1")
    fields = [field for field in ("capacity", "allocatable") if field in node["status"]]
    operations = [{"op": "add", "path": f"/status/{field}/{key}", "value": str(count)} for field in fields]
    kubectl.patch_status(f"node/{addresses.NODE}", operations)


def gpus(kubectl: Kubectl) -> int:
    """The number of GPUs that the scheduler may assign."""
    return int(kubectl.get("node", addresses.NODE)["status"].get("allocatable", {}).get(addresses.GPU_RESOURCE, 0))
