"""Removes the cluster from the machine, however it ended, and reports leftovers."""

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from devcluster import machine, node, processes
from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.machine import Machine
from devcluster.processes import Record, run

# Programs that start pods or volumes end first, so that nothing comes back; containerd is last, it has the containers.
_LAST = ("containerd",)
_LOOPBACK_RESULTS = "cni-loopback"
_SETTLE_SECONDS = 15
# Later output of a program is thrown away anyhow.
_GRACE_SECONDS = 2


def down(layout: Layout) -> None:
    """Stop and remove everything that `up` made, then check.

    Every step is found by record or by name, not by memory of what `up` reached, and can be repeated.
    Raises ClusterError with the leftovers; records and logs then stay for the next try.
    """
    before = machine.load(layout.before)
    if before is None and not layout.cluster.exists():
        return
    before = before or machine.observe()
    _stop_programs(layout)
    _kill_containers(layout, before)
    _unmount(layout)
    _remove_firewall_rules()
    _remove_links()
    _remove_cgroups(before)
    _remove_files(layout, before)
    _restore_sysctls(before)
    left = settle(layout)
    if left:
        raise ClusterError("the cluster is down, but this is left:\n" + "\n".join(left))
    shutil.rmtree(layout.cluster)
    layout.before.unlink(missing_ok=True)


def settle(layout: Layout) -> list[str]:
    """The leftovers once the kernel has had time to remove devices and control groups."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (left := leftovers(layout)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def leftovers(layout: Layout) -> list[str]:
    """Return a line for each process, mount, device, rule or folder that is left."""
    before = machine.load(layout.before)
    named = {record.pid: record.name for record in _our_processes(layout, before)}
    found = [f"process {pid} ({name})" for pid, name in named.items()]
    found += [f"mount {path}" for path in machine.mounts() if _is_ours(layout, path)]
    veths = [str(link["ifname"]) for link in machine.links() if link.get("linkinfo", {}).get("info_kind") == "veth"]
    known = before.links if before else veths
    found += [f"network device {name}" for name in [*machine.bridge_links(), *veths] if name not in known]
    for family, saved in machine.firewall().items():
        found += [f"{family} rule {rule}" for rule in machine.our_rules(saved)]
    if before:
        found += [f"control group {path}" for path in machine.container_cgroups() if str(path) not in before.cgroups]
        found += [
            f"folder {path}" for path in machine.DIRECTORIES if Path(path).is_dir() and path not in before.directories
        ]
        for name, value in before.sysctls.items():
            if (now := machine.read_sysctl(name)) != value:
                found.append(f"kernel setting {name} = {now} (was {value})")
    return list(dict.fromkeys(found))


def _stop_programs(layout: Layout) -> None:
    running = [record for record in processes.records(layout.records) if processes.alive(record)]
    for record in reversed([record for record in running if record.name not in _LAST]):
        processes.stop(record, _GRACE_SECONDS)
    for record in running:
        if record.name == "containerd":
            # A containerd that hangs cannot help; its shims and containers are then ended one by one.
            with contextlib.suppress(ClusterError):
                node.remove_containers(layout)
            processes.stop(record, _GRACE_SECONDS)


def _kill_containers(layout: Layout, before: Machine | None) -> None:
    for record in _our_processes(layout, before):
        processes.stop(record, _GRACE_SECONDS)


def _our_processes(layout: Layout, before: Machine | None) -> Iterator[Record]:
    """Yield processes with our record, marker or socket in arguments, or containers."""
    yield from (record for record in processes.records(layout.records) if processes.alive(record))
    marker = f"{processes.MARKER}={layout.records}".encode()
    socket_path = str(layout.containerd_socket).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or is a kernel thread
        shim = arguments[0].endswith(b"containerd-shim-runc-v2") and socket_path in arguments
        if marker in environment or shim:
            record = processes.identify(int(folder.name), arguments[0].decode(errors="replace"))
            if record is not None and processes.alive(record):
                yield record
    for group in machine.container_cgroups():
        if before is not None and str(group) in before.cgroups:
            continue
        for listing in group.rglob("cgroup.procs"):
            for pid in _read_lines(listing):
                record = processes.identify(int(pid), "container process")
                if record is not None and processes.alive(record):
                    yield record


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # the group was removed in the meantime
        return []


def _is_ours(layout: Layout, mount: str) -> bool:
    return any(Path(mount).is_relative_to(folder) for folder in (layout.cluster, layout.containerd_content))


def _unmount(layout: Layout) -> None:
    """Unmount newest first, as mounts may be nested, and detach busy ones."""
    for path in reversed([path for path in machine.mounts() if _is_ours(layout, path)]):
        try:
            run(["umount", path])
        except ClusterError:
            run(["umount", "--lazy", path])


def _remove_firewall_rules() -> None:
    restore = {"iptables": "iptables-restore", "ip6tables": "ip6tables-restore"}
    for family, saved in machine.firewall().items():
        if removal := machine.rule_removal(saved):
            run([restore[family], "--noflush"], input_text=removal)


def _remove_links() -> None:
    for name in machine.bridge_links():
        try:
            run(["ip", "link", "delete", name])
        except ClusterError:
            # The kernel removes a pair by itself some time after its network namespace; then it is gone already.
            if name in machine.bridge_links():
                raise


def _remove_cgroups(before: Machine) -> None:
    for group in machine.container_cgroups():
        if str(group) in before.cgroups:
            continue
        deepest_first = sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True)
        for folder in [*deepest_first, group]:
            _remove_empty(folder)


def _remove_files(layout: Layout, before: Machine) -> None:
    """Remove CNI's results of our pods, dead sockets, and new empty folders."""
    results = Path("/var/lib/cni/results")
    for result in results.glob(f"{node.NETWORK}-*"):
        container = result.name.removeprefix(f"{node.NETWORK}-").removesuffix("-eth0")
        (results / f"{_LOOPBACK_RESULTS}-{container}-lo").unlink(missing_ok=True)
        result.unlink()
    for folder in ("/run/containerd/s", "/var/lib/kubelet/device-plugins"):
        for path in Path(folder).glob("*"):
            if folder not in before.directories and path.is_socket() and not _is_served(path):
                path.unlink()
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and link.readlink().is_relative_to(layout.cluster):
            link.unlink()
    for name in machine.DIRECTORIES:
        if name not in before.directories:
            _remove_empty(Path(name))


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def _remove_empty(folder: Path) -> None:
    try:
        os.rmdir(folder)
    except OSError:
        return  # missing, or another program uses it; `leftovers` reports which


def _restore_sysctls(before: Machine) -> None:
    for name, value in before.sysctls.items():
        if machine.read_sysctl(name) != value:
            (Path("/proc/sys") / name).write_text(value)
