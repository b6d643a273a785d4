"""Renders the chart with real Helm: what an installation with some values makes."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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

Object = dict[str, Any]
VALUES: Object = yaml.safe_load((CHART / "values.yaml").read_text())
VERSION: str = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
SETS: dict[str, Object] = yaml.safe_load(Path(__file__).with_name("value_sets.yaml").read_text())


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
        # libyaml's parser takes a seventh of the time for the definitions.
        return [document for document in yaml.load_all(text, yaml.CSafeLoader) if document]


def only(objects: list[Object], kind: str) -> Object:
    found = [document for document in objects if document["kind"] == kind]
    assert len(found) == 1, f"{len(found)} objects of kind {kind}"
    return found[0]


@dataclass(frozen=True)
class Rendered:
    """The objects, and the values over the chart's own."""

    values: Object
    objects: list[Object]
    """All but those of the door."""
    door: list[Object] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    @property
    def deployment(self) -> Object:
        return dict(only(self.objects, "Deployment"))

    @property
    def name(self) -> str:
        """The full name of the chart's objects."""
        return str(self.deployment["metadata"]["name"])

    @property
    def pod(self) -> Object:
        return dict(self.deployment["spec"]["template"]["spec"])

    @property
    def container(self) -> Object:
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def settings(self) -> Object:
        """The operator's settings, which are YAML in the chart."""
        return dict(self.deployment["spec"]["template"]["metadata"]["annotations"][SETTINGS])


def render(helm: Helm, values: Mapping[str, Any], chart: Path = CHART) -> Rendered:
    everything = helm.template(values, chart)
    door = [each for each in everything if each["metadata"]["name"].endswith("-door")]
    objects = [each for each in everything if each not in door]
    annotations = only(objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    annotations[SETTINGS] = yaml.safe_load(annotations[SETTINGS])
    return Rendered(_merged(VALUES, values), objects, door)


def _merged(before: Any, patch: Any) -> Any:
    """The values as Helm merges them, which drops a null only where the chart has a value."""
    if not isinstance(patch, Mapping):
        return patch
    kept = dict(before) if isinstance(before, Mapping) else {}
    dropped = {name for name, value in patch.items() if value is None and name in kept}
    changed = {name: _merged(kept.get(name), value) for name, value in patch.items()}
    return {name: value for name, value in (kept | changed).items() if name not in dropped}


def place(document: Mapping[str, Any]) -> str:
    """Its kind, namespace and name."""
    metadata = document["metadata"]
    return f"{document['kind']} {'/'.join(filter(None, (metadata.get('namespace'), metadata['name'])))}"


def settings_in(template: Object) -> str:
    """The operator's settings in a pod of this template, as YAML."""
    return str(template["metadata"]["annotations"][SETTINGS])


def without(values: Object, path: tuple[str, ...]) -> Object:
    left = copy.deepcopy(values)
    part = left
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    return left
