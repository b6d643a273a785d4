"""States how an artifact was made, as SLSA provenance (https://slsa.dev/spec/v1.1/provenance)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from release.project import Artifact, Source

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
    """The predicate, without times: the same build states the same. `recipe`: its Dockerfile, or the chart's folder."""
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
