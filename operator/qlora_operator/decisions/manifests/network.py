"""Builds the NetworkPolicies for the pods of jobs from the administrator's settings."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from qlora_api.connections import TrackingServers
from qlora_api.naming import CLOUD_IDENTITY_LABEL, JOB_LABEL, STEP_LABEL
from qlora_api.profile import Profile
from qlora_api.schema import ApiModel

Manifest = dict[str, Any]
Port = Annotated[int, Field(ge=1, le=65535)]
Cidr = Annotated[str, Field(max_length=64, pattern=r"^[0-9a-fA-F.:]+/[0-9]+$")]

# GKE's metadata server, which also answers at port 988, and the agent of EKS Pod Identity. IRSA and Azure use servers
# outside the cluster, at port 443.
_CREDENTIALS = {
    "google": ((80, 988), ("169.254.169.254/32", "169.254.169.252/32")),
    "aws": ((80,), ("169.254.170.23/32", "fd00:ec2::23/128")),
}


class IpBlock(ApiModel):
    """Addresses, as the ipBlock of a NetworkPolicy."""

    cidr: Cidr = Field(description="Network of the addresses.")
    except_: Annotated[tuple[Cidr, ...], Field(max_length=64)] | None = Field(
        None, alias="except", description="Networks in it that are left out."
    )


class LabelSelector(ApiModel):
    """Selects by labels, as in a NetworkPolicy; all if there are none."""

    match_labels: dict[str, str] = Field({}, description="Labels that all must match.")


class Peer(ApiModel):
    """Pods or addresses, as a peer of a NetworkPolicy."""

    namespace_selector: LabelSelector | None = Field(None, description="Namespaces of the pods; the job's if not set.")
    pod_selector: LabelSelector | None = Field(None, description="Labels of the pods; all of them if not set.")
    ip_block: IpBlock | None = Field(None, description="Addresses, without the two others.")

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        if (self.ip_block is None) == (self.namespace_selector is None and self.pod_selector is None):
            raise ValueError("a peer has ipBlock, or namespaceSelector, podSelector or both: set one kind")
        return self


def _in_kube_system(app: str) -> Peer:
    return Peer(
        namespace_selector=LabelSelector(match_labels={"kubernetes.io/metadata.name": "kube-system"}),
        pod_selector=LabelSelector(match_labels={"k8s-app": app}),
    )


class Dns(ApiModel):
    """The pods that answer DNS."""

    ports: Annotated[tuple[Port, ...], Field(min_length=1, max_length=8)] = Field(
        (53,), description="Ports of the pods, which may differ from those of their Service."
    )
    to: Annotated[tuple[Peer, ...], Field(min_length=1, max_length=16)] = Field(
        (
            _in_kube_system("kube-dns"),
            _in_kube_system("node-local-dns"),
            Peer(ip_block=IpBlock(cidr="169.254.20.10/32")),
        ),
        description="The pods, and the address of NodeLocal DNSCache.",
    )

    def egress(self) -> Manifest:
        """Build the rule that lets pods resolve names."""
        ports = [{"port": port, "protocol": protocol} for port in self.ports for protocol in ("UDP", "TCP")]
        return {"to": [peer.dump() for peer in self.to], "ports": ports}


DEFAULT_DNS = Dns()


class JobNetworkPolicies(ApiModel):
    """NetworkPolicies for the pods of jobs."""

    enabled: bool = Field(
        True, description="Create them in each namespace where the operator creates a Job, before the first one."
    )
    servers: Annotated[tuple[IpBlock, ...], Field(min_length=1, max_length=64)] = Field(
        (
            IpBlock(cidr="0.0.0.0/0", except_=("169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32")),
            IpBlock(cidr="::/0", except_=("fe80::/10", "fd00:ec2::/32", "fd20:ce::254/128")),
        ),
        description="Addresses of the servers that prepare and publish reach.",
    )
    ports: Annotated[tuple[Port, ...], Field(max_length=64)] = Field(
        (), description="Ports of these servers besides those in the profiles."
    )
    dns: Dns = Field(DEFAULT_DNS, description="The pods that answer DNS.")


def build_policies(network: JobNetworkPolicies, profiles: Iterable[Profile]) -> list[Manifest]:
    """Build the policies of one namespace.

    Two of them cut off the pods of all steps, and let prepare and publish reach DNS and the servers of the profiles.
    The others let pods with an identity of the cloud reach the source of its credentials. Empty lists are set too, so
    that rules of another writer disappear.
    """
    known = tuple(profiles)
    ports = {port for profile in known for port in _server_ports(profile)} | set(network.ports)
    servers = {"to": [{"ipBlock": block.dump()} for block in network.servers], "ports": _tcp(sorted(ports))}
    fetching = {"key": STEP_LABEL, "operator": "In", "values": ["prepare", "publish"]}
    providers = {profile.cloud_identity.provider for profile in known if profile.cloud_identity is not None}
    return [
        _policy("qlora-jobs", [], {"policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": []}),
        _policy("qlora-servers", [fetching], _egress(network.dns.egress(), servers)),
        *(_identity(provider) for provider in sorted(providers & _CREDENTIALS.keys())),
    ]


def _identity(provider: str) -> Manifest:
    ports, addresses = _CREDENTIALS[provider]
    source = {"to": [{"ipBlock": {"cidr": address}} for address in addresses], "ports": _tcp(ports)}
    label = {"key": CLOUD_IDENTITY_LABEL, "operator": "In", "values": [provider]}
    return _policy(f"qlora-identity-{provider}", [label], _egress(source))


def _policy(name: str, selected: list[Manifest], rules: Manifest) -> Manifest:
    pods = {"matchExpressions": [{"key": JOB_LABEL, "operator": "Exists"}, *selected]}
    labels = {"app.kubernetes.io/part-of": "qlora", "app.kubernetes.io/managed-by": "qlora-operator"}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": labels},
        "spec": {"podSelector": pods, **rules},
    }


def _egress(*rules: Manifest) -> Manifest:
    return {"policyTypes": ["Egress"], "egress": list(rules)}


def _tcp(ports: Iterable[int]) -> list[Manifest]:
    return [{"port": port, "protocol": "TCP"} for port in ports]


def _server_ports(profile: Profile) -> Iterator[int]:
    """Yield the ports of the servers that steps with this profile may use."""
    for url in _servers(profile):
        try:
            address = urlsplit(url)
            yield address.port or (80 if address.scheme == "http" else 443)
        except ValueError:
            # No client can use such an address either: prepare fails with its text.
            continue


def _servers(profile: Profile) -> Iterator[str]:
    yield profile.hub_endpoint or "https://huggingface.co"
    yield profile.object_store.endpoint or "https://s3.amazonaws.com"
    if (google := profile.google_storage) is not None:
        yield google.endpoint or "https://storage.googleapis.com"
    if (azure := profile.azure_storage) is not None:
        yield azure.endpoint or "https://blob.core.windows.net"
    if profile.https_proxy is not None:
        yield profile.https_proxy
    tracking = profile.tracking or TrackingServers()
    yield from (server.url for server in (tracking.mlflow, tracking.wandb) if server is not None)
    yield from (each if "://" in each else f"https://{each}" for each in profile.registries)
