"""The list of an image's packages: equal for equal images, and without each of their files."""

from release.project import Artifact, Source
from release.sbom import packages, packages_only

SOURCE = Source("0.1.0", "https://github.com/qlora-operator/qlora-operator", "a" * 40, 1_780_000_000)
IMAGE = Artifact("ghcr.io/team/qlora-operator", "0.1.0", "sha256:" + "b" * 64)


def listed(time: str, name: str) -> dict[str, object]:
    """As syft writes it, with what differs each time."""
    return {
        "documentNamespace": name,
        "creationInfo": {"created": time, "creators": ["Tool: syft"]},
        "packages": [{"SPDXID": "SPDXRef-Package-kopf", "name": "kopf", "versionInfo": "1.45.2"}],
        "files": [{"SPDXID": "SPDXRef-File-one"}],
        "relationships": [
            {"spdxElementId": "SPDXRef-DOCUMENT", "relatedSpdxElement": "SPDXRef-Package-kopf"},
            {"spdxElementId": "SPDXRef-Package-kopf", "relatedSpdxElement": "SPDXRef-File-one"},
        ],
    }


def test_the_same_image_has_the_same_list() -> None:
    first = packages_only(listed("2026-11-30T00:00:00Z", "https://anchore.com/1"), IMAGE, SOURCE)
    assert first == packages_only(listed("2026-12-01T00:00:00Z", "https://anchore.com/2"), IMAGE, SOURCE)
    assert first["creationInfo"]["created"] == SOURCE.created == "2026-05-28T20:26:40Z"
    assert IMAGE.digest.removeprefix("sha256:") in first["documentNamespace"]


def test_it_has_packages_and_what_they_depend_on_but_no_files() -> None:
    made = packages_only(listed("", ""), IMAGE, SOURCE)
    assert packages(made) == {"kopf": "1.45.2"}
    assert [relation["relatedSpdxElement"] for relation in made["relationships"]] == ["SPDXRef-Package-kopf"]
    assert "files" not in made
