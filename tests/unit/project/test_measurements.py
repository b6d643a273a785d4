"""The tables of figures in the documentation are those that the benchmarks' results make."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, together
from benchmarks.base import __main__ as base
from benchmarks.defaults import summary as defaults
from benchmarks.defaults.__main__ import PAGE as AUTOMATIC_SETTINGS
from benchmarks.machine import RESULTS
from benchmarks.operator import table
from benchmarks.operator.__main__ import LOADS
from benchmarks.quality import summary as quality
from benchmarks.quality.__main__ import FIGURE, MEASUREMENTS, PAGE
from benchmarks.quality.results import read_runs


def generated(page: Path, name: str, *command: str) -> str:
    """The text between a page's marks."""
    return page.read_text().split(table.begin(name, *command))[1].split(table.end(name))[0].strip()


def tables(name: str, made: Callable[[dict[str, Any]], str]) -> str:
    """The tables of a result, or nothing before it is measured."""
    file = RESULTS / f"{name}.json"
    return made(json.loads(file.read_text())).strip() if file.exists() else ""


@pytest.mark.parametrize("load", LOADS)
def test_the_figures_of_many_jobs_are_those_measured(load: str) -> None:
    assert generated(table.PAGE, load) == tables(f"operator-{load}", LOADS[load].tables)


def test_the_figures_of_the_base_are_those_measured() -> None:
    assert generated(MEASUREMENTS, base.NAME, base.COMMAND) == tables(base.NAME, base.tables)


def test_the_figures_of_adapters_trained_together_are_those_measured() -> None:
    shown = generated(MEASUREMENTS, together.NAME, together.COMMAND)
    assert shown == tables(together.NAME, together.tables)


def test_the_figures_of_a_block_are_those_counted() -> None:
    assert generated(MEASUREMENTS, kernels.NAME, kernels.COMMAND) == tables(kernels.NAME, kernels.tables)


def test_the_tables_and_the_figure_of_quality_are_those_measured() -> None:
    runs = read_runs()
    for page, made in ((PAGE, quality.tables), (MEASUREMENTS, quality.claim_table)):
        assert generated(page, quality.NAME, quality.COMMAND) == made(runs).strip()
    assert (FIGURE.read_bytes() if FIGURE.exists() else None) == quality.curves_figure(runs)


def test_the_tables_of_automatic_settings_are_those_measured() -> None:
    assert generated(AUTOMATIC_SETTINGS, defaults.NAME, defaults.COMMAND) == tables(defaults.NAME, defaults.tables)
