"""Starts the processes of every load, a control plane and the operator, and reads what they use."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import yaml

from benchmarks.memory import peak_resident_bytes, resident_bytes
from benchmarks.operator.objects import operator_settings, profile
from devcluster import processes
from devcluster.addresses import free_port
from devcluster.controlplane import ControlPlane, running
from devcluster.product import DEFINITIONS

ROOT = Path(__file__).parents[2]
# Without storage, an Event of each claim is written every 15 seconds: hundreds of writes a second.
_NO_VOLUMES = "--controllers=*,-persistentvolume-binder-controller"
# The controller manager's defaults are for a cluster where Jobs come one by one: 20 requests per second.
UNHURRIED: tuple[str, ...] = ()
HURRIED = ("--kube-api-qps=1000", "--kube-api-burst=1000", "--concurrent-job-syncs=16")
_END_SECONDS = 30
# A library of the trackers brings google-auth, which the operator's image lacks: the Kubernetes client imports it where
# it is, and it takes ten MiB.
_AS_IN_THE_IMAGE = """
import runpy, sys
sys.modules["google.auth"] = None
runpy.run_module("qlora_operator", run_name="__main__", alter_sys=True)
"""
MIB = 2**20
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Processes:
    """One process, or several that do one work together."""

    pids: tuple[int, ...]

    def processor_seconds(self) -> float:
        """Their processor time so far."""
        return sum(_processor_seconds(pid) for pid in self.pids)

    def resident_mib(self) -> float:
        """The memory that they hold now."""
        return round(sum(resident_bytes(pid) for pid in self.pids) / MIB, 1)

    def peak_mib(self) -> float:
        """The sum of their peaks."""
        return round(sum(peak_resident_bytes(pid) for pid in self.pids) / MIB, 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum of at least two values."""
    cuts = quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3), "max": round(max(values), 3)}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def control_plane(namespaces: Sequence[str], controllers: Sequence[str] = UNHURRIED) -> Iterator[ControlPlane]:
    """Start etcd, an API server with the resource and namespaces, and the controllers."""
    with running(controller_manager=True, controller_options=(_NO_VOLUMES, *controllers)) as plane:
        for definition in sorted((ROOT / "crds").glob("*.yaml")):
            plane.kubectl.apply(definition.read_text())
        for namespace in namespaces:
            plane.kubectl("create", "namespace", namespace)
        plane.kubectl("wait", "--for=condition=Established", *(f"crd/{each}" for each in DEFINITIONS))
        plane.kubectl.apply(json.dumps(profile()))
        yield plane


def processes_of(plane: ControlPlane) -> dict[str, Processes]:
    """Return the processes of etcd, kube-apiserver and kube-controller-manager."""
    return {each.name: Processes((each.pid,)) for each in processes.records(plane.directory / "processes")}


@contextmanager
def controllers_paused(plane: ControlPlane) -> Iterator[None]:
    """Stop kube-controller-manager during the block."""
    (pid,) = processes_of(plane)["kube-controller-manager"].pids
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def api_server(plane: ControlPlane) -> Processes:
    """The API server's process."""
    return processes_of(plane)["kube-apiserver"]


@contextmanager
def program(
    plane: ControlPlane, command: Sequence[str | Path], **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process with KUBECONFIG, and print its output if it ends unexpectedly."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "KUBECONFIG": str(plane.kubeconfig), **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            if process.poll() is not None:
                log.seek(0)
                sys.stderr.write(log.read()[-4000:].decode(errors="replace"))
            process.terminate()
            process.wait(_END_SECONDS)


@contextmanager
def operator(plane: ControlPlane, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The operator with its default settings, apart from these."""
    with tempfile.TemporaryDirectory(prefix="qlora-operator-") as folder:
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(operator_settings(free_port(), free_port()) | settings))
        with program(plane, [sys.executable, "-c", _AS_IN_THE_IMAGE, "--settings", str(file)]) as process:
            yield process


async def until(
    condition: Callable[[], Awaitable[bool]],
    what: str,
    *needed: subprocess.Popen[bytes],
    seconds: float = 300,
    every: float = 0.5,
) -> None:
    """Wait until the condition holds.

    Raises TimeoutError, or ChildProcessError if a process that it needs has ended.
    """
    deadline = time.monotonic() + seconds
    while not await condition():
        if any(process.poll() is not None for process in needed):
            raise ChildProcessError(f"what was to lead to {what} has ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {seconds:.0f} s")
        await asyncio.sleep(every)


@asynccontextmanager
async def background(*work: Awaitable[None]) -> AsyncIterator[None]:
    """Do this work during the block. An error of it ends the block."""

    async def do(each: Awaitable[None]) -> None:
        await each

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(do(each)) for each in work]
        yield
        for task in tasks:
            task.cancel()
