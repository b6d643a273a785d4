"""Finds what is missing or stale in this checkout before it is released: `make release-check`."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from docs import trainer_image
from qlora_api.crd import definitions
from qlora_api.spec.job import QLoRAJobDocument
from release import changelog, chart, dockerfiles, project, workflows
from release.project import CHART, DOCKERFILES, ROOT, ReleaseError

# Labels that do not depend on the commit (OCI image specification, annotations).
_LABELS = frozenset(
    f"org.opencontainers.image.{name}" for name in ("title", "description", "version", "licenses", "base.name")
)
INSTALL_PAGE = Path("docs/how-to/install.md")
# Of an image, a chart, or a chart's file.
_TAG = re.compile(r"(?:/qlora-(?:operator|trainer):|--version |qlora-operator-)(\d+\.\d+\.\d+)")
# Annotations that stay the same from release to release; chart.annotations adds the rest.
REQUIRED_ANNOTATIONS = frozenset(
    f"artifacthub.io/{name}"
    for name in (
        "category",
        "crds",
        "crdsExamples",
        "license",
        "links",
        "operator",
        "operatorCapabilities",
        "prerelease",
    )
)


def findings(root: Path = ROOT, tag: str | None = None) -> list[str]:
    """Return all findings that need no program, for `tag` (`v0.1.0`) if there is one."""
    checks: tuple[Callable[[Path], Iterator[str]], ...] = (_images, _tags, _chart, _layers)
    found = [finding for check in checks for finding in check(root)]
    return [*found, *_changelog(root, tag), *workflows.findings(root)]


def readme_findings(helm_docs: Path, root: Path = ROOT) -> list[str]:
    """Whether the chart's README is what helm-docs writes."""
    made = chart.readme(helm_docs, root / CHART)
    if made == (root / CHART / "README.md").read_text():
        return []
    return [f"{CHART}/README.md: not what helm-docs writes; run `make generate`"]


def _images(root: Path) -> Iterator[str]:
    version = project.version(root)
    bases = set()
    for path in DOCKERFILES.values():
        text = (root / path).read_text()
        labels = dockerfiles.labels(text)
        if missing := _LABELS - set(labels):
            yield f"{path}: no label {', '.join(sorted(missing))}"
        elif labels["org.opencontainers.image.version"] != version:
            yield f"{path}: label {labels['org.opencontainers.image.version']}, the project has version {version}"
        try:
            bases.add(dockerfiles.base_image(text))
        except ReleaseError as error:
            yield f"{path}: {error}"
    if len(bases) > 1:
        yield f"the images have different bases: {', '.join(sorted(bases))}"


def _tags(root: Path) -> Iterator[str]:
    """Whether the commands that people copy name this version."""
    version = project.version(root)
    for path in (*DOCKERFILES.values(), INSTALL_PAGE):
        named = set(_TAG.findall((root / path).read_text()))
        if wrong := named - {version}:
            yield f"{path}: names the tag {', '.join(sorted(wrong))}, the project has version {version}"
        if not named:
            yield f"{path}: no command names the tag {version}"


def _layers(root: Path) -> Iterator[str]:
    for path, text in trainer_image.pages(root).items():
        if not path.exists() or path.read_text() != text:
            yield f"{path.relative_to(root)}: not what the Dockerfile says; run `make generate`"


def _chart(root: Path) -> Iterator[str]:
    file = CHART / "Chart.yaml"
    description = yaml.safe_load((root / file).read_text())
    version = project.version(root)
    if (description["version"], description["appVersion"]) != (version, version):
        yield f"{file}: version {description['version']}, appVersion {description['appVersion']}, expected {version}"
    annotations: Mapping[str, str] = description["annotations"]
    if missing := REQUIRED_ANNOTATIONS - set(annotations):
        yield f"{file}: no annotation {', '.join(sorted(missing))}"
        return
    yield from (f"{file}: {finding}" for finding in _resources(annotations))


def _resources(annotations: Mapping[str, str]) -> Iterator[str]:
    """Yield findings where Artifact Hub shows other kinds, or an invalid example."""
    shown = {
        (entry["name"], entry["kind"], entry["version"]) for entry in yaml.safe_load(annotations["artifacthub.io/crds"])
    }
    defined = {_identity(definition) for definition in definitions().values()}
    if shown != defined:
        yield f"artifacthub.io/crds: {sorted(shown)}, but the chart installs {sorted(defined)}"
    for example in yaml.safe_load(annotations["artifacthub.io/crdsExamples"]):
        try:
            QLoRAJobDocument.model_validate(example)
        except ValidationError as error:
            yield f"artifacthub.io/crdsExamples: {error}"


def _identity(definition: Mapping[str, Any]) -> tuple[str, str, str]:
    spec = definition["spec"]
    return definition["metadata"]["name"], spec["names"]["kind"], spec["versions"][0]["name"]


def _changelog(root: Path, tag: str | None) -> Iterator[str]:
    version = project.version(root)
    try:
        section = changelog.newest((root / "CHANGELOG.md").read_text())
    except ReleaseError as error:
        yield str(error)
        return
    if not section.entries:
        yield f"CHANGELOG.md: no entry for {section.version}"
    if tag is None:
        return
    if not re.fullmatch(r"v\d+\.\d+\.\d+", tag) or tag != f"v{version}":
        yield f"the tag {tag} is not v{version}, the project's version"
    if (section.version, section.date is None) != (version, False):
        yield f"CHANGELOG.md: the section at the top must be `## {version}, DATE`"
