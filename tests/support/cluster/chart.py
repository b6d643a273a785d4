"""Renders the chart with real Helm, and reads what it would install."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from devcluster.processes import run

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm" / "qlora-operator"
RELEASE = "qlora-operator"
NAMESPACE = "qlora-system"
SETTINGS = "qlora.dev/settings"
"""Annotation of the operator's pod."""
SERVICE_ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"

Object = dict[str, Any]
NVIDIA_LABEL = {"nvidia.com/gpu.present": "true"}

EVERYTHING_OPTIONAL = {
    "metrics": {
        "serviceMonitor": {"enabled": True, "interval": "30s", "labels": {"release": "prometheus"}},
        "dashboards": {"enabled": True},
    },
    "networkPolicy": {
        "enabled": True,
        "apiServerCIDRs": ["10.0.0.1/32"],
        "metricsFrom": [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}],
    },
    "jobNetworkPolicies": {"enabled": True, "namespaces": [NAMESPACE], "ports": [3128]},
    "imagePullSecrets": ["registry"],
    "priorityClassName": "system-cluster-critical",
    "announce": {"enabled": True},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "control-plane", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "replicas": 3,
    "podLabels": {"team": "platform"},
    "podAnnotations": {"example.com/note": "kept"},
    "serviceAccount": {"annotations": {"example.com/note": "kept"}},
}

# All rights of the operator: resource -> verbs.
RIGHTS = {
    "qlorajobs.qlora.dev": {"get", "list", "watch", "create", "patch"},
    "qlorajobs.qlora.dev/status": {"patch"},
    "qlorasweeps.qlora.dev": {"get", "list", "watch"},
    "qlorasweeps.qlora.dev/status": {"patch"},
    "jobs.batch": {"get", "list", "watch", "create", "delete"},
    "pods": {"list", "watch"},
    "pods/log": {"get"},
    "persistentvolumeclaims": {"get", "create"},
    "services": {"create"},
    "networkpolicies.networking.k8s.io": {"create"},
    "events": {"create"},
}
# Further rights in the operator's namespace.
OWN_RIGHTS = {"leases.coordination.k8s.io": {"get", "create", "update"}}
VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text())
LIMIT = 192 * 1024


@dataclass(frozen=True)
class Helm:
    """Helm with this chart."""

    program: Path
    kubeconfig: Path | None = None

    def __call__(self, *arguments: str, values: Mapping[str, Any] | None = None) -> str:
        connection = ["--kubeconfig", str(self.kubeconfig)] if self.kubeconfig else []
        given = [] if values is None else ["--values", "-"]
        return run([self.program, *connection, *arguments, *given], input_text=json.dumps(values or {}), seconds=120)

    def template(self, values: Mapping[str, Any] | None = None, chart: Path = CHART) -> list[Object]:
        """Every object that an installation with these values would make."""
        text = self("template", RELEASE, str(chart), "--namespace", NAMESPACE, values=values or {})
        return [document for document in yaml.safe_load_all(text) if document]


def only(objects: list[Object], kind: str) -> Object:
    found = [document for document in objects if document["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


def settings_in(template: Object) -> str:
    """The operator's settings file in a pod of this template, as the kubelet makes it."""
    spec = template["spec"]
    (container,) = spec["containers"]
    path = Path(next(one["value"] for one in container["env"] if one["name"] == "QLORA_OPERATOR_SETTINGS"))
    name = next(one["name"] for one in container["volumeMounts"] if one["mountPath"] == str(path.parent))
    volume = next(one for one in spec["volumes"] if one["name"] == name)
    item = next(one for one in volume["downwardAPI"]["items"] if one["path"] == path.name)
    annotation = item["fieldRef"]["fieldPath"].removeprefix("metadata.annotations['").removesuffix("']")
    return str(template["metadata"]["annotations"][annotation])


def settings_of(objects: list[Object]) -> Object:
    return dict(yaml.safe_load(settings_in(only(objects, "Deployment")["spec"]["template"])))


def rights_of(rules: list[Object]) -> dict[str, set[str]]:
    """Verbs by `resource.group/subresource`, as kubectl writes it."""
    rights: dict[str, set[str]] = {}
    for rule in rules:
        for group in rule.get("apiGroups", []):
            for resource in rule.get("resources", []):
                name, slash, subresource = resource.partition("/")
                rights.setdefault(f"{name}.{group}".strip(".") + slash + subresource, set()).update(rule["verbs"])
    return rights


def without(values: Object, path: tuple[str, ...]) -> Object:
    left = copy.deepcopy(values)
    part = left
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return left


def settings_of_size(helm: Helm, size: int) -> Object:
    """Values whose settings are so many bytes, without the line break at their end."""
    profiles = {f"profile-{number:03}": {"image": "a"} for number in range(400)}
    template = only(helm.template({"profiles": profiles}), "Deployment")["spec"]["template"]
    missing = size - len(settings_in(template).rstrip())
    for profile in profiles.values():
        added = min(missing, 511)
        profile["image"] += "a" * added
        missing -= added
    assert missing == 0
    return {"profiles": profiles}
