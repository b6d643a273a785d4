"""Several files to `qlora run`: prepared each, trained together in one process, published each."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.completion import PublishRecord, TrainRecord, read_completion
from tests.support.command import SPEC, Files, new_files, qlora
from tests.support.fake_hub import FakeHub, serve
from tests.support.tiny import merged

Jobs = dict[str, dict[str, Any]]
"""What each job changes in the spec, by its name."""
SHORT: dict[str, Any] = {"training": {"maxSteps": 4}}
JOBS: Jobs = {"plain": SHORT, "wide": {"lora": {"rank": 8, "targetModules": ["q_proj"]}, "training": {"maxSteps": 3}}}
LONG = {name: merged(job, {"training": {"maxSteps": 200, "evalEverySteps": 100}}) for name, job in JOBS.items()}


def manifests(files: Files, jobs: Jobs) -> list[str]:
    """A file for each job; JSON is YAML."""
    paths = []
    for name, changes in jobs.items():
        path = files.root / f"{name}.yaml"
        document = {**files.document, "metadata": {"name": name}, "spec": merged(SPEC, changes)}
        path.write_text(json.dumps(document))
        paths.append(str(path))
    return paths


def arguments(files: Files, jobs: Jobs) -> list[str]:
    """The arguments of `qlora run` for these jobs."""
    volumes = ("--volume", f"models={files.models}", "--volume", f"data={files.data}")
    return ["run", *manifests(files, jobs), "--workspace", str(files.workspace), *volumes, "--device", "cpu"]


def test_each_job_ends_with_its_adapter_on_a_base_that_is_downloaded_once(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    jobs: Jobs = {name: merged(job, {"model": {"source": "hf://acme/tiny"}}) for name, job in JOBS.items()}
    with serve(FakeHub({"models/acme/tiny": tiny_llama})) as hub:
        environment = {
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "QLORA_MODEL_CACHE": "",
        }
        done = qlora(*arguments(files, jobs), **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.fetched.count("model.safetensors") == 1
    assert len(list((files.workspace / "models" / "quantized").glob("[!.]*"))) == 1
    for name, steps in (("plain", 4), ("wide", 3)):
        layout = WorkspaceLayout(files.workspace / name)
        trained = read_completion(layout.completion("train"), TrainRecord)
        published = read_completion(layout.completion("publish"), PublishRecord)
        assert trained is not None
        assert published is not None
        assert trained.training_step == steps
        assert f"{name}: train: training" in done.stdout
        assert published.adapter.sha256 in done.stdout
        # The process that trained all is the only one that loaded the model.
        assert len((layout.records / "attempts.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_a_run_that_is_stopped_saves_all_and_resumes(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    command = [sys.executable, "-m", "qlora_cli", *arguments(files, LONG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(re.match(r"wide: train: training [1-9]\d*/200", line) for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
    assert process.returncode == 130, said
    assert f"qlora run --resume --workspace {files.workspace}" in said
    for name in JOBS:
        assert list(WorkspaceLayout(files.workspace / name).checkpoints.glob("step-*"))
    done = qlora("run", "--resume", "--workspace", str(files.workspace))
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = (files.workspace / "wide" / "records" / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["ended"] for line in attempts] == ["interrupted", "succeeded"]
    one = qlora("run", "--resume", str(files.root / "plain.yaml"), "--workspace", str(files.workspace))
    assert f"{files.workspace} holds a run of 2 jobs: give the FILEs of all, or none" in one.stderr


@pytest.mark.slow
def test_a_job_that_fails_does_not_keep_the_others_from_being_published(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    jobs: Jobs = {"rejected": merged(SHORT, {"gate": {"minImprovement": 0.9}}), "wide": JOBS["wide"]}
    done = qlora(*arguments(files, jobs))
    assert done.returncode == 20, done.stdout + done.stderr
    assert "rejected: publish: GateFailed" in done.stdout
    assert read_completion(WorkspaceLayout(files.workspace / "wide").completion("publish"), PublishRecord)


def test_jobs_that_cannot_be_trained_together_are_rejected_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path
) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    jobs: Jobs = {"plain": SHORT, "other": {"quantization": {"doubleQuant": False}}}
    done = qlora(*arguments(files, jobs))
    assert done.returncode == 10
    assert (
        "other cannot be trained together with other jobs: spec.quantization differs from that of plain: "
        "give both the same model, revision and quantization"
    ) in done.stderr
    assert not files.workspace.exists()
    missing = qlora("run", *manifests(files, JOBS), "--workspace", str(files.workspace))
    assert "wide: spec.model.source is pvc://models/model: give a folder for the claim" in missing.stderr
    twice = manifests(files, {"plain": {}}) * 2
    assert "metadata.name is plain in two files" in qlora("run", *twice, "--workspace", str(files.workspace)).stderr


def test_a_job_is_not_run_alone_in_the_folder_of_several(tmp_path: Path, tiny_llama: Path) -> None:
    files = new_files(tmp_path / "jobs", tiny_llama.parent)
    files.workspace.mkdir()
    (files.workspace / "jobs.json").write_text('["plain", "wide"]')
    done = qlora(*arguments(files, {"plain": SHORT}))
    assert done.returncode == 10
    assert f"{files.workspace} holds a run of several jobs: name another --workspace" in done.stderr
    again = qlora("run", "--resume", "--workspace", str(files.workspace))
    assert again.returncode == 10
    assert "plain holds no run to resume" in again.stderr
