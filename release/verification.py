"""Verifies a release the way a user does: with the registry, and the key or identity of the signatures."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import yaml

from devcluster.processes import run
from release.project import Artifact, ReleaseError, chart_repository, image_repository, on_loopback
from release.provenance import BUILD_TYPE, packages
from release.signing import PROVENANCE, SBOM, Cosign, Verifier

# A package that each image needs: a list without it is not the image's.
_EXPECTED_PACKAGES = {"qlora-operator": ("kopf", "kubernetes"), "qlora-trainer": ("torch", "bitsandbytes", "peft")}

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Verified:
    """The verified artifacts, and their common commit."""

    artifacts: tuple[Artifact, ...]
    revision: str


def verify(
    cosign: Cosign, helm: Path, registry: str, version: str, verifier: Verifier, builder: str, repository: str
) -> Verified:
    """Follow the chart to its images. Raises ReleaseError at the first failed check.

    `builder` and `repository`: the expected builder and sources.
    """
    chart = Artifact(chart_repository(registry), version, _chart_digest(helm, registry, version))
    # Before anything in it is believed.
    cosign.verify(verifier, chart.reference)
    with TemporaryDirectory() as folder:
        _pull(helm, registry, chart.reference, Path(folder))
        archive = next(Path(folder).glob("*.tgz"))
        description = yaml.safe_load(run([helm, "show", "chart", archive]))
        images = images_of(yaml.safe_load(run([helm, "show", "values", archive])), registry)
        rendered = run([helm, "template", "release", archive])
    _require_images(rendered, description, images)
    stated = []
    for artifact in (chart, *images):
        cosign.verify(verifier, artifact.reference)
        statements = cosign.verified_predicates(verifier, artifact.reference, PROVENANCE)
        stated.append(stated_revisions(statements, artifact, builder, repository))
    for image in images:
        listed = cosign.verified_predicates(verifier, image.reference, SBOM)
        _fitting(listed, partial(require_packages, image=image))
    return Verified((chart, *images), common_revision(stated))


def stated_revisions(
    statements: Sequence[Mapping[str, Any]], artifact: Artifact, builder: str, repository: str
) -> list[str]:
    """The commits of the matching statements; each run of the builder may have made one.

    Raises ReleaseError, with the problem of the last, if none matches.
    """
    check = partial(stated_revision, artifact=artifact, builder=builder, repository=repository)
    return _fitting(statements, check)


def common_revision(stated: Sequence[Sequence[str]]) -> str:
    """Return the last commit of chart and all images. Raises ReleaseError."""
    common = set.intersection(*map(set, stated))
    for revision in reversed(stated[0]):
        if revision in common:
            return revision
    found = sorted({revision for revisions in stated for revision in revisions})
    raise ReleaseError(f"chart and images are of different commits: {', '.join(found)}")


def _fitting(statements: Sequence[Mapping[str, Any]], check: Callable[[Mapping[str, Any]], _Found]) -> list[_Found]:
    """Return the check's result for each accepted statement, or raise its last error."""
    found, complaints = [], []
    for statement in statements:
        try:
            found.append(check(statement))
        except ReleaseError as complaint:
            complaints.append(complaint)
    if not found:
        raise complaints[-1]
    return found


def require_packages(listed: Mapping[str, Any], image: Artifact) -> None:
    """Raise ReleaseError unless the SBOM has the project and required packages."""
    versions = packages(listed)
    if missing := [name for name in _EXPECTED_PACKAGES[image.name] if name not in versions]:
        raise ReleaseError(f"{image.reference}: its SBOM lacks {', '.join(missing)}")
    if versions.get("qlora-operator") != image.version:
        raise ReleaseError(
            f"{image.reference}: its SBOM has qlora-operator {versions.get('qlora-operator')}, not {image.version}"
        )


def stated_revision(statement: Mapping[str, Any], artifact: Artifact, builder: str, repository: str) -> str:
    """Return the statement's commit. Raises ReleaseError for another builder."""
    definition = statement["buildDefinition"]
    stated = (definition["buildType"], statement["runDetails"]["builder"]["id"])
    if stated != (BUILD_TYPE, builder):
        raise ReleaseError(f"{artifact.reference}: built by {stated}, expected {(BUILD_TYPE, builder)}")
    parameters = definition["externalParameters"]
    expected = {"repository": repository, "version": artifact.version, "artifact": artifact.repository}
    if wrong := {name: parameters.get(name) for name, value in expected.items() if parameters.get(name) != value}:
        raise ReleaseError(f"{artifact.reference}: its provenance states {wrong}, expected {expected}")
    commits = [found["digest"].get("gitCommit") for found in definition["resolvedDependencies"]]
    if parameters["revision"] not in commits:
        raise ReleaseError(f"{artifact.reference}: its provenance lists no commit {parameters['revision']}")
    return str(parameters["revision"])


def _chart_digest(helm: Path, registry: str, version: str) -> str:
    with TemporaryDirectory() as folder:
        said = _pull(helm, registry, f"{chart_repository(registry)}:{version}", Path(folder))
    digest = re.search(r"sha256:[0-9a-f]{64}", said)
    if digest is None:
        raise ReleaseError(f"helm pull printed no digest:\n{said}")
    return digest[0]


def _pull(helm: Path, registry: str, reference: str, folder: Path) -> str:
    options = ["--plain-http"] if on_loopback(registry) else []
    return run([helm, "pull", *options, f"oci://{reference}", "--destination", folder])


def images_of(values: Mapping[str, Any], registry: str) -> tuple[Artifact, ...]:
    """Return the chart's default images, which must be in the same registry."""
    named = {"qlora-operator": values["image"], "qlora-trainer": values["trainer"]["image"]}
    images = [Artifact(named[name]["repository"], named[name]["tag"], named[name]["digest"]) for name in named]
    for name, image in zip(named, images, strict=True):
        if image.repository != image_repository(registry, name):
            raise ReleaseError(f"the chart installs {image.repository}, expected {image_repository(registry, name)}")
    return tuple(images)


def _require_images(rendered: str, description: Mapping[str, Any], images: tuple[Artifact, ...]) -> None:
    """Raise ReleaseError unless manifests and annotations name images by digest."""
    listed = {
        entry["name"]: entry["image"] for entry in yaml.safe_load(description["annotations"]["artifacthub.io/images"])
    }
    for image in images:
        if image.reference not in rendered:
            raise ReleaseError(f"the chart's manifests do not name {image.reference}")
        if not listed[image.name].endswith(f"@{image.digest}"):
            raise ReleaseError(f"artifacthub.io/images: {listed[image.name]} is not {image.reference}")
