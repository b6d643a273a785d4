"""`make release-check` finds missing and stale files in a broken copy."""

import shutil
from pathlib import Path

import pytest

from release import checks
from release.project import CHART, DOCKERFILES, ROOT, version

TRAINER = str(DOCKERFILES["qlora-trainer"])
OPERATOR = str(DOCKERFILES["qlora-operator"])
CHART_FILE = str(CHART / "Chart.yaml")
PAGE = "docs/trainer/image.md"
INSTALL = str(checks.INSTALL_PAGE)
FILES = (
    TRAINER,
    OPERATOR,
    CHART_FILE,
    PAGE,
    INSTALL,
    "pyproject.toml",
    "CHANGELOG.md",
    ".github/workflows/release.yaml",
)
TAG = f"v{version()}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_no_file_is_missing_or_stale() -> None:
    assert checks.findings() == []


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        (OPERATOR, "@sha256:", "@sha256:0", "expected one REGISTRY/NAME:TAG@sha256:DIGEST"),
        (OPERATOR, "ARG BASE_IMAGE=docker.io/", "ARG BASE_IMAGE=quay.io/", "the images have different bases"),
        (OPERATOR, 'image.licenses="', 'image.license="', "no label org.opencontainers.image.licenses"),
        (TRAINER, f'image.version="{version()}"', 'image.version="9"', "label 9, the project has version"),
        (
            TRAINER,
            f"qlora-trainer:{version()} .",
            "qlora-trainer:9.0.0 .",
            "names the tag 9.0.0, the project has version",
        ),
        (INSTALL, f"qlora-operator:{version()} .", "qlora-operator:9.0.0 .", "names the tag 9.0.0, the project has"),
        (INSTALL, version(), "latest", "install.md: no command names the tag"),
        (TRAINER, "# The user that the steps run as.", "# A user.", "docs/trainer/image.md: not what"),
        (PAGE, "libtcmalloc", "libjemalloc", "docs/trainer/image.md: not what"),
        (CHART_FILE, f"appVersion: {version()}", "appVersion: 9.9.9", "appVersion 9.9.9, expected"),
        (CHART_FILE, "artifacthub.io/license", "artifacthub.io/licence", "no annotation artifacthub.io/license"),
        (CHART_FILE, "kind: QLoRASweep", "kind: Sweep", "but the chart installs"),
        (CHART_FILE, "        model:\n", "        models:\n", "artifacthub.io/crdsExamples: "),
        (".github/workflows/release.yaml", "actions/checkout@3d", "actions/checkout@v3 #", "name the commit"),
        ("CHANGELOG.md", "### Added", "### New", "### New is none of"),
    ],
)
def test_missing_and_stale_files_are_found(root: Path, file: str, old: str, new: str, complaint: str) -> None:
    text = (root / file).read_text()
    assert old in text
    (root / file).write_text(text.replace(old, new))
    assert any(complaint in finding for finding in checks.findings(root))


def test_a_tag_needs_a_closed_changelog_of_its_version(root: Path) -> None:
    changelog = root / "CHANGELOG.md"
    text = changelog.read_text()
    newest = next(line for line in text.splitlines() if line.startswith("## "))
    changelog.write_text(text.replace(newest, f"## {version()}, not yet released", 1))
    assert checks.findings(root) == []
    assert any("must be `## " in finding for finding in checks.findings(root, TAG))
    changelog.write_text(text.replace(newest, f"## {version()}, 2026-12-01", 1))
    assert checks.findings(root, TAG) == []
    assert any("is not v" in finding for finding in checks.findings(root, "v9.9.9"))
