"""The command that runs an image's trainer for the tests on a GPU."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.commands.image import CONTAINER_TOOL, IMAGE, as_in_image

COMMAND = [sys.executable, "-m", "qlora_trainer", "train", "--job", "/a/job/job.json"]


def test_an_image_gets_the_arguments_the_folders_and_the_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMAGE, "registry/trainer:1")
    monkeypatch.setenv(CONTAINER_TOOL, "podman")
    folders = [Path("/a/models"), Path("/a/job"), Path("/a/job")]
    tool, *options = as_in_image(COMMAND, {"QLORA_DEVICE": "cuda"}, folders)
    assert tool == "podman"
    assert options[-4:] == ["registry/trainer:1", "train", "--job", "/a/job/job.json"]
    mounts = [value for name, value in pairwise(options) if name == "--volume"]
    assert mounts == ["/a/job:/a/job", "/a/models:/a/models"]
    assert {"--read-only", "QLORA_DEVICE=cuda", "HF_HUB_OFFLINE=1"} <= set(options)


def test_without_an_image_this_environments_trainer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(IMAGE, raising=False)
    assert as_in_image(COMMAND, {}, []) == COMMAND
