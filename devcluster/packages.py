"""Installs the Debian packages that the cluster and the tests need and the machine lacks."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from devcluster import console
from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.processes import environment

CNI_PLUGINS = Path("/usr/lib/cni")
# Debian package -> the program that shows that it is installed.
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
# Of C, for Go packages that contain some; libc6-dev has the headers, and needs the package of gencat.
COMPILER = {"gcc": "gcc", "libc6-dev": "gencat"}
# The tests start a registry, and read and write firewall rules.
ALL = {**NODE, **IMAGE}
# Program -> the package whose files are kept in the cache: installed, it would start a service on the machine.
UNPACKED = {"prometheus": "prometheus", "promtool": "prometheus"}
_QUIET = ("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes")


def missing(packages: Mapping[str, str]) -> list[str]:
    """The packages whose program is not on this machine."""
    path = environment()["PATH"]
    return [package for package, program in packages.items() if not shutil.which(program, path=path)]


def ensure(layout: Layout, packages: Mapping[str, str]) -> None:
    """Install missing packages with apt.

    Raises ClusterError where that is impossible, with the missing packages.
    """
    wanted = missing(packages)
    if not wanted:
        return
    _require_apt(wanted)
    _install(layout, wanted)


def unpack(layout: Layout) -> None:
    """Keep the files of the packages of UNPACKED in the cache.

    Raises ClusterError where that is impossible, with the missing packages.
    """
    wanted = sorted({package for program, package in UNPACKED.items() if not _kept(layout, program).exists()})
    if not wanted:
        return
    if not _has_apt():
        raise ClusterError(
            f"missing below {layout.packages}: the files of Debian's {', '.join(wanted)}: run `python -m devcluster "
            "packages` as root on Debian (one that is installed on the machine is not used)"
        )
    console.say(f"fetching Debian packages, without installing them: {' '.join(wanted)}")
    console.run_noisy(layout, [*_QUIET, "update"])
    layout.packages.mkdir(parents=True, exist_ok=True)
    for package in wanted:
        with tempfile.TemporaryDirectory(dir=layout.packages) as folder:
            console.run_noisy(layout, ["env", "--chdir", folder, *_QUIET, "download", package])
            [archive] = Path(folder).glob("*.deb")
            files = Path(folder) / "files"
            console.run_noisy(layout, ["dpkg-deb", "--extract", archive, files])
            shutil.rmtree(layout.packages / package, ignore_errors=True)
            files.rename(layout.packages / package)


def unpacked(layout: Layout, program: str) -> Path:
    """The path of a program of UNPACKED, for tests, which install nothing.

    Raises ClusterError with the command to run where it is missing.
    """
    if not (path := _kept(layout, program)).exists():
        raise ClusterError(f"missing: {program}; run `python -m devcluster packages`")
    return path


def _kept(layout: Layout, program: str) -> Path:
    return layout.packages / UNPACKED[program] / "usr" / "bin" / program


def _has_apt() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def _require_apt(wanted: Iterable[str]) -> None:
    if not _has_apt():
        raise ClusterError(f"missing: {', '.join(wanted)} (Debian's names): install them, or run as root on Debian")


def _install(layout: Layout, packages: Iterable[str]) -> None:
    names = sorted(packages)
    console.say(f"installing Debian packages: {' '.join(names)}")
    console.run_noisy(layout, [*_QUIET, "update"])
    console.run_noisy(layout, [*_QUIET, "install", "--no-install-recommends", *names])
