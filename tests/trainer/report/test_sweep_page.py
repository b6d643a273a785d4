"""The report of a sweep: what a person sees of its cells in a browser, however many have ended."""

import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from qlora_api.status import GateStatus
from qlora_trainer.core.folder_lock import exclusive
from qlora_trainer.report import sweep_page
from qlora_trainer.report.charts import curves_chart
from qlora_trainer.report.metrics_log import Curve, read_history
from qlora_trainer.report.sweep_page import add_stopped_to_sweep_report, add_to_sweep_report
from qlora_trainer.steps.publish import _trained_job, publish
from tests.support.command import Files
from tests.support.published import context
from tests.support.report_page import Page
from tests.support.tiny import Recorded


def add(files: Files, shared: Path, name: str, rank: int, eval_loss: float, score: float | None = None) -> None:
    """What `publish` of a cell with that rank and result would leave."""
    job = _trained_job(context(files))
    spec = job.spec.model_copy(update={"lora": job.spec.lora.model_copy(update={"rank": rank})})
    trained = job.trained.model_copy(update={"eval_loss": eval_loss})
    gate = None if score is None else GateStatus(passed=True, adapter_sha256="a" * 64, score=score)
    found = replace(job, name=name, spec=spec, trained=trained, gate=gate)
    add_to_sweep_report(found, files.workspace / "report", shared)


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
    add(finished, tmp_path, "rates-01", 8, 1.25)
    page = page_of(tmp_path)
    assert "script" not in page.elements
    assert "b" not in page.elements
    assert "rates-01 has the lowest held-out loss of 3 cells" in page.words


def test_publish_of_a_cell_writes_the_page_and_that_of_another_job_none(trained: Files, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    alone = context(trained)
    cell = replace(alone, mounts=replace(alone.mounts, sweep=shared))
    publish(cell, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert "tiny" in page_of(shared).words


def test_a_page_that_cannot_be_written_costs_no_adapter(trained: Files, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    alone = context(trained)
    cell = replace(alone, mounts=replace(alone.mounts, sweep=tmp_path / "file"))
    record = publish(cell, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    assert record.adapter.uri.endswith("/adapter")


def test_a_cell_that_was_stopped_is_shown_below_the_others_whatever_its_loss(finished: Files, tmp_path: Path) -> None:
    job = _trained_job(context(finished))
    history = read_history(finished.workspace / "report" / "metrics.jsonl").evaluation
    add_stopped_to_sweep_report("rates-00", job.spec, finished.workspace / "report", tmp_path)
    assert "No cell has ended" in page_of(tmp_path).words
    add(finished, tmp_path, "rates-01", 8, 99.0)
    words = page_of(tmp_path).words
    assert "QLoRA sweep rates-01 The cells" in words, "it has no other to be compared with"
    assert f"{history.values[-1]:.4f} at step {history.steps[-1]}, stopped" in words
    # It is resumed, and published.
    add(finished, tmp_path, "rates-00", 4, 1.5)
    assert "rates-00 has the lowest held-out loss of 2 cells" in page_of(tmp_path).words
    assert "stopped" not in page_of(tmp_path).words


def test_a_cell_that_hangs_while_it_writes_the_page_is_not_waited_for(
    finished: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page of a cell that is published raises then is an OSError, which costs no adapter."""
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
