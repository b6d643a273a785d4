"""A Dockerfile's pinned base and layers, and workflows that run nothing another user could replace."""

import re
from typing import Any

import pytest
import yaml

from release import dockerfiles, workflows
from release.project import DOCKERFILES, ROOT, ReleaseError

TRAINER = (ROOT / DOCKERFILES["qlora-trainer"]).read_text()


@pytest.mark.parametrize(
    "base", ["python:3.11", "docker.io/library/python:3.11", "docker.io/library/python@sha256:" + "0" * 64, ""]
)
def test_a_base_without_a_digest_is_rejected(base: str) -> None:
    with pytest.raises(ReleaseError, match="expected one REGISTRY/NAME:TAG@sha256:DIGEST"):
        dockerfiles.base_image(f"ARG BASE_IMAGE={base}\nFROM $BASE_IMAGE\n")


def test_a_layer_does_not_depend_on_the_name_of_the_base() -> None:
    """An argument that is declared before later commands is part of their cache key."""
    for path in DOCKERFILES.values():
        stage = (ROOT / path).read_text().rpartition("\nFROM ")[2]
        before, declared, _ = stage.partition("\nARG BASE_IMAGE")
        assert declared
        assert "LABEL" not in before
        assert "\nRUN" not in stage.partition("\nARG BASE_IMAGE")[2]


def test_the_list_of_packages_has_reasons_for_omitted_ones() -> None:
    left_out = re.findall(r"--no-emit-package (\S+)", TRAINER)
    assert left_out
    assert all(f"{name}" in dockerfiles.left_out_packages(TRAINER) for name in left_out)


def test_nothing_is_released_before_the_tests_of_its_commit_have_passed() -> None:
    folder = ROOT / workflows.FOLDER
    jobs: dict[str, dict[str, Any]] = yaml.safe_load((folder / "release.yaml").read_text())["jobs"]
    called = {str(jobs[name].get("uses")) for name in jobs["release"]["needs"]}
    assert called == {"./.github/workflows/test.yaml", "./.github/workflows/rehearsal.yaml"}
    (rehearsed,) = yaml.safe_load((folder / "rehearsal.yaml").read_text())["jobs"].values()
    assert any("tests/cluster/test_release.py" in step.get("run", "") for step in rehearsed["steps"])


def test_actions_of_workflows_are_pinned() -> None:
    assert workflows.findings() == []
