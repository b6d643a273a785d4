"""Starts the node: bridge, containerd, kubelet, kube-proxy, and the enforcement of NetworkPolicies."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from devcluster import addresses, processes
from devcluster.addresses import Ports
from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.packages import CNI_PLUGINS
from devcluster.processes import Record, run

NETWORK = "qlora-devcluster"
POLICY_PROGRAM = "kube-network-policies"
_FORWARD = f"{addresses.CHAIN_PREFIX}FORWARD"
_MASQUERADE = f"{addresses.CHAIN_PREFIX}MASQUERADE"
_POLICIES = f"{addresses.CHAIN_PREFIX}POLICIES"
_BRIDGED = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
_QUEUES = Path("/proc/net/netfilter/nfnetlink_queue")
_START_SECONDS = 60
Start = Callable[[str, list[str]], Record]


def set_up_network() -> None:
    """Make the bridge, let pods reach the world through it, and nothing else.

    The CNI plugin could do both, but its chains are named after container ids; fixed names can be removed reliably.
    Raises ClusterError when the kernel would let packets between pods pass by its rules.
    """
    if not _BRIDGED.exists():
        raise ClusterError(f"no {_BRIDGED}: load the kernel module br_netfilter, which every Kubernetes node needs")
    _BRIDGED.write_text("1")
    bridge, subnet = addresses.BRIDGE, addresses.POD_SUBNET
    prefix = subnet.partition("/")[2]
    run(["ip", "link", "add", bridge, "type", "bridge"])
    run(["ip", "address", "add", f"{addresses.BRIDGE_ADDRESS}/{prefix}", "dev", bridge])
    run(["ip", "link", "set", bridge, "up"])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    rules = f"""*filter
:{_FORWARD} - [0:0]
-A {_FORWARD} -i {bridge} -j ACCEPT
-A {_FORWARD} -o {bridge} -j ACCEPT
-I FORWARD -j {_FORWARD}
COMMIT
*nat
:{_MASQUERADE} - [0:0]
-A {_MASQUERADE} -s {subnet} ! -d {subnet} -j MASQUERADE
-A POSTROUTING -j {_MASQUERADE}
COMMIT
"""
    run(["iptables-restore", "--noflush"], input_text=rules)


def start_containerd(layout: Layout, start: Start, sandbox_image: str) -> Record:
    """Start containerd: content in the cache, state in the cluster's folder."""
    network = layout.cluster / "cni"
    network.mkdir(parents=True, exist_ok=True)
    (network / "10-bridge.conflist").write_text(json.dumps(cni_configuration(layout.cluster / "addresses")))
    configuration = layout.cluster / "containerd.toml"
    configuration.write_text(containerd_configuration(layout, network, sandbox_image))
    record = start("containerd", ["--config", str(configuration)])
    log = layout.log("containerd")
    processes.until(lambda: _containerd_answers(layout), _START_SECONDS, "containerd", log, [record])
    return record


def ctr(layout: Layout, *arguments: str, seconds: float = 600) -> str:
    """Containerd's client, in the namespace that the kubelet uses."""
    address = ["--address", str(layout.containerd_socket), "--namespace", addresses.CONTAINERD_NAMESPACE]
    return run(["ctr", *address, *arguments], seconds=seconds)


def remove_containers(layout: Layout) -> None:
    """End and remove every container of containerd."""
    for task in ctr(layout, "tasks", "list", "--quiet").split():
        ctr(layout, "tasks", "delete", "--force", task, seconds=60)
    for container in ctr(layout, "containers", "list", "--quiet").split():
        ctr(layout, "containers", "delete", container, seconds=60)


def start_kubelet(layout: Layout, ports: Ports, start: Start) -> Record:
    """Start the kubelet; the node registers itself."""
    configuration = layout.cluster / "kubelet.yaml"
    configuration.write_text(yaml.safe_dump(kubelet_configuration(layout, ports)))
    arguments = [
        f"--config={configuration}",
        f"--kubeconfig={layout.cluster / 'kubelet.kubeconfig'}",
        f"--root-dir={layout.kubelet}",
        f"--cert-dir={layout.kubelet / 'pki'}",
        f"--hostname-override={addresses.NODE}",
        f"--node-ip={addresses.BRIDGE_ADDRESS}",
    ]
    return start("kubelet", arguments)


def start_kube_proxy(layout: Layout, ports: Ports, start: Start) -> Record:
    """Start kube-proxy in iptables mode, without changing the kernel's limits."""
    configuration = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(layout.cluster / "kube-proxy.kubeconfig")},
        "mode": "iptables",
        "bindAddress": addresses.BRIDGE_ADDRESS,
        "hostnameOverride": addresses.NODE,
        "clusterCIDR": addresses.POD_SUBNET,
        "healthzBindAddress": f"{addresses.LOOPBACK}:{ports.proxy_health}",
        "metricsBindAddress": f"{addresses.LOOPBACK}:{ports.proxy_metrics}",
        "iptables": {"localhostNodePorts": False},
        "conntrack": {"maxPerCore": 0, "min": 0},
    }
    path = layout.cluster / "kube-proxy.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return start("kube-proxy", [f"--config={path}"])


def start_network_policies(layout: Layout, start: Start) -> Record:
    """Let NetworkPolicies decide about each new connection from or to a pod; those of the node to pods are allowed.

    Without the program the queue drops its packets: pods then make no new connection.
    """
    kubeconfig = layout.cluster / f"{POLICY_PROGRAM}.kubeconfig"
    arguments = [f"--kubeconfig={kubeconfig}", f"--node={addresses.NODE}", f"--queue={addresses.POLICY_QUEUE}"]
    record = start(POLICY_PROGRAM, arguments)
    what, log = "NetworkPolicies to be enforced", layout.log(POLICY_PROGRAM)
    processes.until(_policies_are_enforced, _START_SECONDS, what, log, [record])
    run(["iptables-restore", "--noflush"], input_text=policy_rules())
    return record


def policy_rules() -> str:
    """Input for `iptables-restore --noflush` that queues the first packet of each connection from or to a pod.

    The rules are before those of kube-proxy that filter, so that an allowed connection meets these too.
    """
    bridge = addresses.BRIDGE
    return f"""*mangle
:{_POLICIES} - [0:0]
-A {_POLICIES} -m conntrack --ctstate ESTABLISHED,RELATED -j RETURN
-A {_POLICIES} -j NFQUEUE --queue-num {addresses.POLICY_QUEUE}
-I FORWARD -i {bridge} -j {_POLICIES}
-I FORWARD -o {bridge} ! -i {bridge} -j {_POLICIES}
-I INPUT -i {bridge} -j {_POLICIES}
COMMIT
"""


def _policies_are_enforced() -> bool:
    """Whether a process serves the queue, which it does once it has the policies."""
    if not _QUEUES.exists():
        return False
    return str(addresses.POLICY_QUEUE) in (line.split()[0] for line in _QUEUES.read_text().splitlines())


def cni_configuration(leases: Path) -> dict[str, object]:
    """Return the bridge that gives pods addresses, taken ones in folder `leases`."""
    bridge = {
        "type": "bridge",
        "bridge": addresses.BRIDGE,
        "isGateway": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": addresses.POD_SUBNET}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(leases),
        },
    }
    return {"cniVersion": "1.0.0", "name": NETWORK, "plugins": [bridge]}


def containerd_configuration(layout: Layout, network: Path, sandbox_image: str) -> str:
    """Containerd's TOML: our folders and socket, runc, and our CNI network."""
    return f"""version = 2
root = "{layout.containerd_content}"
state = "{layout.containerd_state}"
[grpc]
  address = "{layout.containerd_socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{sandbox_image}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{network}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = "{layout.cluster / "runc"}"
"""


def kubelet_configuration(layout: Layout, ports: Ports) -> dict[str, object]:
    """A kubelet that reserves nothing, evicts nothing, and keeps to its folder."""
    certificates = layout.certificates
    nothing = {"memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"}
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": addresses.BRIDGE_ADDRESS,
        "port": ports.kubelet,
        "readOnlyPort": 0,
        "healthzPort": 0,
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
        "podLogsDir": str(layout.cluster / "pod-logs"),
        "volumePluginDir": str(layout.kubelet / "volume-plugins"),
        "tlsCertFile": str(certificates / "kubelet.crt"),
        "tlsPrivateKeyFile": str(certificates / "kubelet.key"),
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(certificates / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "clusterDNS": [addresses.DNS_ADDRESS],
        "clusterDomain": addresses.DNS_DOMAIN,
        "resolvConf": str(resolver_configuration()),
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": ["none"],
        "failCgroupV1": False,
        "failSwapOn": False,
        "localStorageCapacityIsolation": False,
        "makeIPTablesUtilChains": False,
        "serializeImagePulls": False,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": nothing,
        "nodeStatusUpdateFrequency": "4s",
    }


def resolver_configuration(system: Path = Path("/run/systemd/resolve/resolv.conf")) -> Path:
    """Return the file of the machine's DNS servers, without systemd-resolved's stub."""
    return system if system.exists() else Path("/etc/resolv.conf")


def _containerd_answers(layout: Layout) -> bool:
    if not layout.containerd_socket.exists():
        return False
    try:
        ctr(layout, "version", seconds=5)
    except ClusterError:
        return False
    return True
