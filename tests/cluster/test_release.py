"""A release from the first to the last step, in a real registry, with the real cosign and syft."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from devcluster import images, toolchain
from devcluster.layout import Layout, from_environment
from devcluster.processes import run
from release import image_build, pipeline, project, verification
from release.pipeline import Programs, Release
from release.project import Artifact, ReleaseError, Source
from release.provenance import LOCAL_BUILDER, Builder, packages
from release.signing import PROVENANCE, SBOM, Cosign, KeyPair, PublicKey

pytestmark = pytest.mark.slow

# Of a local build, which has no run of a workflow.
BUILDER = Builder(LOCAL_BUILDER, "")


@dataclass(frozen=True)
class Made:
    """A release, and how it was made."""

    layout: Layout
    programs: Programs
    source: Source
    registry: str
    base: str
    signer: KeyPair
    folder: Path
    release: Release

    def again(self) -> Release:
        return pipeline.make(
            self.layout, self.programs, self.source, self.registry, self.signer, BUILDER, self.folder, self.base
        )

    def verify(self, key: Path, builder: str = BUILDER.id) -> verification.Verified:
        return verification.verify(
            self.programs.cosign,
            self.programs.helm,
            self.registry,
            self.source.version,
            PublicKey(key),
            builder,
            self.source.repository,
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Release the current commit with the dependencies' layers of the tested images."""
    layout = from_environment()
    built = toolchain.built(layout, ["cosign", "helm", "helm-docs"])
    programs = Programs(Cosign(built["cosign"]), built["helm"], built["helm-docs"])
    folder = tmp_path_factory.mktemp("release")
    signer = programs.cosign.key_pair(folder / "keys", "a password")
    revision, committed = run(["git", "-C", project.ROOT, "log", "-1", "--format=%H %ct"]).split()
    source = Source(project.version(), project.repository(), revision, int(committed))
    with image_build.local_registry(layout.registry) as address:
        base = image_build.local_base(layout, address)
        release = pipeline.make(layout, programs, source, address, signer, BUILDER, folder / "made", base)
        yield Made(layout, programs, source, address, base, signer, folder / "made", release)
        # Names only: layers that the tested images have too stay. The digest of the base is not a separate name.
        base_tag = f"{address}/{images.base_image(layout).rpartition('/')[2]}"
        names = [f"{image.repository}:{image.version}" for image in release.artifacts[:2]]
        run(["buildah", "rmi", *names, base_tag])


def test_a_user_with_the_public_key_can_verify_every_artifact(made: Made) -> None:
    verified = made.verify(made.signer.public)
    assert {artifact.reference for artifact in verified.artifacts} == {
        artifact.reference for artifact in made.release.artifacts
    }
    assert verified.revision == made.source.revision


def test_another_key_or_another_builder_is_rejected(made: Made, tmp_path: Path) -> None:
    other = made.programs.cosign.key_pair(tmp_path, "")
    with pytest.raises(ReleaseError, match="cosign verify"):
        made.verify(other.public)
    with pytest.raises(ReleaseError, match="built by"):
        made.verify(made.signer.public, "https://github.com/somebody/else")


def test_an_image_that_takes_the_place_of_a_signed_one_is_not_signed(made: Made) -> None:
    """A tag can be moved; the signature and the chart refer to the digest."""
    repository = f"{made.registry}/qlora-operator"
    run(["buildah", "tag", "localhost/busybox:stable", f"{repository}:moved"])
    try:
        digest = image_build.push(f"{repository}:moved", made.registry)
    finally:
        run(["buildah", "rmi", f"{repository}:moved"])
    assert not made.programs.cosign.is_signed(made.signer.verifier, f"{repository}@{digest}")
    made.verify(made.signer.public)


def test_provenance_names_the_commit_and_the_base_by_digest(made: Made) -> None:
    for image in (made.release.operator, made.release.trainer):
        (statement,) = made.programs.cosign.verified_predicates(made.signer.verifier, image.reference, PROVENANCE)
        inputs = [found["digest"] for found in statement["buildDefinition"]["resolvedDependencies"]]
        assert inputs == [
            {"gitCommit": made.source.revision},
            {"sha256": made.base.rpartition(":")[2]},
        ]


def test_the_sboms_have_every_package_of_the_images(made: Made) -> None:
    for image, program in ((made.release.operator, "kopf"), (made.release.trainer, "torch")):
        (listed,) = made.programs.cosign.verified_predicates(made.signer.verifier, image.reference, SBOM)
        versions = packages(listed)
        assert f"{program}=={versions[program]}" in (project.ROOT / "pyproject.toml").read_text()
        assert "libc6" in versions
        assert "triton" not in versions


def test_images_name_their_source(made: Made) -> None:
    image = f"{made.release.operator.repository}:{made.release.operator.version}"
    labels = json.loads(run(["buildah", "inspect", "--type", "image", image]))["OCIv1"]["config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == made.source.revision
    assert labels["org.opencontainers.image.source"] == made.source.repository
    assert made.base.endswith(labels["org.opencontainers.image.base.digest"])


def test_a_repeated_release_is_identical_and_signed_once(made: Made) -> None:
    assert made.again() == made.release
    for artifact in made.release.artifacts:
        assert signatures(made, artifact) == 1
        statements = made.programs.cosign.verified_predicates(made.signer.verifier, artifact.reference, PROVENANCE)
        assert len(statements) == 1


def test_an_image_of_another_commit_shares_the_layers_whose_files_are_equal(made: Made) -> None:
    """A node with the release before pulls only the changes."""
    later = dataclasses.replace(made.source, committed=made.source.committed + 60)
    with project.exported(made.source) as files:
        built, _ = image_build.publish(made.layout, later, files, made.registry, "qlora-trainer", made.base)
    before = made.release.trainer
    assert built.digest != before.digest
    assert layers(built) == layers(before)


def signatures(made: Made, artifact: Artifact) -> int:
    """The number of signatures, without the statements that cosign verifies too."""
    said = run([made.programs.cosign.program, "verify", *made.signer.verifier.verifying(), artifact.reference])
    types = [found["critical"]["type"] for found in json.loads(said)]
    return types.count("https://sigstore.dev/cosign/sign/v1")


def layers(image: Artifact) -> list[str]:
    """The digests of an image's layers, in the registry."""
    host, _, name = image.repository.partition("/")
    answer = requests.get(
        f"http://{host}/v2/{name}/manifests/{image.digest}",
        headers={"Accept": "application/vnd.oci.image.manifest.v1+json"},
        timeout=60,
    )
    answer.raise_for_status()
    return [layer["digest"] for layer in answer.json()["layers"]]
