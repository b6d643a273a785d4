"""Makes a release in a registry: builds, lists, states and signs, in the order of dependency."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from devcluster import console
from devcluster.layout import Layout
from release import changelog, chart, image_build
from release.project import CHART, DOCKERFILES, Artifact, Source, exported
from release.provenance import Builder, Dependency, image, provenance, write_sbom
from release.signing import PROVENANCE, SBOM, Cosign, Signer


@dataclass(frozen=True)
class Programs:
    """Built from pinned modules (devcluster.toolchain)."""

    cosign: Cosign
    helm: Path
    helm_docs: Path


@dataclass(frozen=True)
class Release:
    """The artifacts in the registry."""

    operator: Artifact
    trainer: Artifact
    chart: Artifact

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """The signed artifacts."""
        return self.operator, self.trainer, self.chart


def make(
    layout: Layout,
    programs: Programs,
    source: Source,
    registry: str,
    signer: Signer,
    builder: Builder,
    target: Path,
    base: str | None = None,
) -> Release:
    """Make a release; once more, it changes nothing.

    Each file that is signed is in `target` too. `base`: see image_build.publish.
    """
    target.mkdir(parents=True, exist_ok=True)
    with exported(source) as files:
        changes = changelog.newest((files / "CHANGELOG.md").read_text())
        images = []
        for name, dockerfile in DOCKERFILES.items():
            console.say(f"building {name}")
            built, used = image_build.publish(layout, source, files, registry, name, base)
            console.say(f"listing and signing {built.reference}")
            listed = target / f"{name}.spdx.json"
            write_sbom(f"{built.repository}:{built.version}", built, source, listed)
            programs.cosign.attest(signer, built.reference, SBOM, listed)
            _sign(programs.cosign, signer, built, source, str(dockerfile), [image(used)], builder, target)
            images.append(built)
        console.say("packaging and signing the chart")
        chart.complete(files / CHART, changes, images)
        (files / CHART / "README.md").write_text(chart.readme(programs.helm_docs, files / CHART))
        archive = chart.package(programs.helm, source, files / CHART, files)
        pushed = chart.push(programs.helm, archive, source, registry)
        inputs = [image(built.reference) for built in images]
        _sign(programs.cosign, signer, pushed, source, str(CHART), inputs, builder, target)
        archive.replace(target / archive.name)
    release = Release(images[0], images[1], pushed)
    record = {"source": asdict(source), "artifacts": [artifact.reference for artifact in release.artifacts]}
    (target / "release.json").write_text(json.dumps(record, indent=2) + "\n")
    return release


def _sign(
    cosign: Cosign,
    signer: Signer,
    artifact: Artifact,
    source: Source,
    recipe: str,
    inputs: Sequence[Dependency],
    builder: Builder,
    target: Path,
) -> None:
    """State its provenance, and sign that and the artifact."""
    kind = "chart" if recipe == str(CHART) else "image"
    statement = target / f"{artifact.name}-{kind}.provenance.json"
    statement.write_text(json.dumps(provenance(artifact, source, recipe, inputs, builder), indent=1) + "\n")
    cosign.attest(signer, artifact.reference, PROVENANCE, statement)
    cosign.sign(signer, artifact.reference)
