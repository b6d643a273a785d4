"""The example notebooks, executed as they are, and the Python client over runs of this machine."""

import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient

from qlora_api.contract import ProgressRecord, decode_any_record
from qlora_api.spec.job import QLoRAJobSpec
from qlora_client import LocalBackendConfig, QLoRAClient, Row
from tests.support.command import ROWS, SPEC, Files
from tests.support.tiny import write_rows

NOTEBOOKS = Path(__file__).parents[3] / "examples" / "notebooks"
SECONDS = 300


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder: the base model, and the data that the first notebook writes."""
    shutil.copytree(tiny_llama, tmp_path / "models" / "base")
    write_rows(tmp_path / "data" / "train.jsonl", ROWS)
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    return tmp_path


def executed(name: str, folder: Path) -> list[Any]:
    """The outputs of the notebook's cells, all of which end without an error."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def printed(outputs: list[Any]) -> str:
    return "".join(output.text for output in outputs if output.output_type == "stream")


def shown(outputs: list[Any], kind: str) -> list[str]:
    """What is shown of a media type."""
    return [output.data[kind] for output in outputs if kind in output.get("data", ())]


def test_the_first_job_is_planned_trained_and_downloaded(folder: Path) -> None:
    outputs = executed("first-job.ipynb", folder)
    assert "fits" in printed(outputs)
    assert '"step":"train"' in printed(outputs)
    assert "held-out loss" in printed(outputs)
    assert len(shown(outputs, "image/png")) == 1
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    # The job is deleted, and its workspace kept.
    [workspace] = (folder / "runs").iterdir()
    assert (workspace / "report" / "report.html").is_file()
    assert QLoRAClient(LocalBackendConfig(folder=folder / "runs")).list_jobs() == []


@pytest.mark.slow
def test_three_ranks_are_trained_and_compared(folder: Path) -> None:
    outputs = executed("three-ranks.ipynb", folder)
    [table] = shown(outputs, "text/html")
    assert "<td>lora.rank</td><td>2</td><td>8</td><td>32</td>" in table
    assert "<td>Phase</td><td>Succeeded</td><td>Succeeded</td><td>Succeeded</td>" in table
    assert len(shown(outputs, "image/png")) == 1
    assert (folder / "best-adapter" / "adapter_model.safetensors").is_file()


def remembered(files: Files, runs: Path, name: str, rank: int) -> None:
    """A finished run as the client would have left it, with another rank in its manifest."""
    shutil.copytree(files.workspace, runs / name)
    spec = files.with_spec({"lora": {"rank": rank}}).document["spec"]
    document = {**files.document, "metadata": {"name": name}, "spec": spec}
    records = runs / name / "records"
    (records / "manifest.json").write_text(json.dumps(document))
    steps = ("prepare", "train", "publish")
    (records / "run.jsonl").write_text("".join((files.root / f"{step}.stdout").read_text() for step in steps))


def test_runs_of_this_machine_are_listed_compared_drawn_and_read(tmp_path: Path, finished: Files) -> None:
    for name, rank in (("small", 4), ("large", 8)):
        remembered(finished, tmp_path / "runs", name, rank)
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path / "runs", volumes={"models": finished.models}))
    assert [(job.name, job.phase) for job in client.list_jobs()] == [("large", "Succeeded"), ("small", "Succeeded")]
    job = client.get_job("small")
    assert job.status.adapter is not None
    assert job.status.progress is not None
    assert job.status.progress.step == SPEC["training"]["maxSteps"]
    compared = client.compare("small", "large")
    assert compared.settings == (Row("lora.rank", ("4", "8")),)
    assert list(compared.histories["small"].training) == list(range(1, 31))
    axes = client.plot("small", axes=Figure().add_subplot())
    assert len(axes.lines[0].get_ydata()) == 30
    trained = [decode_any_record(line) for line in client.get_job_logs("small", "train", follow=True)]
    assert any(isinstance(record, ProgressRecord) and record.step == "train" for record in trained)
    assert {record.step for record in trained if record is not None} == {"train"}
    assert [event.kind for event in client.get_job_events("small")] == ["Normal"] * 3
    folder = client.get_adapter("small", tmp_path / "adapter")
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        finished.workspace / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_run_that_is_deleted_stops(folder: Path) -> None:
    spec = QLoRAJobSpec.model_validate(
        {
            **SPEC,
            "model": {"source": "pvc://models/base"},
            "workspace": {"retain": False},
            "output": {"destination": "pvc://data/adapter"},
        }
    )
    volumes = {"models": folder / "models", "data": folder / "data"}
    client = QLoRAClient(LocalBackendConfig(folder=folder / "runs", volumes=volumes, device="cpu"))
    name = client.train(spec)
    other = QLoRAClient(LocalBackendConfig(folder=folder / "runs"))
    assert other.get_job(name).phase == "Preparing"
    other.delete_job(name)
    assert list((folder / "runs").iterdir()) == []
    assert other.list_jobs() == []
