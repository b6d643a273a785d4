"""Output and files of `qlora run` of a sweep, around steps that are replaced here."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_api.artifact_status import AdapterStatus, GateStatus
from qlora_api.contract import ExitCode, ResultRecord
from qlora_api.sweep.spec import QLoRASweepDocument, cells
from qlora_cli.local import run_sweep
from qlora_cli.local.display import ConsoleDisplay
from qlora_cli.local.results import show_ends
from qlora_cli.local.run import Ended, LocalRun
from qlora_cli.local.run_sweep import LocalSweep, as_job, best_cell
from tests.support.builders import ADAPTER
from tests.support.sweeps import SWEEP


def sweep(root: Path, **spec: Any) -> LocalSweep:
    """Three cells that one process trains."""
    content = SWEEP["spec"] | {"grid": {"rank": [8, 16, 32]}, "cellsPerPod": 3} | spec
    document = QLoRASweepDocument.model_validate({**SWEEP, "metadata": {"name": "rates"}, "spec": content})
    found = cells("rates", document.spec, "claim")
    return LocalSweep.of(document, [], LocalRun(as_job(found[0]), root, {}, {}, "cpu"))


def shown(found: LocalSweep) -> tuple[str, dict[str, Ended]]:
    output = io.StringIO()
    console = Console(file=output, width=200)
    ended = run_sweep.run_sweep(
        found, lambda run: ConsoleDisplay(console, run.layout.records, job=run.document.metadata.name)
    )
    return output.getvalue(), ended


@pytest.fixture
def diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are prepared, and their process ends with the failure of the first."""
    monkeypatch.setattr(run_sweep, "go_through", lambda *_: Ended(0, None, {}))
    monkeypatch.setattr(run_sweep, "run_step", lambda *_: (int(ExitCode.DIVERGED), None))


@pytest.mark.usefixtures("diverged")
def test_a_cell_that_fails_after_the_first_is_named_with_its_log(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    completion = found.runs[2].layout.completion("train")
    completion.parent.mkdir(parents=True)
    completion.write_text("{}")
    text, ended = shown(found)
    log = found.runs[0].layout.records / "train.log"
    assert f"rates-01: train: training did not finish; see {log}." in text
    assert "rates-02" not in text
    assert [each.exit_code for each in ended.values()] == [14, 14, 0]


@pytest.mark.usefixtures("diverged")
def test_a_sweep_is_resumed_from_its_folder(tmp_path: Path) -> None:
    found = sweep(tmp_path)
    shown(found)
    earlier = run_sweep.earlier_sweep(tmp_path)
    assert earlier is not None
    document, runs = earlier
    assert document == found.document
    assert [run.document.metadata.name for run in runs] == ["rates-00", "rates-01", "rates-02"]
    assert run_sweep.earlier_sweep(tmp_path / "rates-00") is None


def ending(loss: float, score: float | None = None, code: int = 0) -> Ended:
    common = {"job_uid": "u", "pod_uid": "p", "time": "2026-01-02T03:04:05Z", "outcome": "succeeded", "exit_code": 0}
    judged = None if score is None else GateStatus(passed=True, adapter_sha256="0" * 64, score=score)
    adapter: AdapterStatus = ADAPTER
    results = {
        "train": ResultRecord.model_validate(common | {"step": "train", "eval_loss": loss, "reason": "Done"}),
        "publish": ResultRecord.model_validate(
            common | {"step": "publish", "adapter": adapter.dump(), "gate": judged, "reason": "Done"}
        ),
    }
    return Ended(code, None, results)  # type: ignore[arg-type]


def test_the_best_cell_has_the_lowest_loss_or_the_highest_score(tmp_path: Path) -> None:
    ended = {"rates-00": ending(1.5, 0.5), "rates-01": ending(1.25, 0.25), "rates-02": ending(1.0, 0.75, code=20)}
    assert best_cell(sweep(tmp_path), ended) == 1
    template = SWEEP["spec"]["template"]["spec"] | {"gate": {"score": {"check": "exactMatch"}}}
    scored = sweep(tmp_path, best="score", template={"spec": template})
    assert best_cell(scored, ended) == 0
    assert best_cell(scored, {}) is None
    assert best_cell(sweep(tmp_path, select="all"), ended) is None, "they are not compared"


def test_the_cells_are_printed_side_by_side(tmp_path: Path) -> None:
    output, found = io.StringIO(), sweep(tmp_path)
    show_ends(
        found,
        {"rates-00": ending(1.5), "rates-01": ending(1.25, 0.25), "rates-02": ending(1.0, code=20)},
        Console(file=output, width=60),
    )
    table = output.getvalue().split("\n\n")[-2]
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["rates-00", "rank=8", "1.5000", "–", "published"],
        ["rates-01", "rank=16", "1.2500", "25.0%", "published"],
        ["rates-02", "rank=32", "1.0000", "–", *["failed", "with", "exit", "code", "20"]],
    ]
    assert output.getvalue().endswith("Best: rates-01 (rank=16)\n")
