"""The programs of a release, but cosign: actionlint, helm-docs, and Helm with a registry."""

import hashlib
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster import toolchain
from devcluster.layout import from_environment
from devcluster.processes import run
from release import changelog, chart, checks, image_build, workflows
from release.project import CHART, ROOT, Artifact, Source, version

# No other test that is not slow needs actionlint and helm-docs.
pytestmark = pytest.mark.slow
SOURCE = Source(version(), "https://github.com/qlora-operator/qlora-operator", "a" * 40, 1_780_000_000)


@pytest.fixture(scope="module")
def programs() -> Mapping[str, Path]:
    return toolchain.built(from_environment(), ["helm", "helm-docs", "actionlint"])


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


def package(programs: Mapping[str, Path], folder: Path, address: str) -> Path:
    shutil.copytree(ROOT / CHART, folder / CHART)
    section = changelog.newest((ROOT / "CHANGELOG.md").read_text())
    return chart.package(programs["helm"], programs["helm-docs"], SOURCE, folder, section, images(address))


def test_actionlint_passes_and_reports_a_mistake(programs: Mapping[str, Path], tmp_path: Path) -> None:
    assert workflows.lint(programs["actionlint"]) == []
    shutil.copytree(ROOT / workflows.FOLDER, tmp_path / workflows.FOLDER)
    release = tmp_path / workflows.FOLDER / "release.yaml"
    release.write_text(release.read_text().replace("secrets.GITHUB_TOKEN", "secret.GITHUB_TOKEN"))
    (finding,) = workflows.lint(programs["actionlint"], tmp_path)
    assert 'undefined variable "secret"' in finding


def test_the_readme_of_the_chart_matches_helm_docs(programs: Mapping[str, Path], tmp_path: Path) -> None:
    assert checks.readme_findings(programs["helm-docs"]) == []
    shutil.copytree(ROOT / CHART, tmp_path / CHART)
    values = tmp_path / CHART / "values.yaml"
    values.write_text(values.read_text().replace("# -- Number of operators.", "# -- How many operators."))
    assert checks.readme_findings(programs["helm-docs"], tmp_path) == [
        f"{CHART}/README.md: not what helm-docs writes; run `make generate`"
    ]


def test_a_released_chart_installs_its_images_by_digest_and_lists_its_changes(
    programs: Mapping[str, Path], tmp_path: Path, address: str
) -> None:
    archive = package(programs, tmp_path, address)
    pushed = chart.push(programs["helm"], archive, SOURCE, address)
    archive.unlink()
    run([programs["helm"], "pull", f"oci://{pushed.reference}", "--plain-http", "--destination", tmp_path])
    (pulled,) = tmp_path.glob("*.tgz")
    rendered = run([programs["helm"], "template", "release", pulled])
    assert all(image.reference in rendered for image in images(address))
    annotations: dict[str, Any] = yaml.safe_load(run([programs["helm"], "show", "chart", pulled]))["annotations"]
    written = changelog.newest((ROOT / "CHANGELOG.md").read_text()).entries
    shown = [
        (change["kind"], change["description"]) for change in yaml.safe_load(annotations["artifacthub.io/changes"])
    ]
    assert shown == [(entry.kind, entry.text) for entry in written]
    assert set(annotations) >= checks.REQUIRED_ANNOTATIONS
    assert images(address)[0].digest in run([programs["helm"], "show", "readme", pulled])
    with tarfile.open(pulled) as files:
        assert f"{CHART.name}/{chart.TEMPLATE}" not in files.getnames()


def test_the_same_chart_has_the_same_digest(programs: Mapping[str, Path], tmp_path: Path, address: str) -> None:
    digests = set()
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        digests.add(chart.push(programs["helm"], package(programs, folder, address), SOURCE, address).digest)
    assert len(digests) == 1
