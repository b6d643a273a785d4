"""Puts a namespace, a base model, data and values into cluster and folder before the walk begins."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from devcluster import product, toolchain
from devcluster.errors import ClusterError
from devcluster.kubectl import Kubectl, claim, file_pod
from devcluster.layout import Layout
from devcluster.product import ROOT, Images
from examples.walk.runner import Shell

NAMESPACE = "walk"
_MODELS = "models"
_DATA = ROOT / "examples" / "demo" / "train.jsonl"
_SIGNING_KEY = {"name": "qlora-signing"}


def reject_work(kubectl: Kubectl) -> None:
    """Raise ClusterError if the cluster has jobs or sweeps other than the walk's own.

    The walk removes the operator with its definitions, and so all of them.
    """
    installed = kubectl("get", "crd", *product.DEFINITIONS, "--ignore-not-found", "--output=name").split()
    found = [
        f"{item['metadata']['namespace']}/{item['metadata']['name']}"
        for definition in installed
        for item in kubectl.get(definition.partition("/")[2], "--all-namespaces")["items"]
        # Profiles have no namespace: an installation creates them again.
        if item["metadata"].get("namespace", NAMESPACE) != NAMESPACE
    ]
    if found:
        shown = ", ".join([*found[:3], *(["…"] if len(found) > 3 else [])])
        raise ClusterError(
            f"the cluster has other jobs or sweeps ({shown}), which would be deleted with the operator: delete them, "
            "or stop the cluster with `make cluster-down`"
        )


@contextmanager
def prepared(where: Layout, images: Images, model: Path, folder: Path, programs: Path) -> Iterator[Shell]:
    """The shell of a person in a cluster that has a namespace with a base model, and no operator.

    `folder` becomes the person's: with the chart, the data, `values.yaml` and a kubeconfig; `programs` is where `qlora`
    and `kubectl-qlora` are installed. The namespace is deleted at the end. Raises ClusterError.
    """
    tools = toolchain.build(where, ["kubectl", "helm"])
    kubectl = Kubectl(tools["kubectl"], where.kubeconfig)
    product.uninstall(where, where.kubeconfig)
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait")
    for manifest in (product.restricted_namespace(NAMESPACE), claim(_MODELS, NAMESPACE)):
        kubectl("apply", "--filename=-", input_text=json.dumps(manifest))
    try:
        with file_pod(kubectl, NAMESPACE, _MODELS, images.trainer) as pod:
            pod.put(model, "base")
        _fill(folder, where.kubeconfig, product.chart_values(images, _values()))
        shell = Shell(folder, folder / "kubeconfig", [programs, *(path.parent for path in tools.values())])
        Kubectl(tools["kubectl"], shell.kubeconfig)("config", "set-context", "--current", f"--namespace={NAMESPACE}")
        yield shell
    finally:
        kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=false")


def _values() -> dict[str, Any]:
    """Those of the small machine, with a key that signs."""
    profiles: dict[str, Any] = product.SMALL_MACHINE["profiles"]
    default = {**profiles["default"], "signingKey": _SIGNING_KEY}
    return {**product.SMALL_MACHINE, "profiles": {**profiles, "default": default}}


def _fill(folder: Path, kubeconfig: Path, values: dict[str, Any]) -> None:
    """An empty folder with what a person has before the first command."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(kubeconfig, folder / "kubeconfig")
    shutil.copy(_DATA, folder / "train.jsonl")
    (folder / "helm").symlink_to(ROOT / "helm")
    # Through JSON, as YAML would have aliases for what two fields share.
    (folder / "values.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False))
