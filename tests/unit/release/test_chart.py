"""What a released chart has beside the one in the repository: its images by digest, and what Artifact Hub shows."""

import yaml

from release import chart
from release.changelog import Entry, Section
from release.project import CHART, ROOT, Artifact

DIGEST = "sha256:" + "b" * 64
IMAGES = [
    Artifact("ghcr.io/team/qlora-operator", "0.1.0", DIGEST),
    Artifact("ghcr.io/team/qlora-trainer", "0.1.0", DIGEST.replace("b", "c")),
]
VALUES = (ROOT / CHART / "values.yaml").read_text()


def test_only_the_images_of_the_values_change_and_every_comment_stays() -> None:
    written = chart.with_images(VALUES, IMAGES)
    values = yaml.safe_load(written)
    for part, image in ((values["image"], IMAGES[0]), (values["trainer"]["image"], IMAGES[1])):
        assert (part["repository"], part["tag"], part["digest"]) == (image.repository, "0.1.0", image.digest)
        part |= {"repository": "", "tag": "", "digest": ""}
    before = yaml.safe_load(VALUES)
    for part in (before["image"], before["trainer"]["image"]):
        part |= {"repository": "", "tag": "", "digest": ""}
    assert values == before
    assert [line for line in written.splitlines() if "#" in line] == [
        line for line in VALUES.splitlines() if "#" in line
    ]


def test_artifact_hub_gets_images_by_digest_and_the_changes_by_kind() -> None:
    section = Section(
        "0.1.0", None, (Entry("added", "`spec.gate`: a “gate”, and: colons."), Entry("security", "A fix."))
    )
    made = chart.annotations(section, IMAGES)
    assert yaml.safe_load(made["artifacthub.io/images"])[0] == {
        "name": "qlora-operator",
        "image": f"ghcr.io/team/qlora-operator:0.1.0@{DIGEST}",
    }
    assert yaml.safe_load(made["artifacthub.io/changes"]) == [
        {"kind": "added", "description": "`spec.gate`: a “gate”, and: colons."},
        {"kind": "security", "description": "A fix."},
    ]
    assert made["artifacthub.io/containsSecurityUpdates"] == "true"
    assert chart.annotations(Section("0.1.0", None, ()), IMAGES)["artifacthub.io/containsSecurityUpdates"] == "false"


def test_annotations_of_the_chart_stay_when_those_of_the_release_are_added() -> None:
    description = (ROOT / CHART / "Chart.yaml").read_text()
    written = yaml.safe_load(chart.with_annotations(description, {"artifacthub.io/changes": "- text"}))
    before = yaml.safe_load(description)
    assert written.pop("annotations") == {**before.pop("annotations"), "artifacthub.io/changes": "- text"}
    assert written == before


def test_the_readme_explains_each_value_with_its_comment() -> None:
    """Fast, and without helm-docs, which tests/api/test_release_tools.py runs."""
    readme = (ROOT / CHART / "README.md").read_text()
    comments = [line.partition("# -- ")[2] for line in VALUES.splitlines() if "# -- " in line]
    assert comments
    assert [comment for comment in comments if comment not in readme] == [], "run `make generate`"
