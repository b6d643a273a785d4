"""Compares the estimate of GPU memory with published peaks of other trainers. Needs no GPU: each is a dry run.

The peaks, their settings and each assumption are in `published.yaml`. Writes `results/published.json`, and its table
into the documentation.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.machine import ROOT, write_result
from benchmarks.operator import table
from benchmarks.operator.table import head, row
from benchmarks.together import PAGE
from qlora_api.memory.training_shape import Recomputation
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.model.memory.fit import training_shape
from qlora_trainer.model.memory.job_memory import MeasuredJob
from qlora_trainer.model.source.files import CONFIG
from qlora_trainer.model.source.hub_config import packaged_config

NAME, COMMAND = "published", "benchmarks.published"
PEAKS = ROOT / "benchmarks" / "published.yaml"
TARGET = 0.065
"""Of the mean absolute error."""
UNITS = {"GB": 10**9, "GiB": 2**30}
Peak = Mapping[str, Any]


def read() -> list[Peak]:
    """Return each peak with the settings, source and unit of its group."""
    groups = yaml.safe_load(PEAKS.read_text())["groups"]
    return [
        {"group": group["name"], "unit": group["unit"], **group["settings"], **peak}
        for group in groups
        for peak in group["peaks"]
    ]


def spec_of(peak: Peak) -> ResolvedSpec:
    """Return a job with the peak's settings."""
    content: dict[str, Any] = {
        "model": {"source": "hf://published/model"},
        "dataset": {"source": "hf://published/rows", "eval": {"fraction": 0.1}},
        "quantization": {"doubleQuant": peak.get("double_quantization", True)},
        "lora": {
            "rank": peak["rank"],
            "alpha": peak["rank"],
            "dropout": peak.get("dropout", 0.0),
            "dtype": peak.get("adapter_dtype", "float32"),
        },
        "training": {
            "microBatchSize": peak["micro_batch_size"],
            "maxSequenceLength": peak["sequence_tokens"],
            "gradientAccumulationSteps": peak["gradient_accumulation_steps"],
            "optimizer": peak["optimizer"],
            "gradientCheckpointing": True,
            "packing": True,
            "epochs": 1,
            "evalEverySteps": 10,
            "learningRate": 2e-4,
            "scheduler": "constant",
            "warmupSteps": 0,
            "autoMicroBatch": False,
            "keep": "last",
        },
    }
    return ResolvedSpec.model_validate(content)


def estimate(peak: Peak, folder: Path) -> int:
    """Return the bytes that a dry run of the model with the peak's settings gives."""
    config = packaged_config(peak["model"])
    if config is None:
        config = folder / CONFIG
        config.write_text(json.dumps(yaml.safe_load(PEAKS.read_text())["configs"][peak["model"]]["config"]))
    spec, recomputation = spec_of(peak), Recomputation(offloads=peak.get("offloads", False))
    job = MeasuredJob.from_config(config, spec, training_shape(spec, ("all-linear",), recomputation))
    return job.estimate(job.training).expected


def compare(peak: Peak) -> dict[str, Any]:
    """Return the peak's row of the result."""
    with TemporaryDirectory() as folder:
        estimated = estimate(peak, Path(folder))
    published = round(peak["published"] * UNITS[peak["unit"]])
    return {
        "source": peak["group"],
        "model": peak["model"].rpartition("/")[2],
        "rank": peak["rank"],
        "tokens": peak["micro_batch_size"] * peak["sequence_tokens"],
        "published_bytes": published,
        "estimated_bytes": estimated,
    }


def error(compared: Mapping[str, Any]) -> float:
    """Return how far the estimate is above the peak, as a share of it."""
    return float(compared["estimated_bytes"] / compared["published_bytes"] - 1)


def mean_absolute_error(result: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean of the errors without their signs, as a share."""
    return mean(abs(error(each)) for each in result)


def tables(result: Sequence[Mapping[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = head("Source", "Model", "Rank", "Tokens", "Published, GB", "Estimate, GB", "Error")
    for each in result:
        sizes = (f"{each[name] / 1e9:.1f}" for name in ("published_bytes", "estimated_bytes"))
        lines.append(
            row(each["source"], each["model"], str(each["rank"]), f"{each['tokens']:,}", *sizes, f"{error(each):+.1%}")
        )
    found = mean_absolute_error(result)
    verdict = "met" if found <= TARGET else "missed"
    lines += ["", f"Mean absolute error: {found:.1%} of {len(result)} peaks; the target of {TARGET:.1%} is {verdict}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare all, and write the result and its table."""
    argparse.ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__).parse_args()
    result = []
    for peak in read():
        result.append(compare(peak))
        print(f"{result[-1]['source']}, {result[-1]['model']}: {error(result[-1]):+.1%}", flush=True)
    write_result(NAME, {"peaks": result})
    table.write(NAME, tables(result), PAGE, COMMAND)
    print(tables(result), end="")


if __name__ == "__main__":
    main()
