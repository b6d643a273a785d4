"""Reads the state of the machine that a cluster changes: settings, mounts, devices, firewall rules, control groups."""

import ipaddress
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from devcluster import addresses
from devcluster.errors import ClusterError
from devcluster.processes import environment, run

# Written by the kubelet (pkg/kubelet/cm/container_manager_linux.go), by kube-proxy, and by us.
SYSCTLS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/route_localnet",
    "net/bridge/bridge-nf-call-iptables",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_tcp_timeout_established",
    "net/netfilter/nf_conntrack_tcp_timeout_close_wait",
)
# Made by containerd, the kubelet and the CNI plugins outside the folders that we give them.
DIRECTORIES = (
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd",
    "/run/netns",
    "/var/log/containers",
    "/var/log/pods",
    "/var/lib/cni/results",
    "/var/lib/cni/cache",
    "/var/lib/cni",
    "/var/lib/kubelet/device-plugins",
    "/var/lib/kubelet",
)
_TABLES = {"iptables": "iptables-save", "ip6tables": "ip6tables-save"}
_PREFIX = f"(KUBE-|{addresses.CHAIN_PREFIX})"
_CHAIN = re.compile(rf":(?P<name>{_PREFIX}\S*)")
_RULE = re.compile(f"-A {_PREFIX}")
_JUMP = re.compile(f" -[jg] {_PREFIX}")


@dataclass(frozen=True)
class Machine:
    """The state of the above: settings by name, and the names of the rest."""

    sysctls: dict[str, str]
    links: list[str]
    cgroups: list[str]
    directories: list[str]
    mounts: list[str]

    def save(self, path: Path) -> None:
        """Write as JSON, all or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(asdict(self), indent=1))
        unfinished.replace(path)


def load(path: Path) -> Machine | None:
    """The machine that `save` wrote, or None when there is no such file."""
    return Machine(**json.loads(path.read_text())) if path.exists() else None


def observe() -> Machine:
    """The machine as it is now."""
    return Machine(
        sysctls={name: text for name in SYSCTLS if (text := read_sysctl(name)) is not None},
        links=[str(link["ifname"]) for link in links()],
        cgroups=[str(path) for path in container_cgroups()],
        directories=[name for name in DIRECTORIES if Path(name).is_dir()],
        mounts=mounts(),
    )


def read_sysctl(name: str) -> str | None:
    """A kernel setting, None when this kernel lacks it."""
    path = Path("/proc/sys") / name
    return path.read_text().strip() if path.exists() else None


def links() -> list[dict[str, Any]]:
    """Network devices as `ip` describes them."""
    return list(json.loads(run(["ip", "-json", "-details", "link", "show"]) or "[]")) if _has("ip") else []


def bridge_links() -> list[str]:
    """Return the pods' veth links on our bridge, and the bridge last."""
    found = links()
    members = [str(link["ifname"]) for link in found if link.get("master") == addresses.BRIDGE]
    return [*members, *(str(link["ifname"]) for link in found if link["ifname"] == addresses.BRIDGE)]


def mounts() -> list[str]:
    """Mount points, in the order of mounting."""
    # proc_pid_mountinfo(5): the fifth field, with space, tab, newline and backslash as octal escapes.
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split(" ")[4]) for line in lines]


def container_cgroups() -> Iterator[Path]:
    """Containerd's folder in each control group hierarchy (version 1 has several)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        kind = line.partition(" - ")[2].split(" ")[0]
        folder = Path(line.split(" ")[4]) / addresses.CONTAINERD_NAMESPACE
        if kind in ("cgroup", "cgroup2") and folder.is_dir():
            yield folder


def firewall() -> dict[str, str]:
    """Return each family's rules (iptables, ip6tables), empty without iptables."""
    found = {}
    for family, command in _TABLES.items():
        found[family] = run([command]) if _has(command) else ""
    return found


def our_rules(saved: str) -> list[str]:
    """Return iptables-save lines about chains of kube-proxy or this cluster."""
    return [line for line in saved.splitlines() if _CHAIN.match(line) or _RULE.match(line) or _JUMP.search(line)]


def rule_removal(saved: str) -> str:
    """Input for `iptables-restore --noflush` that removes exactly our chains and the jumps to them.

    `saved` is the output of iptables-save; the result is empty when nothing is ours.
    """
    output: list[str] = []
    table = ""
    chains: list[str] = []
    jumps: list[str] = []
    for line in saved.splitlines():
        if line.startswith("*"):
            table, chains, jumps = line, [], []
        elif chain := _CHAIN.match(line):
            chains.append(chain["name"])
        elif _JUMP.search(line) and not _RULE.match(line):
            jumps.append(line)
        elif line == "COMMIT" and (chains or jumps):
            output += [table, *(f":{chain} - [0:0]" for chain in chains)]  # naming a chain here empties it
            output += [f"-D{jump[2:]}" for jump in jumps]
            output += [*(f"-X {chain}" for chain in chains), "COMMIT"]
    return "\n".join([*output, ""]) if output else ""


def _has(program: str) -> bool:
    """Whether a program is installed: `down` also works without any cluster."""
    return shutil.which(program, path=environment()["PATH"]) is not None


def reject_conflicts() -> None:
    """Raise ClusterError if the machine is a Kubernetes node or uses our addresses."""
    for family, saved in firewall().items():
        if rules := our_rules(saved):
            raise ClusterError(
                f"{family} already has rules of a Kubernetes node, such as `{rules[0]}`: stop that node first, "
                "or use another machine"
            )
    ours = [ipaddress.ip_network(addresses.POD_SUBNET), ipaddress.ip_network(addresses.SERVICE_SUBNET)]
    for route in json.loads(run(["ip", "-json", "-4", "route", "show"]) or "[]"):
        destination = str(route["dst"])
        if destination == "default":
            continue
        for network in ours:
            if network.overlaps(ipaddress.ip_network(destination)):
                raise ClusterError(
                    f"the route to {destination} over {route.get('dev')} overlaps the cluster's network {network}: "
                    "change devcluster/addresses.py"
                )
