"""Packages the chart with its images by digest and the annotations of Artifact Hub, and pushes it."""

import os
import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML

from devcluster.processes import run
from release.changelog import Section
from release.project import Artifact, ReleaseError, Source, chart_repository, on_loopback

TEMPLATE = "README.md.gotmpl"
# The part of values.yaml that names each image.
_IMAGES = {"qlora-operator": ("image",), "qlora-trainer": ("trainer", "image")}


def complete(chart: Path, changes: Section, images: Sequence[Artifact]) -> None:
    """Write images and annotations into the chart."""
    values = chart / "values.yaml"
    values.write_text(with_images(values.read_text(), images))
    description = chart / "Chart.yaml"
    description.write_text(with_annotations(description.read_text(), annotations(changes, images)))


def package(helm: Path, source: Source, chart: Path, folder: Path) -> Path:
    """Package the chart reproducibly into a folder."""
    for path in (chart, *chart.rglob("*")):
        os.utime(path, (source.committed, source.committed))
    run([helm, "package", chart, "--destination", folder])
    archive = folder / f"qlora-operator-{source.version}.tgz"
    # Helm states the archive's time in the manifest.
    os.utime(archive, (source.committed, source.committed))
    return archive


def push(helm: Path, archive: Path, source: Source, registry: str) -> Artifact:
    """Push a packaged chart; returns it as an artifact."""
    repository = chart_repository(registry)
    options = ["--plain-http"] if on_loopback(registry) else []
    said = run([helm, "push", *options, archive, f"oci://{repository.rpartition('/')[0]}"])
    digest = re.search(r"sha256:[0-9a-f]{64}", said)
    if digest is None:
        raise ReleaseError(f"helm push printed no digest:\n{said}")
    return Artifact(repository, source.version, digest[0])


def with_images(values: str, images: Sequence[Artifact]) -> str:
    """Return values.yaml with each image's repository, tag, digest, and all comments."""
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1000
    document = editor.load(values)
    for image in images:
        part = document
        for key in _IMAGES[image.name]:
            part = part[key]
        part.update({"repository": image.repository, "tag": image.version, "digest": image.digest})
    written = StringIO()
    editor.dump(document, written)
    return written.getvalue()


def annotations(changes: Section, images: Sequence[Artifact]) -> dict[str, str]:
    """Return the release's annotations (artifacthub.io, "Helm annotations")."""
    listed = [
        {"name": image.name, "image": f"{image.repository}:{image.version}@{image.digest}"}
        for image in sorted(images, key=lambda image: image.name)
    ]
    return {
        "artifacthub.io/images": yaml.safe_dump(listed, sort_keys=False),
        "artifacthub.io/changes": yaml.safe_dump(
            [{"kind": entry.kind, "description": entry.text} for entry in changes.entries],
            sort_keys=False,
            allow_unicode=True,
            width=1000,
        ),
        "artifacthub.io/containsSecurityUpdates": str(
            any(entry.kind == "security" for entry in changes.entries)
        ).lower(),
    }


def with_annotations(description: str, added: Mapping[str, str]) -> str:
    """Chart.yaml with more annotations."""
    document: dict[str, Any] = yaml.safe_load(description)
    document["annotations"] = {**document.get("annotations", {}), **added}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=1000)


def readme(helm_docs: Path, chart: Path) -> str:
    """The README that helm-docs makes of the chart's template and values."""
    said = run([helm_docs, "--dry-run", "--chart-search-root", chart, "--template-files", TEMPLATE])
    return said.rstrip("\n") + "\n"
