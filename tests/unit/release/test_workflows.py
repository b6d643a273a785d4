"""Workflows run nothing that somebody could replace."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from release import workflows
from release.project import ROOT

SHA = "3d3c42e5aac5ba805825da76410c181273ba90b1"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("- uses: actions/checkout@v4", "name the commit"),
        ("- uses: actions/checkout@main # v4", "name the commit"),
        (f"- uses: actions/checkout@{SHA[:-1]} # v4", "name the commit"),
        (f"- uses: actions/checkout@{SHA}", "say the version"),
        (f"  uses: actions/checkout@{SHA} # main", "say the version"),
        ("  image: debian:12", "name the digest"),
        ("container: debian:12", "name the digest"),
    ],
)
def test_what_is_not_pinned_is_found_with_its_line(line: str, complaint: str) -> None:
    (finding,) = workflows.unpinned(f"jobs:\n{line}\n")
    assert finding.startswith("line 2: ")
    assert complaint in finding


@pytest.mark.parametrize(
    "line",
    [
        f"- uses: actions/checkout@{SHA} # v7.0.1",
        "- uses: ./local",
        "image: debian:12@sha256:" + "0" * 64,
        "container:",
    ],
)
def test_what_is_pinned_is_not_reported(line: str) -> None:
    assert workflows.unpinned(line) == []


@pytest.mark.parametrize("name", ["other.yaml", "other.yml"])
def test_a_workflow_with_either_ending_is_checked(tmp_path: Path, name: str) -> None:
    (tmp_path / workflows.FOLDER).mkdir(parents=True)
    (tmp_path / workflows.FOLDER / name).write_text("- uses: actions/checkout@main\n")
    assert workflows.files(tmp_path) == [tmp_path / workflows.FOLDER / name]
    (finding,) = workflows.findings(tmp_path)
    assert finding.startswith(f".github/workflows/{name}, line 1: ")


def test_nothing_is_released_before_the_tests_of_its_commit_have_passed() -> None:
    folder = ROOT / workflows.FOLDER
    jobs: dict[str, dict[str, Any]] = yaml.safe_load((folder / "release.yaml").read_text())["jobs"]
    called = {str(jobs[name].get("uses")) for name in jobs["release"]["needs"]}
    assert called == {"./.github/workflows/test.yaml", "./.github/workflows/rehearsal.yaml"}
    (rehearsed,) = yaml.safe_load((folder / "rehearsal.yaml").read_text())["jobs"].values()
    assert any("tests/cluster/test_release.py" in step.get("run", "") for step in rehearsed["steps"])


def test_what_workflows_run_is_pinned() -> None:
    assert workflows.findings() == []
