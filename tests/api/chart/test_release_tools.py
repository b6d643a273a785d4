"""The programs of a release, but cosign: actionlint, helm-docs, and Helm with a registry."""

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import toolchain
from devcluster.layout import from_environment
from release import changelog, chart, checks, image_build, workflows
from release.project import CHART, ROOT, Artifact, Source, version
from tests.support.chart.rendered import Helm

SOURCE = Source(version(), "https://github.com/qlora-operator/qlora-operator", "a" * 40, 1_780_000_000)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with image_build.local_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


def images(address: str) -> list[Artifact]:
    names = ("qlora-operator", "qlora-trainer")
    return [
        Artifact(f"{address}/{name}", version(), f"sha256:{hashlib.sha256(name.encode()).hexdigest()}")
        for name in names
    ]


def program(name: str) -> Path:
    return toolchain.built(from_environment(), [name])[name]


def completed(folder: Path, address: str) -> Path:
    """A copy of the chart, as in a release."""
    copy = shutil.copytree(ROOT / CHART, folder / CHART)
    chart.complete(copy, changelog.newest((ROOT / "CHANGELOG.md").read_text()), images(address))
    return copy


def pushed(helm: Helm, folder: Path, address: str, written: int = 10**9) -> Artifact:
    """Release the chart, whose files have that time."""
    copy = completed(folder, address)
    for path in copy.rglob("*"):
        os.utime(path, (written, written))
    archive = chart.package(helm.program, SOURCE, copy, folder)
    artifact = chart.push(helm.program, archive, SOURCE, address)
    archive.unlink()
    return artifact


# Like helm-docs, actionlint is built for slow tests only.
@pytest.mark.slow
def test_actionlint_passes_and_reports_a_mistake(tmp_path: Path) -> None:
    actionlint = program("actionlint")
    assert workflows.lint(actionlint) == []
    shutil.copytree(ROOT / workflows.FOLDER, tmp_path / workflows.FOLDER)
    release = tmp_path / workflows.FOLDER / "release.yaml"
    release.write_text(release.read_text().replace("secrets.GITHUB_TOKEN", "secret.GITHUB_TOKEN"))
    (finding,) = workflows.lint(actionlint, tmp_path)
    assert 'undefined variable "secret"' in finding


@pytest.mark.slow
def test_the_readme_of_the_chart_matches_helm_docs(tmp_path: Path) -> None:
    helm_docs = program("helm-docs")
    assert checks.readme_findings(helm_docs) == []
    copy = completed(tmp_path, "127.0.0.1:5000")
    readme = chart.readme(helm_docs, copy)
    assert images("127.0.0.1:5000")[0].digest in readme
    (copy / "README.md").write_text(readme)
    assert checks.readme_findings(helm_docs, tmp_path) == []
    values = copy / "values.yaml"
    values.write_text(values.read_text().replace("# -- Number of operators.", "# -- How many operators."))
    assert checks.readme_findings(helm_docs, tmp_path) == [
        f"{CHART}/README.md: not what helm-docs writes; run `make generate`"
    ]


def test_a_released_chart_installs_its_images_by_digest_and_lists_its_changes(
    helm: Helm, tmp_path: Path, address: str
) -> None:
    reference = pushed(helm, tmp_path, address).reference
    helm("pull", f"oci://{reference}", "--plain-http", "--destination", str(tmp_path))
    (pulled,) = tmp_path.glob("*.tgz")
    rendered = helm("template", "release", str(pulled))
    assert all(image.reference in rendered for image in images(address))
    annotations: dict[str, Any] = yaml.safe_load(helm("show", "chart", str(pulled)))["annotations"]
    written = changelog.newest((ROOT / "CHANGELOG.md").read_text()).entries
    shown = [
        (change["kind"], change["description"]) for change in yaml.safe_load(annotations["artifacthub.io/changes"])
    ]
    assert shown == [(entry.kind, entry.text) for entry in written]
    assert set(annotations) >= checks.REQUIRED_ANNOTATIONS
    with tarfile.open(pulled) as files:
        assert f"{CHART.name}/{chart.TEMPLATE}" not in files.getnames()


def test_the_same_chart_has_the_same_digest(helm: Helm, tmp_path: Path, address: str) -> None:
    digests = {pushed(helm, tmp_path / str(time), address, time).digest for time in (10**9, 10**9 + 60)}
    assert len(digests) == 1
