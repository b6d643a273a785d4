"""Flaws that a user would not accept, although the signature is valid."""

from typing import Any

import pytest

from release import provenance, verification
from release.project import Artifact, ReleaseError, Source, on_loopback
from release.provenance import Builder

SOURCE = Source("0.1.0", "https://github.com/qlora-operator/qlora-operator", "a" * 40, 0)
IMAGE = Artifact("ghcr.io/team/qlora-operator", "0.1.0", "sha256:" + "b" * 64)
MAKER = Builder("https://github.com/team/release.yaml", "")


def statement() -> dict[str, Any]:
    return provenance.provenance(IMAGE, SOURCE, "operator/Dockerfile", [], MAKER)


def test_provenance_of_the_expected_builder_and_repository_has_the_commit() -> None:
    assert verification.stated_revision(statement(), IMAGE, MAKER.id, SOURCE.repository) == SOURCE.revision


@pytest.mark.parametrize(
    ("builder", "repository", "image", "complaint"),
    [
        ("https://elsewhere", SOURCE.repository, IMAGE, "built by"),
        (MAKER.id, "https://github.com/somebody/fork", IMAGE, "'repository': 'https://github.com/qlora-operator"),
        (MAKER.id, SOURCE.repository, Artifact(IMAGE.repository, "0.2.0", IMAGE.digest), "'version': '0.1.0'"),
        (MAKER.id, SOURCE.repository, Artifact("ghcr.io/a/qlora-operator", "0.1.0", IMAGE.digest), "'artifact'"),
    ],
)
def test_provenance_of_something_else_is_rejected(
    builder: str, repository: str, image: Artifact, complaint: str
) -> None:
    with pytest.raises(ReleaseError, match=complaint):
        verification.stated_revision(statement(), image, builder, repository)


def test_a_commit_without_its_digest_is_rejected() -> None:
    made = statement()
    made["buildDefinition"]["resolvedDependencies"] = []
    with pytest.raises(ReleaseError, match="lists no commit"):
        verification.stated_revision(made, IMAGE, MAKER.id, SOURCE.repository)


def test_any_statement_may_be_the_one_that_fits() -> None:
    """Each run of a workflow adds one, and users with push rights can attach more."""
    other = statement()
    other["runDetails"]["builder"]["id"] = "https://elsewhere"

    def revisions(*statements: dict[str, Any]) -> list[str]:
        return verification.stated_revisions(statements, IMAGE, MAKER.id, SOURCE.repository)

    assert revisions(statement(), other) == revisions(other, statement()) == [SOURCE.revision]
    with pytest.raises(ReleaseError, match="built by"):
        revisions(other, other)


def test_chart_and_images_must_have_a_commit_in_common() -> None:
    assert verification.common_revision([["a", "b"], ["b", "a"], ["b"]]) == "b"
    with pytest.raises(ReleaseError, match="of different commits: a, b"):
        verification.common_revision([["a"], ["b"], ["a", "b"]])


@pytest.mark.parametrize(
    ("packages", "complaint"),
    [
        ({"kopf": "1"}, "its SBOM lacks kubernetes"),
        ({"kopf": "1", "kubernetes": "1"}, "its SBOM has qlora-operator None, not 0.1.0"),
        ({"kopf": "1", "kubernetes": "1", "qlora-operator": "0.0.9"}, "has qlora-operator 0.0.9"),
    ],
)
def test_a_list_that_is_not_of_the_image_is_rejected(packages: dict[str, str], complaint: str) -> None:
    listed = {"packages": [{"name": name, "versionInfo": version} for name, version in packages.items()]}
    with pytest.raises(ReleaseError, match=complaint):
        verification.require_packages(listed, IMAGE)


def test_a_chart_that_installs_images_of_another_registry_is_rejected() -> None:
    def values(registry: str) -> dict[str, Any]:
        named = {"repository": f"{registry}/qlora-operator", "tag": "0.1.0", "digest": IMAGE.digest}
        return {"image": named, "trainer": {"image": {**named, "repository": "ghcr.io/team/qlora-trainer"}}}

    assert verification.images_of(values("ghcr.io/team"), "ghcr.io/team")[0] == IMAGE
    with pytest.raises(ReleaseError, match=r"the chart installs ghcr\.io/else/qlora-operator"):
        verification.images_of(values("ghcr.io/else"), "ghcr.io/team")


@pytest.mark.parametrize(
    ("registry", "local"),
    [
        ("127.0.0.1:5000", True),
        ("localhost:5000/team", True),
        ("[::1]:5000", True),
        ("ghcr.io/team", False),
        ("127.0.0.1.example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_only_a_registry_of_this_machine_is_used_without_tls(registry: str, local: bool) -> None:
    assert on_loopback(registry) is local
