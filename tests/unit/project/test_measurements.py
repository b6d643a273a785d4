"""The figures of the documentation are those that the benchmarks have written."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import together_tables
from benchmarks.base import summary as base
from benchmarks.inputs import RESULTS
from benchmarks.operator import table
from benchmarks.operator.__main__ import LOADS
from benchmarks.speed.summary import tokens_per_second

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "trainer" / "measurements.md").read_text()
MIB = 2**20


def result(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()))


def row(start: str) -> str:
    """The row of a table that starts with this text."""
    found = [line for line in TEXT.splitlines() if line.startswith(f"| {start}")]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("system", "name"),
    [
        ("ours", "This trainer"),
        ("trl", "TRL 1.16, default"),
        ("trl-packing", "TRL 1.16, packing"),
        ("original", "The paper's recipe on plain transformers and PEFT"),
    ],
)
def test_speed_and_memory_of_each_system_are_in_the_table(system: str, name: str) -> None:
    figures = result("speed")["figures"][system]
    cells = (figures["tokens_per_second"], figures["peak_bytes"] / MIB, figures["above_loaded_bytes"] / MIB)
    assert row(f"{name} |") == f"| {name} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |"


@pytest.mark.parametrize(
    ("what", "start"),
    [
        ("useful tokens/s over TRL default", "≥ {target:g} × the tokens/s of TRL's default | {value:.2f} ×"),
        ("useful tokens/s over TRL with packing", "≥ {target:g} × those of TRL with packing | {value:.2f} ×"),
        ("peak memory over TRL default", "≤ {target:g} × the peak of TRL's default | {value:.2f} ×"),
        (
            "memory above loading over TRL with packing",
            "≤ {target:g} × what TRL with packing needs above the loaded model | {value:.2f} ×",
        ),
    ],
)
def test_each_comparison_has_its_target_and_whether_it_is_met(what: str, start: str) -> None:
    (comparison,) = (each for each in result("speed")["comparisons"] if each["what"] == what)
    assert "| met" in row(start.format(**comparison))
    assert comparison["met"]


def test_the_comparison_with_one_allocator_is_that_of_its_own_run() -> None:
    measured = result("same-allocator/speed")
    ours, theirs = (measured["figures"][system]["above_loaded_bytes"] for system in ("ours", "trl-packing"))
    needs = f"this trainer needs {ours / MIB:,.0f} MiB above the loaded model, TRL with packing {theirs / MIB:,.0f} MiB"
    assert needs in TEXT
    # Comparisons are not rounded in this trainer's favor.
    assert f"({math.ceil(100 * ours / theirs) / 100} × with this" in TEXT
    # Something else used the machine during one of TRL's repetitions.
    speed, their_speed = (tokens_per_second(measured["measured"][system][1]) for system in ("ours", "trl-packing"))
    assert f"{speed:.0f} tokens/s with this trainer, {their_speed:.0f} with TRL" in TEXT
    assert f"({math.floor(100 * speed / their_speed) / 100} × those of TRL with packing and this" in TEXT


def test_the_comparison_with_the_former_trainer_is_that_of_three_pairs() -> None:
    pairs = [
        [result(f"former/{commit}-{number}")["figures"]["ours"] for commit in ("8d79f20", "3175eee")]
        for number in (1, 2, 3)
    ]
    speeds = [" and ".join(f"{each['tokens_per_second']:.0f}" for each in pair) for pair in pairs]
    peaks = [" and ".join(f"{each['peak_bytes'] / MIB:,.0f}" for each in pair) for pair in pairs]
    assert f"{speeds[0]}, {speeds[1]} tokens/s; the peak was {peaks[0]}, {peaks[1]} MiB" in TEXT
    assert f"In a third pair ({speeds[2]} tokens/s)" in TEXT


def test_times_to_the_loss_and_the_overhead_of_the_loop_are_those_measured() -> None:
    ours, trl, packing, original = (
        f"{result('speed')['figures'][name]['seconds_to_target']:.0f} s"
        for name in ("ours", "trl", "trl-packing", "original")
    )
    assert f"{ours}; TRL {trl}, with packing {packing}, the recipe {original}" in row("Time to a held-out loss of 2.45")
    overhead = {
        clock: {key: f"{100 * value:.1f} %" for key, value in each.items()}
        for clock, each in result("loop")["overhead"].items()
    }
    wall = overhead["wall time"]
    assert (
        f"{wall['median'].removeprefix('-')} by wall time (quartiles {wall['lower_quartile']} and "
        f"{wall['upper_quartile']}), {overhead['processor time']['median']} by processor time "
        f"({overhead['processor time without the optimizer']['median']} without the optimizer)"
    ) in row("≤ 2 % of a step")


def test_the_shares_of_a_step_are_those_of_the_profile() -> None:
    profile = (ROOT / "benchmarks" / "results" / "profile.md").read_text()
    share = dict(re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| (\d+)% \|$", profile, re.MULTILINE))
    assert (
        f"{share['backward']} % of a step is the backward pass, {share['forward']} % the forward pass, "
        f"{share['recomputation']} % recomputation for gradient checkpointing, "
        f"{share['output layer and loss']} % output layer and loss, "
    ) in TEXT
    assert f"The remaining {share['elementwise and bookkeeping']} % is elementwise work" in TEXT


def test_the_speed_of_prepare_is_that_measured() -> None:
    figures = result("data")["figures"]
    assert (
        f"{figures['seconds']:.0f} s: {figures['rowsPerSecond']:,.0f} rows/s, "
        f"{round(figures['tokensPerSecond'], -3):,.0f} tokens/s, {100 * figures['shareOfCores']:.0f} % of both cores"
    ) in row("One million rows")
    memory = row("Memory of all its processes")
    assert f"anonymous: constant at {figures['peakAnonymousMiB']:,.0f} MiB" in memory
    assert f"at most {figures['peakMiB']:,.0f} MiB" in memory


def operator_tables(load: str) -> str:
    """The tables of a load as its benchmark has written them."""
    return table.PAGE.read_text().split(table.begin(load))[1].split(table.end(load))[0].strip()


@pytest.mark.parametrize("load", LOADS)
def test_the_figures_of_many_jobs_are_those_measured(load: str) -> None:
    measured = (RESULTS / f"operator-{load}.json").exists()
    assert operator_tables(load) == (LOADS[load].tables(result(f"operator-{load}")).strip() if measured else "")


def test_the_page_on_many_jobs_repeats_the_targets_and_figures_of_the_tables() -> None:
    page = (ROOT / "docs" / "concepts" / "scale.md").read_text()
    targets = re.findall(r"^\| `(\w+)` \| .* \| ([\d.]+) \| .*(met|missed)\W* \|$", page, re.MULTILINE)
    assert {load for load, *_ in targets} == set(LOADS)
    for load, value, verdict in targets:
        assert f"| {value} | {verdict} |\n" in f"{operator_tables(load)}\n"
    sections = {title: text for title, _, text in (part.partition("\n") for part in page.split("\n## ")[1:])}
    compared = re.findall(r"^\| .* \| \d.* \|$", sections["A thousand new jobs"], re.MULTILINE)
    assert [row for row in compared if row not in operator_tables("arrival")] == []
    for title, load in (
        ("A neighbor of a flood", "neighbor"),
        ("A day", "day"),
        ("Thousands of jobs, from beginning to end", "simulation"),
    ):
        figures = re.findall(r"\d+\.\d+", sections[title])
        assert figures
        assert [figure for figure in figures if figure not in operator_tables(load)] == []


def test_the_figures_of_the_base_are_those_measured() -> None:
    shown = TEXT.split(table.begin(base.NAME, base.COMMAND))[1].split(table.end(base.NAME))[0].strip()
    measured = (RESULTS / f"{base.NAME}.json").exists()
    assert shown == (base.tables(result(base.NAME)).strip() if measured else "")


def test_the_figures_of_adapters_trained_together_are_those_measured() -> None:
    begin, end = table.begin(together_tables.NAME, together_tables.COMMAND), table.end(together_tables.NAME)
    shown = TEXT.split(begin)[1].split(end)[0].strip()
    measured = (RESULTS / f"{together_tables.NAME}.json").exists()
    assert shown == (together_tables.tables(result(together_tables.NAME)).strip() if measured else "")


def test_the_goodput_is_that_measured() -> None:
    measured = result("goodput")
    for run in measured["runs"]:
        cells = row(f"SIG{run['signal']} |").split("|")[2:-1]
        wanted = (f"{len(run['attempts'])}", f"{100 * run['measured']:.1f} %", f"{100 * run['reported']:.1f} %")
        assert tuple(cell.strip() for cell in cells[:3]) == wanted
        assert ("missed" in cells[3]) == (run["measured"] < measured["target"])
    assert measured["everySeconds"] == 600


@pytest.mark.parametrize(("objective", "name"), [("dpo", "preference"), ("orpo", "preference-orpo")])
def test_the_figures_of_preference_tuning_are_those_measured(objective: str, name: str) -> None:
    page = (ROOT / "docs" / "how-to" / "preference.md").read_text().split("## One measured result")[1]
    tables = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    shown = [re.split(r" \| |\| | \|", line)[1:-1] for line in tables[objective == "orpo"].splitlines()]
    measured = result(name)
    run, asked = measured["runs"][objective], len(measured["questions"])
    before, after = run["evaluations"][0], run["evaluations"][-1]
    # Before DPO both answers have the reward 0: each pair counts as half.
    ties = " (ties)" if before["evalRewardMargin"] == 0 else ""
    assert shown == [
        ["", "Before", f"After {after['step']} steps"],
        ["---"] * 3,
        [
            f"Answers that are one sentence and end there, of {asked}",
            *(f"{asked * each['score']:.0f}" for each in (measured["before"], run)),
        ],
        [
            "Held-out pairs whose chosen answer has the higher reward",
            f"{before['evalAccuracy']:.0%}".replace("%", " %") + ties,
            f"{after['evalAccuracy']:.0%}".replace("%", " %"),
        ],
        ["Held-out loss", f"{before['evalLoss']:.3f}", f"{after['evalLoss']:.3f}"],
        [
            "Reward of the chosen answer, held-out",
            f"{before['evalChosenReward']:.3g}",
            f"{after['evalChosenReward']:.{2 if objective == 'dpo' else 3}f}",
        ],
    ]
