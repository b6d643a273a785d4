"""Puts the operator of this checkout into a cluster: images named by their content, and the chart with real Helm."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster import cluster, console, images, packages, toolchain
from devcluster.errors import ClusterError
from devcluster.kubectl import Kubectl
from devcluster.layout import Layout
from devcluster.processes import run

ROOT = Path(__file__).parent.parent
CHART = ROOT / "helm" / "qlora-operator"
NAMESPACE = "qlora-system"
RELEASE = "qlora-operator"
DEFINITIONS = ("qlorajobs.qlora.dev", "qlorasweeps.qlora.dev", "qloraprofiles.qlora.dev")

_SHARED_SOURCES = (
    "pyproject.toml",
    "uv.lock",
    "README.md",
    "crds/qlora_api",
    "cli/qlora_cli",
    "cli/qlora_client",
    "serving/qlora_vllm",
)
_PACKAGES = ("operator/qlora_operator", "trainer_image/qlora_trainer", "third_party")
_DOCKERFILES = {
    "qlora-operator": ROOT / "operator" / "Dockerfile",
    "qlora-trainer": ROOT / "trainer_image" / "Dockerfile",
}

# Name of the profile of jobs whose pods share a workspace.
SHARED_PROFILE = "shared"

# One small machine as a simulated GPU node: it computes on the CPU and leaves room for the cluster.
_SMALL = {"cpu": "100m", "memory": "4Gi"}
SMALL_MACHINE: dict[str, Any] = {
    "profiles": {
        "default": {
            "device": "cpu",
            # The only node has no label of a GPU node.
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "workspace": {"size": "2Gi"},
            "resources": {"prepare": _SMALL, "train": {"cpu": "1500m", "memory": "6Gi"}, "publish": _SMALL},
        },
        # Two pods on the only node mount any claim.
        SHARED_PROFILE: {"workspace": {"topology": "shared"}},
    },
    # CoreDNS of the embedded cluster need not be root.
    "jobNetworkPolicies": {"dns": {"ports": [1053]}},
}

# The same for a cluster without a GPU, real or simulated. Null removes the chart's default.
ANY_MACHINE: dict[str, Any] = {
    "profiles": {"default": {**SMALL_MACHINE["profiles"]["default"], "gpuResource": None}},
}


@dataclass(frozen=True)
class Images:
    """Full names, with tag, of the two images."""

    operator: str
    trainer: str


def image_name(name: str) -> str:
    """Return `localhost/<name>:<key>`, where the key digests the image's content."""
    digest = hashlib.sha256(_DOCKERFILES[name].read_bytes())
    for source in (*_SHARED_SOURCES, *_PACKAGES):
        for path in sorted(_files(ROOT / source)):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"localhost/{name}:{digest.hexdigest()[:12]}"


def build_images(layout: Layout) -> Images:
    """Build both images unless buildah has them already."""
    packages.ensure(layout, packages.IMAGE)
    built = {name: image_name(name) for name in _DOCKERFILES}
    for name, full_name in built.items():
        if not images.exists(full_name):
            console.say(f"building {full_name}")
            images.build(layout, full_name, _DOCKERFILES[name], None, {})
    return Images(built["qlora-operator"], built["qlora-trainer"])


def built_images() -> Images:
    """The images of this checkout that have been built before, for tests, which build nothing.

    Raises ClusterError with the command to run where one is missing.
    """
    names = {name: image_name(name) for name in _DOCKERFILES}
    if missing := [full_name for full_name in names.values() if not images.exists(full_name)]:
        raise ClusterError(f"not built: {', '.join(missing)}; run `make images`")
    return Images(names["qlora-operator"], names["qlora-trainer"])


def load_images(layout: Layout, product: Images) -> None:
    """Bring both images to the embedded cluster's container runtime."""
    with cluster.locked(layout):
        for image in (product.operator, product.trainer):
            console.mention(layout, f"loading {image}")
            images.load(layout, cluster.ports_of(layout), image)


def install(
    layout: Layout,
    kubeconfig: Path,
    product: Images,
    values: Mapping[str, Any] = SMALL_MACHINE,
    *,
    chart: Path = CHART,
) -> None:
    """Install or upgrade the chart until ready. Raises ClusterError on failure."""
    helm = toolchain.build(layout, ["helm"])["helm"]
    kubectl = Kubectl(toolchain.build(layout, ["kubectl"])["kubectl"], kubeconfig)
    kubectl("apply", "--filename=-", input_text=json.dumps(restricted_namespace(NAMESPACE)))
    arguments = ["upgrade", RELEASE, str(chart), "--install", "--namespace", NAMESPACE, "--values", "-"]
    run(
        [helm, "--kubeconfig", kubeconfig, *arguments, "--wait", "--timeout", "5m"],
        input_text=json.dumps(chart_values(product, values)),
        seconds=360,
    )


def chart_values(product: Images, values: Mapping[str, Any] = SMALL_MACHINE) -> dict[str, Any]:
    """The values of `install`: the images, and `values`."""
    return _merge(_image_values(product), values)


def uninstall(layout: Layout, kubeconfig: Path) -> None:
    """Remove the operator, the definitions and with them all jobs, if they exist. Raises ClusterError.

    Also remove its Lease: the next operator would wait for it.
    """
    helm = toolchain.build(layout, ["helm"])["helm"]
    kubectl = Kubectl(toolchain.build(layout, ["kubectl"])["kubectl"], kubeconfig)
    arguments = ["uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found", "--wait"]
    run([helm, "--kubeconfig", kubeconfig, *arguments])
    kubectl("delete", "crd", "--ignore-not-found", *DEFINITIONS)
    kubectl("delete", "lease", "--ignore-not-found", f"--namespace={NAMESPACE}", RELEASE)


def roll_back(layout: Layout, kubeconfig: Path) -> None:
    """Return to the chart's previous revision. Raises ClusterError on failure."""
    helm = toolchain.build(layout, ["helm"])["helm"]
    arguments = ["rollback", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "5m"]
    run([helm, "--kubeconfig", kubeconfig, *arguments], seconds=360)


def _image_values(product: Images) -> dict[str, Any]:
    operator_repository, _, operator_tag = product.operator.rpartition(":")
    trainer_repository, _, trainer_tag = product.trainer.rpartition(":")
    return {
        "image": {"repository": operator_repository, "tag": operator_tag},
        "trainer": {"image": {"repository": trainer_repository, "tag": trainer_tag}},
    }


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def restricted_namespace(name: str) -> dict[str, Any]:
    """A Namespace that admits pods of the `restricted` Pod Security level only."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def _files(path: Path) -> Iterable[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
