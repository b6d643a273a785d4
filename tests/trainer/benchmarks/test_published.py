"""The published peaks have what a dry run needs, and the documentation has the figures of the file."""

import json

import yaml

from benchmarks.machine import RESULTS
from benchmarks.operator.table import begin, end
from benchmarks.published import COMMAND, NAME, PEAKS, UNITS, read, spec_of, tables
from benchmarks.together import PAGE
from qlora_trainer.model.source.hub_config import packaged_config


def test_each_peak_is_of_2025_or_2026_and_has_all_that_a_dry_run_needs() -> None:
    content = yaml.safe_load(PEAKS.read_text())
    for group in content["groups"]:
        assert group["url"].startswith("https://")
        assert group["measures"] in {"reserved", "card", "unspecified"}
        assert all(isinstance(reason, str) and reason for reason in group["assumed"].values())
    for peak in read():
        assert str(peak["date"])[:4] in {"2025", "2026"}
        assert peak["unit"] in UNITS
        assert packaged_config(peak["model"]) or peak["model"] in content["configs"]
        spec = spec_of(peak)
        assert (spec.lora.rank, spec.training.max_sequence_length) == (peak["rank"], peak["sequence_tokens"])


def test_no_peak_is_left_out_of_the_comparison_and_the_documentation_has_its_table() -> None:
    compared = json.loads((RESULTS / f"{NAME}.json").read_text())["peaks"]
    taken = [(peak["group"], peak["rank"], round(peak["published"] * UNITS[peak["unit"]])) for peak in read()]
    assert [(each["source"], each["rank"], each["published_bytes"]) for each in compared] == taken
    documented = PAGE.read_text().split(begin(NAME, COMMAND))[1].split(end(NAME))[0]
    assert documented.strip() == tables(compared).strip()
