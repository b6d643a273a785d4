"""The control of what a tenant tries in its pod: where nothing is in its way, every attempt succeeds.

An attempt that could not succeed anywhere, because of a wrong path or the wrong call, would show nothing in a pod.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_api import contract
from tests.support.node_attempts import CANARY, ESCAPES, SEARCH

# Runs the program that is the first argument with the rest of them, where the folder that is the second is the root:
# mounted, not only chroot(2), after which the kernel makes no user namespace.
_IN_A_ROOT_OF_ITS_OWN = """
import ctypes, os, socket, stat, sys, traceback
program, root = sys.argv[1], sys.argv[2]
sys.argv[1:] = sys.argv[3:]
libc = ctypes.CDLL(None, use_errno=True)
def mount(*arguments):
    if libc.mount(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"mount: {arguments}")
MS_BIND, MS_MOVE, MS_REC = 0x1000, 0x2000, 0x4000
os.mkdir(f"{root}/real-proc")
mount(b"/proc", f"{root}/real-proc".encode(), None, MS_BIND | MS_REC, None)
os.chdir(root)
mount(b".", b"/", None, MS_MOVE, None)
os.chroot(".")
servers = []
for path in ("/run/containerd/containerd.sock", "/run/crio/crio.sock", "/var/run/docker.sock"):
    servers.append(socket.socket(socket.AF_UNIX))
    servers[-1].bind(path)
    servers[-1].listen()
exec(program)
"""
_FOLDERS = ("opt", "mnt", "tmp", "run/containerd", "run/crio")
_FILES = {
    "dev/kmsg": "",
    "proc/sys/kernel/core_pattern": "",
    "proc/sysrq-trigger": "",
    "proc/77/comm": "kubelet\n",
    "sys/fs/cgroup/memory.max": "",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "",
    "var/run/secrets/kubernetes.io/serviceaccount/token": "",
}


def _is_root_of_the_machine() -> bool:
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def run_in(root: Path, program: str, *arguments: str) -> list[str]:
    """The lines that the program prints as root, in namespaces of its own, where the folder is all that there is."""
    mapped = () if _is_root_of_the_machine() else ("--map-root-user",)
    mounted = f'mount -t tmpfs none "$0" && cp -a "$1"/. "$0" && exec {sys.executable} -c "$2" "$3" "$0" "${{@:4}}"'
    inside = root.with_name("inside")
    inside.mkdir()
    script = ["bash", "-c", mounted, str(inside), str(root), _IN_A_ROOT_OF_ITS_OWN, program, *arguments]
    done = subprocess.run(
        ["unshare", "--mount", "--net", *mapped, *script], capture_output=True, text=True, check=False
    )
    if done.stderr.startswith(("unshare:", "mount:")):
        pytest.skip(f"needs the right to make namespaces: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_every_way_out_of_a_container_is_one_where_nothing_is_in_the_way(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in (*_FOLDERS, str(contract.JOB_FILE.parent)[1:], f"{contract.VOLUMES_MOUNT}/inputs/model"[1:]):
        (root / folder).mkdir(parents=True)
    for name, content in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    (root / "proc/1/ns").mkdir(parents=True)
    (root / "proc/1/ns/mnt").symlink_to("/real-proc/self/ns/mnt")
    (root / "proc/1/comm").write_text("python3\n")
    attempts = re.findall(r'^    "(.+?)": ', ESCAPES, re.MULTILINE)
    assert len(attempts) == 19
    # The kernel makes devices for root alone, and not for whoever is root of a user namespace.
    assert run_in(root, ESCAPES) == [name for name in attempts if name != "a device" or _is_root_of_the_machine()]


_MOUNTS = (
    contract.WORKSPACE_MOUNT,
    contract.VOLUMES_MOUNT,
    contract.CONFIG_MAPS_MOUNT,
    contract.MODEL_CACHE_MOUNT,
    contract.TOKEN_FILE.parent,
    contract.CREDENTIALS_MOUNT,
    contract.JOB_FILE.parent,
    "/var/run/secrets/kubernetes.io",
)


def test_a_secret_is_found_wherever_it_lies(tmp_path: Path) -> None:
    root = tmp_path / "root"
    files = [f"{place}/deep/in/it" for place in (*_MOUNTS, "/run", "/tmp", "/dev/shm")]
    for file in files:
        (root / file[1:]).parent.mkdir(parents=True, exist_ok=True)
        (root / file[1:]).write_text(f"before {CANARY} after")
    (root / "proc/77").mkdir(parents=True)
    (root / "proc/77/environ").write_text(f"PATH=/bin\0HF_TOKEN={CANARY}\0")
    (root / "run/containerd").mkdir()
    (root / "run/crio").mkdir()
    assert sorted(run_in(root, SEARCH, CANARY)) == sorted([*files, "77"])
