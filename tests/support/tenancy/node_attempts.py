"""Attempts of a tenant from inside its pods and on its volumes, which take a node: none of them reaches a neighbor.

The tenant has a running train job, and a shell in its pod. The test checks after each attempt that the neighbor's job
continues.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from devcluster.errors import ClusterError
from qlora_api.naming import JOB_LABEL
from tests.cluster.environment import Object, Tenant
from tests.support.tenancy.harmless_attempts import TIME, forged, result
from tests.support.tenancy.rejected_attempts import pod
from tests.support.tenancy.tenancy import TENANT_USER
from tests.support.waiting import eventually

CANARY = "hf_canarycanarycanarycanarycanary1234"
# Prints the attempts that succeed, by name. Each runs in a new process, so that no change reaches the next.
ESCAPES = """
import ctypes, os, socket, stat, traceback
libc = ctypes.CDLL(None, use_errno=True)
NODE = {"kubelet", "containerd", "systemd", "kthreadd"}
def call(*arguments):
    if getattr(libc, arguments[0])(*arguments[1:]) != 0:
        raise OSError(ctypes.get_errno(), "denied")
def strangers():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if open(f"/proc/{pid}/comm").read().strip() in NODE:
                return
        except OSError:  # ended meanwhile
            pass
    raise OSError("only its own")
def connect(path):
    socket.socket(socket.AF_UNIX).connect(path)
attempts = {
    "become root": lambda: os.setuid(0),
    "write to the image": lambda: open("/opt/attempt", "w"),
    "write to the job": lambda: open("/etc/qlora/attempt", "w"),
    "write to the model": lambda: open("/volumes/inputs/model/attempt", "w"),
    "mount": lambda: call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
    "another user namespace": lambda: call("unshare", 0x10000000),
    "the node's mounts": lambda: call("setns", os.open("/proc/1/ns/mnt", os.O_RDONLY), 0),
    "a device": lambda: os.mknod("/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(8, 0)),
    "a raw socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "the kernel's log": lambda: open("/dev/kmsg"),
    "the kernel's settings": lambda: os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY),
    "the kernel's keys": lambda: os.open("/proc/sysrq-trigger", os.O_WRONLY),
    "a larger limit of memory": lambda: os.open("/sys/fs/cgroup/memory.max", os.O_WRONLY),
    "a larger limit of memory (v1)": lambda: os.open("/sys/fs/cgroup/memory/memory.limit_in_bytes", os.O_WRONLY),
    "the node's processes": strangers,
    "containerd": lambda: connect("/run/containerd/containerd.sock"),
    "CRI-O": lambda: connect("/run/crio/crio.sock"),
    "Docker": lambda: connect("/var/run/docker.sock"),
    "a token of the API server": lambda: open("/var/run/secrets/kubernetes.io/serviceaccount/token"),
}
for name, attempt in attempts.items():
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os._exit(0)
        except OSError:
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1:
        print(name)
"""
# Prints where the first argument, which is given reversed, is found: files, and processes by their id. The audit log
# has the command, and is itself searched.
SEARCH = """
import os, sys
wanted = sys.argv[1][::-1].encode()
mounted = ("/workspace", "/volumes", "/config-maps", "/model-cache", "/secrets", "/credentials", "/etc")
for place in (*mounted, "/var/run/secrets", "/run", "/tmp", "/dev/shm"):
    for folder, _, names in os.walk(place):
        for name in names:
            path = os.path.join(folder, name)
            try:
                if os.path.isfile(path) and wanted in open(path, "rb").read():
                    print(path)
            except OSError:
                pass
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if wanted in open(f"/proc/{pid}/environ", "rb").read():
            print(pid)
    except OSError:
        pass
"""
_FILL = """
import errno, os
for path, size in (("/dev/shm/full", 1 << 30), ("/tmp/full", 1 << 28)):
    try:
        with open(path, "wb") as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    os.remove(path)
"""


@dataclass(frozen=True)
class Assault:
    """A tenant with a running train job, next to the neighbor's."""

    attacker: Tenant
    job: str
    neighbor: Tenant
    other: str
    other_pod: Object

    def kubectl(self, *arguments: str, input_text: str | None = None) -> str:
        """Kubectl with the rights of the tenant."""
        return self.attacker.kubectl(f"--as={TENANT_USER}", *arguments, input_text=input_text)

    def run(self, *command: str) -> str:
        """Output of a command in the tenant's train pod."""

        def running() -> Object | None:
            return self.attacker.running_pod(self.job, "train")

        name = (eventually(running, seconds=120, what="the tenant's own train pod") or {})["metadata"]["name"]
        return self.kubectl("exec", name, "--", *command)

    def require_neighbor_unharmed(self) -> None:
        """Its pod runs on, and nothing has been counted."""
        pod = self.neighbor.running_pod(self.other, "train")
        assert pod is not None
        assert pod["metadata"]["uid"] == self.other_pod["metadata"]["uid"]
        assert [one["restartCount"] for one in pod["status"]["containerStatuses"]] == [0]
        status = self.neighbor.status(self.other)
        assert (status["phase"], status.get("failures", 0), status.get("disruptions", 0)) == ("Training", 0, 0)


Attempt = Callable[[Assault], None]
ON_A_NODE: dict[str, Attempt] = {}


def attempt(function: Attempt) -> Attempt:
    """Collects it under its name, with blanks."""
    ON_A_NODE[function.__name__.replace("_", " ")] = function
    return function


@attempt
def a_shell_in_the_train_pod_of_another(a: Assault) -> None:
    metadata = a.other_pod["metadata"]
    elsewhere = (f"--as={TENANT_USER}", f"--namespace={metadata['namespace']}")
    for verb in ("exec", "attach", "logs"):
        with pytest.raises(ClusterError, match="is forbidden"):
            a.attacker.cluster.kubectl(verb, *elsewhere, metadata["name"], *(["--", "id"] if verb == "exec" else []))


@attempt
def a_debugging_container_in_a_train_pod(a: Assault) -> None:
    """Not even in the tenant's pod: it could run as another user and see the mounts."""
    name = (a.attacker.running_pod(a.job, "train") or {})["metadata"]["name"]
    with pytest.raises(ClusterError, match="is forbidden"):
        a.kubectl("debug", name, "--image=localhost/busybox:stable", "--target=trainer", "--", "id")


@attempt
def the_secrets_of_the_job_in_its_train_pod(a: Assault) -> None:
    """The job names a token, which prepare has read."""
    assert a.run("python3", "-c", SEARCH, CANARY[::-1]) == ""


@attempt
def ways_out_of_the_container(a: Assault) -> None:
    assert a.run("python3", "-c", ESCAPES) == ""


@attempt
def the_end_of_every_process(a: Assault) -> None:
    """Of the tenant's container, at most."""
    for target in ("-1", "1"):
        try:
            a.run("sh", "-c", f"kill -9 {target}")
        except ClusterError as ended:
            assert "exit code 137" in str(ended) or "exit status 1" in str(ended)  # noqa: PT017 - its own end


@attempt
def full_temporary_folders(a: Assault) -> None:
    a.run("python3", "-c", _FILL)


@attempt
def lies_in_a_log(a: Assault) -> None:
    other = a.neighbor.job(a.other)
    lie = {
        "kind": "progress",
        "jobUid": other["metadata"]["uid"],
        "podUid": a.other_pod["metadata"]["uid"],
        "step": "train",
        "trainingStep": 999_999,
        "totalSteps": 1_000_000,
        "loss": 0.0,
        "time": TIME,
    }
    shown = (a.attacker.status(a.job).get("progress") or {}).get("updatedAt")
    a.run("sh", "-c", 'printf "\\n%s\\n" "$0" > /proc/1/fd/1', json.dumps(lie))

    def read_again() -> bool:
        return (a.attacker.status(a.job).get("progress") or {}).get("updatedAt") not in (None, shown)

    eventually(read_again, seconds=120, what="a log that is read again")
    for tenant, name in ((a.attacker, a.job), (a.neighbor, a.other)):
        assert "999999" not in json.dumps(tenant.status(name).get("progress", {}))


@attempt
def last_words_about_the_job_of_another(a: Assault) -> None:
    """In a pod of the tenant's own that has the labels of the neighbor's."""
    other = a.neighbor.job(a.other)
    said = result(other, a.other_pod, step="train", outcome="failed", exit_code=14, reason="Diverged")
    body = pod(restartPolicy="Never")
    (container,) = body["spec"]["containers"]
    container |= {
        "image": a.attacker.cluster.images.operator,
        "command": ["sh", "-c", 'printf "%s" "$0" > /dev/termination-log; exit 14', said],
    }
    body |= {"metadata": forged("last-words", other, "train")}
    a.kubectl("create", "--filename=-", input_text=json.dumps(body))
    a.kubectl("wait", "pod/last-words", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s")
    (state,) = a.attacker.get("pod", "last-words")["status"]["containerStatuses"]
    assert state["state"]["terminated"]["message"] == said
    assert JOB_LABEL in body["metadata"]["labels"]
