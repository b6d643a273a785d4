"""Where the cluster keeps its files: caches that survive `down`, and one folder that `down` removes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devcluster.errors import ClusterError

# A Unix socket's path may have 107 bytes; the longest below `cluster` is the kubelet's, for pod resources.
LONGEST_CACHE_PATH = 60


@dataclass(frozen=True)
class Layout:
    """Paths derived from the cache folder; creating them is up to their users."""

    cache: Path

    @property
    def bin(self) -> Path:
        """Binaries, one folder per tool module and version (kept)."""
        return self.cache / "bin"

    @property
    def packages(self) -> Path:
        """Files of Debian packages that are not installed, one folder per package (kept)."""
        return self.cache / "packages"

    @property
    def containerd_content(self) -> Path:
        """Containerd's images and snapshots (kept)."""
        return self.cache / "containerd"

    @property
    def registry(self) -> Path:
        """Blobs of the local registry (kept)."""
        return self.cache / "registry"

    @property
    def lock(self) -> Path:
        """Held by `up`, `down` and `load`, so that only one of them runs."""
        return self.cache / "cluster.lock"

    @property
    def build_log(self) -> Path:
        """The output of installers and image builders."""
        return self.cache / "build.log"

    @property
    def before(self) -> Path:
        """The machine's state before `up`; removed when `down` has restored it."""
        return self.cache / "machine-before.json"

    @property
    def cluster(self) -> Path:
        """The running cluster: sockets, records, logs, volumes (removed by `down`)."""
        return self.cache / "cluster"

    @property
    def records(self) -> Path:
        return self.cluster / "processes"

    @property
    def logs(self) -> Path:
        return self.cluster / "logs"

    @property
    def certificates(self) -> Path:
        return self.cluster / "certificates"

    @property
    def kubeconfig(self) -> Path:
        return self.cluster / "admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        return self.logs / "audit.log"

    @property
    def ports(self) -> Path:
        return self.cluster / "ports.json"

    @property
    def ready(self) -> Path:
        """Written last by `up`: its absence means an `up` that was cut short."""
        return self.cluster / "ready"

    @property
    def for_tests(self) -> Path:
        """Marks a cluster that tests have started, and delete with all work on it."""
        return self.cluster / "for-tests"

    @property
    def containerd_state(self) -> Path:
        return self.cluster / "containerd"

    @property
    def containerd_socket(self) -> Path:
        return self.containerd_state / "containerd.sock"

    @property
    def kubelet(self) -> Path:
        return self.cluster / "kubelet"

    @property
    def volumes(self) -> Path:
        return self.cluster / "volumes"

    def log(self, name: str) -> Path:
        """The log file of one component."""
        return self.logs / f"{name}.log"


def from_environment(environ: Mapping[str, str] = os.environ) -> Layout:
    """The layout below QLORA_CACHE, or below the user's cache folder.

    Raises ClusterError when the path is too long for the Unix sockets below it.
    """
    if chosen := environ.get("QLORA_CACHE"):
        cache = Path(chosen)
    else:
        cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-operator"
    cache = cache.absolute()
    if len(str(cache)) > LONGEST_CACHE_PATH:
        raise ClusterError(
            f"the cache folder {cache} has {len(str(cache))} characters; sockets below it allow at most "
            f"{LONGEST_CACHE_PATH}: set QLORA_CACHE to a shorter path"
        )
    return Layout(cache)
