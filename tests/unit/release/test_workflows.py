"""Workflows run nothing that an outsider could replace."""

from typing import Any

import yaml

from release import workflows
from release.project import ROOT


def test_nothing_is_released_before_the_tests_of_its_commit_have_passed() -> None:
    folder = ROOT / workflows.FOLDER
    jobs: dict[str, dict[str, Any]] = yaml.safe_load((folder / "release.yaml").read_text())["jobs"]
    called = {str(jobs[name].get("uses")) for name in jobs["release"]["needs"]}
    assert called == {"./.github/workflows/test.yaml", "./.github/workflows/rehearsal.yaml"}
    (rehearsed,) = yaml.safe_load((folder / "rehearsal.yaml").read_text())["jobs"].values()
    assert any("tests/cluster/test_release.py" in step.get("run", "") for step in rehearsed["steps"])


def test_actions_of_workflows_are_pinned() -> None:
    assert workflows.findings() == []
