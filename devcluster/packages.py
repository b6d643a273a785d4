"""Installs the Debian packages that the cluster and the tests need and the machine lacks."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from devcluster import console
from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.processes import environment

CNI_PLUGINS = Path("/usr/lib/cni")
# Debian package -> the program that shows it is there.
NODE = {
    "containerd": "containerd",
    "runc": "runc",
    "containernetworking-plugins": str(CNI_PLUGINS / "bridge"),
    "iptables": "iptables-restore",
    "iproute2": "ip",
    "docker-registry": "docker-registry",
    "buildah": "buildah",
    "busybox-static": "/bin/busybox",
}
IMAGE = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}
# The tests start a registry, and read and write firewall rules.
ALL = {**NODE, **IMAGE}


def missing(packages: Mapping[str, str]) -> list[str]:
    """The packages whose program is not on this machine."""
    path = environment()["PATH"]
    return [package for package, program in packages.items() if not shutil.which(program, path=path)]


def ensure(layout: Layout, packages: Mapping[str, str]) -> None:
    """Install what is missing with apt.

    Raises ClusterError where that is impossible, with the list of what to install.
    """
    wanted = missing(packages)
    if not wanted:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ClusterError(f"missing: {', '.join(wanted)} (Debian's names): install them, or run as root on Debian")
    _install(layout, wanted)


def _install(layout: Layout, packages: Iterable[str]) -> None:
    names = sorted(packages)
    console.say(f"installing Debian packages: {' '.join(names)}")
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes"]
    console.run_noisy(layout, [*quiet, "update"])
    console.run_noisy(layout, [*quiet, "install", "--no-install-recommends", *names])
