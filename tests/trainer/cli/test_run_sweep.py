"""`qlora run` of a sweep trains the cells of a pod in one process."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlora_api.contract import WorkspaceLayout
from qlora_cli.local import run as local
from qlora_trainer.core.completion import PublishRecord, TrainRecord, read_completion
from tests.support.commands.command import SPEC, Files, invoked, new_files, qlora
from tests.support.fake_hub import FakeHub, serve
from tests.support.manifests import merged
from tests.support.ranks import waiting_at
from tests.support.runs.forked_step import start_forked

CELLS: list[dict[str, Any]] = [{"maxSteps": 4}, {"rank": 8, "targetModules": ["q_proj"], "maxSteps": 3}]
NAMES = ("rates-00", "rates-01")
EVAL = {"dataset": {"eval": {"fraction": 0.3}}, "training": {"maxSteps": 4}}


def manifest(files: Files, template: dict[str, Any] | None = None, **spec: Any) -> str:
    """The file of a sweep of two cells that one process trains; JSON is YAML."""
    path = files.root / "sweep.yaml"
    content = {"template": {"spec": merged(merged(SPEC, EVAL), template or {})}, "cells": CELLS, "cellsPerPod": 2}
    document = {**files.document, "kind": "QLoRASweep", "metadata": {"name": "rates"}, "spec": content | spec}
    path.write_text(json.dumps(document))
    return str(path)


def arguments(files: Files, template: dict[str, Any] | None = None, **spec: Any) -> list[str]:
    """The arguments of `qlora run` for that sweep."""
    volumes = ("--volume", f"models={files.models}", "--volume", f"data={files.data}")
    sweep = manifest(files, template, **spec)
    return ["run", sweep, "--workspace", str(files.workspace), *volumes, "--device", "cpu"]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork each step, whose start as another program takes seconds: six of them end these cells."""
    monkeypatch.setattr(local, "subprocess", SimpleNamespace(Popen=start_forked, PIPE=subprocess.PIPE))


@pytest.mark.usefixtures("forked")
def test_each_cell_ends_with_its_adapter_on_a_base_that_is_downloaded_once(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    monkeypatch.setenv("QLORA_MODEL_CACHE", "")
    with serve(FakeHub({"models/acme/tiny": tiny_llama})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        done = invoked(*arguments(files, {"model": {"source": "hf://acme/tiny"}}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.fetched.count("model.safetensors") == 1
    assert len(list((files.workspace / "models" / "quantized").glob("[!.]*"))) == 1
    losses = {}
    for name, steps in zip(NAMES, (4, 3), strict=True):
        layout = WorkspaceLayout(files.workspace / name)
        trained = read_completion(layout.completion("train"), TrainRecord)
        published = read_completion(layout.completion("publish"), PublishRecord)
        assert trained is not None
        assert published is not None
        assert trained.training_step == steps
        losses[name] = trained.eval_loss or 0.0
        assert f"{name}: train: training" in done.stdout
        assert published.adapter.sha256 in done.stdout
        # The process that trained both is the only one that loaded the model.
        assert len((layout.records / "attempts.jsonl").read_text().splitlines()) == 1
    assert f"Best: {min(losses, key=lambda name: losses[name])} (" in done.stdout
    page = (files.workspace / "shared" / "report.html").read_text()
    assert all(name in page for name in NAMES)
    assert f"Curves of all cells: {files.workspace / 'shared' / 'report.html'}" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_cells_are_run_one_by_one_and_the_best_is_published(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    output = {"output": {"destination": "pvc://adapters/best"}}
    command = [*arguments(files, output, cellsPerPod=1, publish="best")]
    missing = invoked(*command)
    assert missing.returncode == 10
    assert "spec.output.destination is pvc://adapters/best: give a folder for the claim" in missing.stderr
    done = invoked(*command, "--volume", f"adapters={adapters}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (adapters / "best" / "adapter_model.safetensors").exists()
    found = re.search(r"Best: (rates-0\d) ", done.stdout)
    assert found is not None
    record = read_completion(WorkspaceLayout(files.workspace / "rates-best").completion("publish"), PublishRecord)
    cell = read_completion(WorkspaceLayout(files.workspace / found[1]).completion("publish"), PublishRecord)
    assert record is not None
    assert cell is not None
    assert record.adapter.sha256 == cell.adapter.sha256


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_all_and_resumes(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    command = [sys.executable, "-m", "qlora_cli", *arguments(files)]
    environment = os.environ | waiting_at(tmp_path / "code", 2, 0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert any(re.match(r"rates-0\d: train: training 2/", line) for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 130, said
    assert f"qlora run --resume --workspace {files.workspace}" in said
    for name in NAMES:
        assert list(WorkspaceLayout(files.workspace / name).checkpoints.glob("step-*"))
    done = qlora("run", "--resume", "--workspace", str(files.workspace))
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = (files.workspace / "rates-01" / "records" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended"] for line in attempts] == ["interrupted", "succeeded"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_cell_that_fails_does_not_keep_the_others_from_being_published(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    cells = [{"maxSteps": 1, "learningRate": 1e-9}, {"maxSteps": 60, "learningRate": 1e-2}]
    done = invoked(*arguments(files, {"gate": {"minImprovement": 0.001}}, cells=cells))
    assert done.returncode == 20, done.stdout + done.stderr
    assert "rates-00: publish: GateFailed" in done.stdout
    assert read_completion(WorkspaceLayout(files.workspace / "rates-01").completion("publish"), PublishRecord)
    assert "Best: rates-01 (" in done.stdout


def test_what_cannot_be_run_here_is_rejected_before_anything_is_written(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    same = invoked(*arguments(files, cells=[{"rank": 8}, {"rank": 8}]))
    assert same.returncode == 10
    assert "spec.cells[1] (rank=8) is the same as spec.cells[0]" in same.stderr
    halved = {"training": {"evalEverySteps": 1, "maxSteps": 4}}
    stopped = invoked(*arguments(files, halved, halving={"minSteps": 2}, cellsPerPod=1, cells=[{"rank": 8}, {}]))
    assert "spec.halving stops cells in a cluster only: remove it from FILE" in stopped.stderr
    missing = invoked("run", manifest(files), "--workspace", str(files.workspace))
    assert "spec.model.source is pvc://models/model: give a folder for the claim" in missing.stderr
    assert not files.workspace.exists()
    twice = invoked("run", manifest(files), manifest(files), "--workspace", str(files.workspace))
    assert twice.returncode == 2, "one FILE at a time"


def test_a_job_is_not_run_in_the_folder_of_a_sweep(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    files.workspace.mkdir()
    sweep = json.loads(Path(manifest(files)).read_text())
    (files.workspace / "sweep.json").write_text(json.dumps(sweep))
    job = files.root / "job.yaml"
    job.write_text(json.dumps({**files.document, "metadata": {"name": "plain"}, "spec": SPEC}))
    again = invoked("run", "--resume", "--workspace", str(files.workspace))
    assert again.returncode == 10
    assert "rates-00 holds no run to resume" in again.stderr
    for name in NAMES:
        (files.workspace / name / "records").mkdir(parents=True)
    found = invoked("run", manifest(files), "--resume", "--workspace", str(tmp_path / "other"))
    assert "holds no run of a sweep to resume" in found.stderr
    alone = invoked("run", str(job), "--workspace", str(files.workspace))
    assert alone.returncode == 10
