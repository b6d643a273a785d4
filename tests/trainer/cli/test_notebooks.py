"""The example notebook, executed as it is."""

import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[3] / "examples" / "notebooks" / "first-job.ipynb"
SECONDS = 300


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with the base model."""
    shutil.copytree(tiny_llama, tmp_path / "models" / "base")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    return tmp_path


def executed(folder: Path) -> list[Any]:
    """The outputs of the notebook's cells, which all end without an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def test_the_first_job_is_planned_trained_and_shown(folder: Path) -> None:
    outputs = executed(folder)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "fits" in printed
    assert "Held-out loss" in printed
    assert len([output for output in outputs if "image/png" in output.get("data", ())]) == 1
    assert (folder / "runs" / "first-job" / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "runs" / "first-job" / "report" / "report.html").is_file()
