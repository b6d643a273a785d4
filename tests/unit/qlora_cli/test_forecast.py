"""The GPU hours that `qlora plan` forecasts, and its report if no forecast is possible."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.console import Console

from qlora_api.spec.job import QLoRAJobSpec
from qlora_cli.__main__ import main
from qlora_cli.local.forecast import GpuOfPlan, show_forecast
from qlora_cli.local.plan import make_plan
from tests.support.manifests import MINIMAL, Manifest, with_value
from tests.support.models.model_configs import SMALL_LLAMA

PARAMETERS = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096) + 2 * 4096 * 1024
FAST = "--gpu-tflops=0.01"


@pytest.fixture(autouse=True)
def _no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def planned(folder: Path, manifest: Manifest, *options: str) -> Result:
    (folder / "config.json").write_text(json.dumps(SMALL_LLAMA))
    (folder / "job.yaml").write_text(yaml.safe_dump(manifest))
    arguments = ["plan", str(folder / "job.yaml"), f"--config={folder / 'config.json'}", *options]
    return CliRunner().invoke(main, arguments)


def test_the_hours_follow_from_weights_tokens_and_speed(tmp_path: Path) -> None:
    manifest = with_value(MINIMAL, "spec.training", {"epochs": 3})
    done = planned(tmp_path, manifest, FAST, "--tokens=100000", "--gpu-hour-price=2.50 EUR")
    hours = 6 * PARAMETERS * 300_000 / (0.01e12 * 0.3) / 3600
    assert f"Forecast: about {hours:.2f} GPU hours, {hours * 2.5:.2f} EUR: 300,000 tokens" in done.output
    assert "if the GPU reaches 30% of 0.01 TFLOPS" in done.output
    assert done.exit_code == 0


def test_speed_and_price_may_come_from_a_profile_of_any_release(tmp_path: Path) -> None:
    spec = {"image": "trainer", "gpuTflops": 0.01, "gpuHourPrice": "2.50", "currency": "EUR", "newer": True}
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"kind": "QLoRAProfile", "spec": spec}))
    given = planned(tmp_path, MINIMAL, FAST, "--gpu-hour-price=2.50 EUR", "--tokens=100000")
    assert "Forecast: about" in given.output
    assert planned(tmp_path, MINIMAL, f"--profile={profile}", "--tokens=100000").output == given.output
    for text in ("spec: {}", "- a", "{"):
        profile.write_text(text)
        done = planned(tmp_path, MINIMAL, f"--profile={profile}")
        assert (done.exit_code, f"{profile} is no QLoRAProfile" in done.output) == (2, True)


def test_a_number_of_steps_bounds_the_tokens_and_a_budget_is_compared(tmp_path: Path) -> None:
    training = {"maxSteps": 10, "microBatchSize": 1, "gradientAccumulationSteps": 8, "maxSequenceLength": 512}
    manifest = with_value(with_value(MINIMAL, "spec.training", training), "spec.budget", {"gpuHours": 0.001})
    done = planned(tmp_path, manifest, FAST)
    assert "Forecast: at most" in done.output
    assert "40,960 tokens" in done.output
    assert "Above the budget: spec.budget.gpuHours is 0.001" in done.output


def test_unknown_figures_are_left_out(tmp_path: Path) -> None:
    assert "Forecast: unknown: give the tokens of an epoch" in planned(tmp_path, MINIMAL, FAST).output
    assert "Forecast" not in planned(tmp_path, MINIMAL, "--tokens=100").output


def test_only_active_weights_of_a_mixture_of_experts_count(tmp_path: Path) -> None:
    spec = QLoRAJobSpec.model_validate(MINIMAL["spec"])
    config, output = tmp_path / "config.json", io.StringIO()
    config.write_text(json.dumps(SMALL_LLAMA))
    plan = make_plan("tiny", spec, config, None)
    config.write_text(json.dumps(SMALL_LLAMA | {"num_local_experts": 8}))
    show_forecast(plan, spec, config, GpuOfPlan(tflops=1.0, tokens=9), Console(file=output, width=200))
    assert output.getvalue().startswith("Forecast: unknown: how many weights")


@pytest.mark.parametrize("price", ["2.50", "EUR 2.50", "-1 EUR", "1e3 EUR"])
def test_a_price_needs_its_currency(tmp_path: Path, price: str) -> None:
    done = planned(tmp_path, MINIMAL, f"--gpu-hour-price={price}")
    assert done.exit_code == 2
    assert "must be a price and its currency" in done.output
