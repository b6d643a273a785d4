"""The report of a sweep, as a browser shows it."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_api.artifact_status import GateStatus
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.folder_lock import exclusive
from qlora_trainer.history.metrics_log import Curve, read_history
from qlora_trainer.report import sweep_page
from qlora_trainer.report.charts import curves_chart
from qlora_trainer.report.sweep_page import add_to_sweep_report, add_unfinished_to_sweep_report
from qlora_trainer.steps.publish import _trained_job, publish
from tests.support.commands.command import Files
from tests.support.models.tiny import Recorded
from tests.support.runs.published import context
from tests.support.runs.report_page import Page


def add(
    files: Files,
    shared: Path,
    name: str,
    rank: int,
    eval_loss: float,
    score: float | None = None,
    *,
    passed: bool = True,
    source: str | None = None,
) -> None:
    """What `publish` of a cell with that rank and result would leave."""
    job = _trained_job(context(files))
    spec = job.spec.model_copy(update={"lora": job.spec.lora.model_copy(update={"rank": rank})})
    if source is not None:
        spec = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"source": source})})
    trained = job.trained.model_copy(update={"eval_loss": eval_loss})
    gated = score is not None or not passed
    gate = GateStatus(passed=passed, adapter_sha256="a" * 64, score=score) if gated else None
    found = replace(job, name=name, spec=spec, trained=trained, gate=gate)
    add_to_sweep_report(found, files.workspace / "report", shared)


def unfinished(files: Files, shared: Path, name: str, *, diverged: bool) -> None:
    """What `train` of a cell that has diverged, or is stopped, would leave."""
    spec = _trained_job(context(files)).spec
    add_unfinished_to_sweep_report(name, spec, files.workspace / "report", shared, diverged=diverged)


def cell_of(files: Files, shared: Path) -> StepContext:
    """The context of these files, as of a cell of a sweep with that folder."""
    alone = context(files)
    return replace(alone, mounts=replace(alone.mounts, sweep=shared))


def page_of(shared: Path) -> Page:
    return Page((shared / "report.html").read_text())


def test_the_page_has_the_curves_of_all_cells_and_the_best_first(finished: Files, tmp_path: Path) -> None:
    add(finished, tmp_path, "rates-00", 4, 1.5)
    alone = page_of(tmp_path)
    assert "rates-00" in alone.words
    add(finished, tmp_path, "rates-01", 8, 1.25)
    add(finished, tmp_path, "rates-02", 16, 1.75)

    page = page_of(tmp_path)
    assert page.open == []
    assert page.fetched == [] or all(address.startswith("#") for address in page.fetched)
    assert page.elements.count("svg") == 2
    assert "rates-01 has the lowest held-out loss of 3 cells" in page.words
    assert "Score" not in page.words
    assert "Cell rank Held-out loss rates-01 8 1.2500 rates-00 4 1.5000 rates-02 16 1.7500" in page.words
    # A cell whose publish step runs again is there once.
    before = (tmp_path / "report.html").read_text()
    add(finished, tmp_path, "rates-01", 8, 1.25)
    assert (tmp_path / "report.html").read_text() == before


def test_the_page_of_a_sweep_with_scores_shows_them_and_names_the_highest(finished: Files, tmp_path: Path) -> None:
    add(finished, tmp_path, "rates-00", 4, 1.25, score=0.5)
    add(finished, tmp_path, "rates-01", 8, 1.5, score=0.75)
    words = page_of(tmp_path).words
    assert "Of 2 cells, rates-00 has the lowest held-out loss and rates-01 the highest score" in words
    assert "Held-out loss Score rates-00 4 1.2500 50.0% rates-01 8 1.5000 75.0% (highest)" in words
    # Of equal scores the one with the lower loss is the better, as its sweep has it.
    add(finished, tmp_path, "rates-00", 4, 1.25, score=0.75)
    words = page_of(tmp_path).words
    assert "rates-00 has the lowest held-out loss and the highest score of 2 cells" in words


def test_cells_with_different_data_are_shown_without_the_lowest_loss(finished: Files, tmp_path: Path) -> None:
    add(finished, tmp_path, "tasks-00", 4, 1.5)
    add(finished, tmp_path, "tasks-01", 4, 1.25, score=0.5, source="pvc://data/other.jsonl")
    words = page_of(tmp_path).words
    assert words.count("2 cells") == 1
    assert "has the lowest held-out loss" not in words
    assert "tasks-01 pvc://data/other.jsonl" in words


MALFORMED: dict[str, dict[str, Any]] = {
    "lengths": {"evaluation": {"steps": [0, 1], "values": [1.0]}},
    "mathtext": {"name": "$a^$"},
    "fraction": {"name": "a$\\frac$b"},
    "range": {"evaluation": {"steps": [0, 2**53], "values": [-1.7e308, 1.7e308]}},
    "another": {"name": "rates-00", "evalLoss": 0.001},
}
"""What a file for a cell of that name would have, and a page cannot show."""


def test_what_another_pod_has_left_is_shown_as_text_or_left_out(finished: Files, tmp_path: Path) -> None:
    add(finished, tmp_path, "rates-00", 4, 1.5)
    cells = tmp_path / "cells"
    (cells / "a.json").write_text("{")
    (cells / "b.json").write_bytes(b" " * 300_000)
    (cells / "c.json").symlink_to("/etc/passwd")
    os.mkfifo(cells / "e.json")
    entry = json.loads((cells / "rates-00.json").read_text())
    entry |= {"name": "<script>alert(1)</script>", "settings": {"rank": "<b>"}, "evalLoss": 9.0}
    (cells / "d.json").write_text(json.dumps(entry))
    (cells / "f.json").write_text(json.dumps(entry | {"name": "f"}))
    for stem, changes in MALFORMED.items():
        (cells / f"{stem}.json").write_text(json.dumps(entry | {"name": stem} | changes))
    longest = json.dumps(entry | {"name": "digits"}).replace('"<b>"', "9" * 5000)
    (cells / "digits.json").write_text(longest)
    add(finished, tmp_path, "rates-01", 8, 1.25)
    page = page_of(tmp_path)
    assert "script" not in page.elements
    assert "b" not in page.elements
    assert "<b>" in page.words
    assert page.elements.count("svg") == 2
    assert "rates-01 has the lowest held-out loss of 3 cells" in page.words


def test_publish_of_a_cell_writes_the_page_and_that_of_another_job_none(trained: Files, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    publish(cell_of(trained, shared), Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert "tiny" in page_of(shared).words


@pytest.mark.parametrize("stem", MALFORMED)
def test_what_another_pod_has_left_costs_no_adapter_and_no_curve(trained: Files, tmp_path: Path, stem: str) -> None:
    cells = tmp_path / "shared" / "cells"
    cells.mkdir(parents=True)
    points = {"steps": [0, 1], "values": [1.0, 0.5]}
    entry = {"name": stem, "settings": {"rank": 4}, "loss": points, "evaluation": points, "evalLoss": 0.5}
    (cells / f"{stem}.json").write_text(json.dumps(entry | MALFORMED[stem]))
    record = publish(cell_of(trained, tmp_path / "shared"), Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert (trained.workspace / "adapter" / "adapter_model.safetensors").is_file(), record.adapter.uri
    assert "QLoRA sweep tiny The cells" in page_of(tmp_path / "shared").words


def test_a_page_that_cannot_be_drawn_costs_no_adapter(
    trained: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def draw(*_: object) -> str:
        # It is drawn last: by then nothing can take the adapter away.
        assert (trained.workspace / "records" / "publish.json").is_file()
        raise RuntimeError("no font")

    monkeypatch.setattr(sweep_page, "curves_chart", draw)
    cell = cell_of(trained, tmp_path / "shared")
    publish(cell, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert (trained.workspace / "adapter" / "adapter_model.safetensors").is_file()
    assert "the page cannot be drawn: RuntimeError('no font')" in caplog.text
    # An attempt after one that was killed before the page has only that to do.
    monkeypatch.undo()
    publish(cell, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert "tiny" in page_of(tmp_path / "shared").words


def test_a_page_that_cannot_be_written_costs_no_adapter(trained: Files, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    record = publish(cell_of(trained, tmp_path / "file"), Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert record.adapter.uri.endswith("/adapter")


def test_a_cell_that_was_stopped_is_shown_below_the_others_whatever_its_loss(finished: Files, tmp_path: Path) -> None:
    history = read_history(finished.workspace / "report" / "metrics.jsonl").evaluation
    unfinished(finished, tmp_path, "rates-00", diverged=False)
    assert "No cell has succeeded so far" in page_of(tmp_path).words
    add(finished, tmp_path, "rates-01", 8, 99.0)
    words = page_of(tmp_path).words
    assert "QLoRA sweep rates-01 The cells" in words, "it has no other to be compared with"
    assert f"{history.values[-1]:.4f} at step {history.steps[-1]}, stopped" in words
    # It is resumed, and published.
    add(finished, tmp_path, "rates-00", 4, 1.5)
    assert "rates-00 has the lowest held-out loss of 2 cells" in page_of(tmp_path).words
    assert ", stopped" not in page_of(tmp_path).words


def test_failed_cells_are_last_with_the_reason_and_never_the_best(finished: Files, tmp_path: Path) -> None:
    history = read_history(finished.workspace / "report" / "metrics.jsonl").evaluation
    add(finished, tmp_path, "rates-00", 4, 0.5, score=0.9, passed=False)
    assert "No cell has succeeded so far" in page_of(tmp_path).words
    assert "90.0%" in page_of(tmp_path).words, "by what it has failed"
    unfinished(finished, tmp_path, "rates-01", diverged=True)
    unfinished(finished, tmp_path, "rates-02", diverged=False)
    add(finished, tmp_path, "rates-03", 8, 99.0, score=0.1)
    add(finished, tmp_path, "rates-04", 8, 98.0, score=0.2)
    words = page_of(tmp_path).words
    assert "rates-04 has the lowest held-out loss and the highest score of 2 cells" in words
    rows = words[words.index("Held-out loss Score") : words.index("Loss on the held-out rows")]
    latest = f"{history.values[-1]:.4f} at step {history.steps[-1]}"
    assert [name for name in rows.split() if name.startswith("rates-")] == [f"rates-0{n}" for n in (4, 3, 2, 0, 1)]
    assert f"{latest}, stopped rates-00" in rows
    assert "0.5000, did not pass its gate 90.0% rates-01" in rows
    assert f"{latest}, diverged" in rows
    # Its gate lets it pass now.
    add(finished, tmp_path, "rates-00", 4, 0.5, score=0.9)
    assert "rates-00 has the lowest held-out loss and the highest score of 3 cells" in page_of(tmp_path).words
    assert "did not pass its gate 90" not in page_of(tmp_path).words


def test_publish_of_a_cell_that_does_not_pass_its_gate_writes_the_page_too(trained: Files, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    alone = context(replace(trained, spec={**trained.spec, "gate": {"maxEvalLoss": 0.001}}))
    cell = replace(alone, mounts=replace(alone.mounts, sweep=shared))
    with pytest.raises(StepFailure, match=r"spec\.gate\.maxEvalLoss"):
        publish(cell, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    page = page_of(shared)
    assert ", did not pass its gate" in page.words
    assert page.elements.count("svg") == 2


def test_a_cell_that_hangs_while_it_writes_the_page_is_not_waited_for(
    finished: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published cell then gets an OSError, which costs no adapter."""
    monkeypatch.setattr(sweep_page, "_LONGEST_WAIT_SECONDS", 0.2)
    (tmp_path / "cells").mkdir()
    with exclusive(tmp_path / "cells" / ".lock", 1), pytest.raises(OSError, match="another process holds"):
        add(finished, tmp_path, "rates-00", 4, 1.5)
    assert not (tmp_path / "report.html").exists()


def test_curves_over_each_other_name_a_dozen_and_draw_all() -> None:
    curves = {f"cell-{number:02}": Curve((0, 1), (1.0 + number, 0.5)) for number in range(14)}
    page = Page(curves_chart("loss", "Loss", curves))
    assert "cell-11" in page.words
    assert "cell-12" not in page.words
    assert curves_chart("loss", "Loss", {"cell-00": Curve()}) == ""


def test_a_curve_that_runs_away_does_not_press_the_others_flat() -> None:
    curves = {"cell-00": Curve((0, 1), (2.0, 1.0)), "cell-01": Curve((0, 1), (2.0, 5000.0))}
    assert "5000" in Page(curves_chart("loss", "Loss", curves)).words
    assert "5000" not in Page(curves_chart("loss", "Loss", curves, {"cell-01"})).words
    alone = {"cell-01": curves["cell-01"]}
    assert "5000" in Page(curves_chart("loss", "Loss", alone, {"cell-01"})).words


def test_the_label_of_a_curve_is_no_formula() -> None:
    curves = {"$a^$": Curve((0, 1), (1.0, 0.5)), "a$\\frac$b": Curve((0, 1), (2.0, 0.5))}
    words = Page(curves_chart("loss", "Loss", curves)).words
    assert "$a^$" in words
    assert "a$\\frac$b" in words
