"""The rows, automatic settings and steps that `qlora plan --data` shows for the cells of a sweep."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qlora_api.contract import ExitCode
from qlora_cli.__main__ import main
from tests.support.dry_runs import stand_in
from tests.support.models.tiny import chat_row, write_rows

Plan = Callable[..., str]
TRAIN: dict[str, Any] = {"source": "pvc://data/train.jsonl", "eval": {"fraction": 0.1}}
SPEC: dict[str, Any] = {"model": {"source": "pvc://models/model"}, "dataset": TRAIN}
ALL = {"select": "all"}


@pytest.fixture
def plan(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Plans a document and returns the output."""
    stand_in(monkeypatch)
    write_rows(
        tmp_path / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * (n % 9 + 1)) for n in range(160)]
    )
    write_rows(tmp_path / "data" / "few.jsonl", [chat_row(f"Question {n}?", "pods") for n in range(20)])

    def run(kind: str, spec: dict[str, Any], exit_code: int = 0) -> str:
        file = tmp_path / "document.yaml"
        document = {"apiVersion": "qlora.dev/v1beta1", "kind": kind, "metadata": {"name": "s"}, "spec": spec}
        file.write_text(json.dumps(document))
        volumes = ("--volume", f"models={tiny_llama.parent}", "--volume", f"data={tmp_path / 'data'}")
        done = CliRunner().invoke(main, ["plan", str(file), "--data", *volumes])
        assert done.exit_code == exit_code, done.output
        return done.output

    return run


def sweep(*cells: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"template": {"spec": SPEC}, "cells": cells} | changes


def automatic(output: str) -> dict[str, str]:
    """The values of the settings that are listed, by the last part of their path."""
    listed = output.partition("Automatic settings")[2].partition("\n\n")[0]
    return dict(re.findall(r"^  [a-z]+\.(\S+) +(\S+)", listed, re.MULTILINE))


def of_cell(output: str, name: str) -> dict[str, str]:
    """The steps and settings in the cell's own line."""
    [line] = [line for line in output.splitlines() if line.startswith(f"  {name}  ")]
    steps, *settings = line.removeprefix(f"  {name}  ").split(", ")
    return {"steps": steps.split()[0]} | dict(each.split(" ") for each in settings)


def test_each_cell_has_the_settings_and_steps_of_its_job_what_all_have_once(plan: Plan) -> None:
    cells: list[dict[str, Any]] = [{}, {"epochs": 6}, {"maxSteps": 8}]
    output = plan("QLoRASweep", sweep(*cells))
    shared = automatic(output)
    assert {"scheduler", "learningRate", "rank"} <= shared.keys()
    for number, training in enumerate(cells):
        own = of_cell(output, f"s-0{number}")
        assert not own.keys() & shared.keys()
        of_job = plan("QLoRAJob", SPEC | {"training": training})
        [steps] = re.findall(r"Steps: (\d+) =", of_job)
        assert shared | own == automatic(of_job) | {"steps": steps}
    assert "Remark on 1 of 3 cells: the run makes 8 optimizer steps (maxSteps: 8)" in output


def test_no_cell_is_listed_where_none_differs(plan: Plan) -> None:
    output = plan("QLoRASweep", sweep({"learningRate": 1e-4}, {"learningRate": 2e-4}))
    assert re.search(r"^Steps: \d+ in each cell\.$", output, re.MULTILINE)
    assert "epochs" in automatic(output)
    assert "\n  s-00" not in output


def test_cells_that_set_what_another_leaves_to_the_rule_train_the_same_adapter(plan: Plan) -> None:
    long = {"epochs": 20}
    chosen = automatic(plan("QLoRAJob", SPEC | {"training": long}))
    assert chosen["autoMicroBatch"] == "true", "false if microBatchSize is set"
    same = long | {name: json.loads(chosen[name]) for name in ("microBatchSize", "learningRate")}
    output = plan("QLoRASweep", sweep(long, {}, same))
    assert output.count("train the same adapter") == 1
    assert "\nRemark: s-00 and s-02 train the same adapter: keep one of them.\n" in output


def test_a_cell_with_other_data_follows_its_own_rows(plan: Plan) -> None:
    few = {"source": "pvc://data/few.jsonl"}
    output = plan("QLoRASweep", sweep({}, {"dataset": few}, {"dataset": few, "maxSteps": 8}, **ALL))
    assert "\nRows of s-01, s-02\n\npvc://data/few.jsonl: 20 rows\n" in output
    assert output.count("pvc://data/train.jsonl: 160 rows") == 1
    of_job = automatic(plan("QLoRAJob", SPEC | {"dataset": few}))
    assert of_job.items() <= (automatic(output) | of_cell(output, "s-01")).items()


def test_a_cell_that_fails_for_its_rows_leaves_the_others_planned(plan: Plan) -> None:
    overlapping = TRAIN | {"eval": {"source": TRAIN["source"], "overlap": "fail"}}
    output = plan("QLoRASweep", sweep({}, {"dataset": overlapping}, **ALL))
    assert "The job fails: 160 rows for training are also held out" in output.partition("\nRows of s-01\n")[2]
    assert re.search(r"^Steps: \d+ in each cell\.$", output, re.MULTILINE)


def test_the_claim_of_a_cells_rows_needs_a_folder(plan: Plan) -> None:
    elsewhere = {"dataset": {"source": "pvc://other/train.jsonl"}}
    output = plan("QLoRASweep", sweep({}, elsewhere, **ALL), ExitCode.BAD_CONFIGURATION)
    assert "spec.dataset.source is pvc://other/train.jsonl: give a folder" in output
