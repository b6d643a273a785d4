"""Installs the Debian packages that the cluster needs and the machine lacks."""

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from devcluster.errors import ClusterError
from devcluster.processes import environment, run

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


def ensure(packages: dict[str, str]) -> None:
    """Install what is missing with apt.

    Raises ClusterError where that is impossible, with the list of what to install.
    """
    path = environment()["PATH"]
    missing = [package for package, program in packages.items() if not shutil.which(program, path=path)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ClusterError(f"missing: {', '.join(missing)} (Debian's names): install them, or run as root on Debian")
    _install(missing)


def _install(packages: Iterable[str]) -> None:
    names = sorted(packages)
    print(f"installing Debian packages: {' '.join(names)}", file=sys.stderr, flush=True)
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes"]
    run([*quiet, "update"])
    run([*quiet, "install", "--no-install-recommends", *names])
