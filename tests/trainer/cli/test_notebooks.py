"""The example notebook, executed as it is; without `slow` in this process, beside a finished run."""

import shutil
from pathlib import Path
from typing import Any

import click
import nbformat
import pytest
from matplotlib import pyplot
from nbclient import NotebookClient

from qlora_cli.__main__ import main
from tests.support.commands.command import Files

NOTEBOOK = Path(__file__).parents[3] / "examples" / "notebooks" / "first-job.ipynb"
SECONDS = 300


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder, with the base model."""
    shutil.copytree(tiny_llama, tmp_path / "models" / "base")
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_cell_runs_beside_a_finished_run_and_its_commands_exist(folder: Path, finished: Files) -> None:
    shutil.copytree(finished.workspace, folder / "runs" / "first-job")
    commands: list[tuple[str, ...]] = []
    names: dict[str, Any] = {}
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:  # type: ignore[no-untyped-call]
        if cell.cell_type == "code":
            exec(compile(cell.source, "cell", "exec"), names)
            if "qlora" in names:
                names["qlora"] = lambda *arguments: commands.append(arguments)
    assert [len(line.get_xdata()) > 1 for line in pyplot.gca().lines] == [True, True]
    pyplot.close()
    assert [name for name, *_ in commands] == ["plan", "run"]
    for name, *arguments in commands:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        command.make_context(name, arguments)
    assert (folder / "data" / "train.jsonl").is_file()


def executed(folder: Path) -> list[Any]:
    """The outputs of the notebook's cells, which all end without an error."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(folder)}}).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


@pytest.mark.slow
def test_the_first_job_is_planned_trained_and_shown(folder: Path) -> None:
    outputs = executed(folder)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "fits" in printed
    assert "Held-out loss" in printed
    assert len([output for output in outputs if "image/png" in output.get("data", ())]) == 1
    assert (folder / "runs" / "first-job" / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "runs" / "first-job" / "report" / "report.html").is_file()
