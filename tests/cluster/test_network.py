"""NetworkPolicies, enforced: the reachable peers of each step and the operator, in both directions.

Each attempt is repeated without the policies, and then succeeds: only the policies deny it. Their content is checked in
tests/unit/qlora_operator/decisions/manifests/test_network.py and tests/api/chart/test_rendered.py.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from devcluster import addresses, cluster, layout, node, product, toolchain
from devcluster.product import NAMESPACE as OPERATOR_NAMESPACE
from tests.cluster.environment import Cluster, Object, Tenant, new_namespace, tiny_job
from tests.support.services.outside import ELSEWHERE, METADATA, NETWORK, OTHER_PORT, STORE, STORE_PORT, outside
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow
LISTENING = 8_099
POLICIES: Object = {
    "profiles": {"default": {**product.SMALL_MACHINE["profiles"]["default"]}},
    "jobNetworkPolicies": {
        **product.SMALL_MACHINE["jobNetworkPolicies"],
        "servers": [{"cidr": NETWORK, "except": [f"{ELSEWHERE}/32"]}],
    },
}
POLICIES["profiles"]["default"]["objectStore"] = {"endpoint": f"http://{STORE}:{STORE_PORT}"}
# All attempts run in parallel; a denied packet is dropped, so a denied attempt lasts for its whole timeout.
_REACH = """
import concurrent.futures, json, socket, struct, sys
def reached(target):
    host, port, kind = target
    try:
        if kind == "tcp":
            socket.create_connection((host, port), timeout=3).close()
        else:
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            client.settimeout(3)
            client.sendto(bytes.fromhex("00010100000100000000000003617069000001" "0001"), (host, port))
            client.recv(512)
    except OSError:
        return False
    return True
targets = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(json.dumps(dict(zip(targets, pool.map(reached, targets.values())))))
"""
_LISTEN = """
import os, socket, sys
server = socket.create_server(("", int(sys.argv[1])))
if os.fork():
    os._exit(0)
os.setsid()
for descriptor in (0, 1, 2):
    os.close(descriptor)
while True:
    server.accept()[0].close()
"""
Targets = dict[str, tuple[str, int, str]]


@dataclass(frozen=True)
class Place:
    """A pod that makes and accepts connections."""

    cluster: Cluster
    pod: Object

    @property
    def address(self) -> str:
        return str(self.pod["status"]["podIP"])

    def reached(self, targets: Targets) -> set[str]:
        """Which of the targets answer."""
        return {name for name, answers in json.loads(self._python(_REACH, json.dumps(targets))).items() if answers}

    def listen(self, port: int = LISTENING) -> None:
        """Accept connections on that port until the pod ends."""
        self._python(_LISTEN, str(port))

    def _python(self, code: str, *arguments: str) -> str:
        metadata = self.pod["metadata"]
        where = f"--namespace={metadata['namespace']}"
        return self.cluster.kubectl("exec", where, metadata["name"], "--", "python3", "-c", code, *arguments)


@pytest.fixture(scope="module")
def beyond(installed: Cluster) -> Iterator[None]:
    """Policies are enforced, and a host outside the cluster answers."""
    where = layout.from_environment()
    toolchain.built(where, [node.POLICY_PROGRAM])
    assert not cluster.trouble(where), installed
    with cluster.locked(where):
        cluster.enforce_network_policies(where)
    with outside():
        yield


@pytest.fixture(scope="module")
def neighbor(installed: Cluster) -> Iterator[Place]:
    """A pod of another tenant, which listens too."""
    namespace = new_namespace(installed)
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "neighbor", "namespace": namespace},
        "spec": {
            "containers": [
                {
                    "name": "neighbor",
                    "image": installed.images.operator,
                    "command": ["sleep", "3600"],
                    "securityContext": security,
                }
            ],
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "terminationGracePeriodSeconds": 0,
        },
    }
    installed.kubectl("apply", "--filename=-", input_text=json.dumps(pod))
    installed.kubectl("wait", f"--namespace={namespace}", "--for=condition=Ready", "pod/neighbor", "--timeout=100s")
    place = Place(installed, installed.kubectl.get("pod", "neighbor", f"--namespace={namespace}"))
    place.listen(LISTENING)
    place.listen(STORE_PORT)
    yield place
    installed.kubectl("delete", "namespace", namespace, "--wait=false")


def targets(neighbor: Place) -> Targets:
    """Possible destinations of a pod."""
    ports = cluster.ports_of(layout.from_environment())
    return {
        "DNS": (addresses.DNS_ADDRESS, 53, "udp"),
        "DNS over TCP": (addresses.DNS_ADDRESS, 53, "tcp"),
        "the API server": (addresses.API_SERVICE_ADDRESS, 443, "tcp"),
        "the API server's node": (addresses.BRIDGE_ADDRESS, ports.api, "tcp"),
        "the kubelet": (addresses.BRIDGE_ADDRESS, ports.kubelet, "tcp"),
        "the cloud's credentials": (METADATA, 80, "tcp"),
        "the object store": (STORE, STORE_PORT, "tcp"),
        "another port of the object store": (STORE, OTHER_PORT, "tcp"),
        "another server": (ELSEWHERE, STORE_PORT, "tcp"),
        "a pod of another tenant": (neighbor.address, LISTENING, "tcp"),
        "a pod that listens as the object store does": (neighbor.address, STORE_PORT, "tcp"),
    }


@pytest.fixture
def told(installed: Cluster) -> Iterator[None]:
    """Install an operator whose profile and settings have the servers."""
    where = layout.from_environment()
    product.install(where, where.kubeconfig, installed.images, POLICIES)
    yield
    product.install(where, where.kubeconfig, installed.images)


@pytest.mark.usefixtures("beyond", "told")
def test_train_has_no_network_and_the_others_reach_the_profiles_servers(tenant: Tenant, neighbor: Place) -> None:
    wanted = targets(neighbor)
    named = {"DNS", "DNS over TCP", "the object store"}
    name = tenant.apply(tiny_job("cut-off"))
    reached = {}
    for step in ("prepare", "train"):
        with tenant.stopped(name, step) as halted:
            pod = Place(tenant.cluster, halted)
            pod.listen()
            own = {step: (pod.address, LISTENING, "tcp")}
            reached[step] = (pod.reached(wanted), neighbor.reached(own))
    with tenant.stopped(name, "publish") as halted:
        pod = Place(tenant.cluster, halted)
        pod.listen()
        own = {"publish": (pod.address, LISTENING, "tcp")}
        reached["publish"] = (pod.reached(wanted), neighbor.reached(own))
        tenant.kubectl("delete", "networkpolicies", "--all")
        # The same attempts, of the same pods.
        everything = eventually(lambda: pod.reached(wanted) == set(wanted), seconds=60, what="no policy")
        assert everything
        assert neighbor.reached(own) == {"publish"}
    assert reached == {"prepare": (named, set()), "train": (set(), set()), "publish": (named, set())}
    tenant.succeed(name)


@pytest.mark.usefixtures("beyond")
def test_the_operator_reaches_the_api_server_only_and_serves_metrics_only(
    installed: Cluster, tenant: Tenant, neighbor: Place
) -> None:
    where = layout.from_environment()
    ports = cluster.ports_of(where)
    policy = {"enabled": True, "apiServerPorts": [ports.api], "apiServerCIDRs": [f"{addresses.BRIDGE_ADDRESS}/32"]}
    operator = Place(installed, installed.operator_pod())
    operator.listen()
    (container,) = operator.pod["spec"]["containers"]
    own: Targets = {
        **{port["name"]: (operator.address, int(port["containerPort"]), "tcp") for port in container["ports"]},
        "another port": (operator.address, LISTENING, "tcp"),
    }
    wanted = targets(neighbor)
    product.install(where, where.kubeconfig, installed.images, {**product.SMALL_MACHINE, "networkPolicy": policy})
    try:
        allowed = {"the API server", "the API server's node"}
        eventually(lambda: operator.reached(wanted) == allowed, seconds=60, what="the policy")
        assert neighbor.reached(own) == {"metrics", "probes"}
        tenant.wait_for_phase(tenant.apply(tiny_job("unhindered", suspend=True)), "Suspended")
    finally:
        product.install(where, where.kubeconfig, installed.images)
    eventually(lambda: operator.reached(wanted) == set(wanted), seconds=60, what="no policy")
    assert neighbor.reached(own) == set(own)
    assert installed.operator_pod()["metadata"]["uid"] == operator.pod["metadata"]["uid"], OPERATOR_NAMESPACE
