"""The GPU hours that `qlora plan` forecasts, and its report if no forecast is possible."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from qlora_api.duration import format_duration
from qlora_cli.__main__ import main
from tests.support.dry_runs import stand_in
from tests.support.manifests import MINIMAL, Manifest, with_value
from tests.support.models.model_configs import SMALL_LLAMA
from tests.support.resolved import DECIDED, TRAINING

JOB = with_value(with_value(MINIMAL, "spec.lora", DECIDED["lora"]), "spec.training", DECIDED["training"])
PARAMETERS = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096) + 2 * 4096 * 1024
FAST = "--gpu-tflops=0.01"
LARGE = SMALL_LLAMA | {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672}


@pytest.fixture(autouse=True)
def _no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)


def planned(folder: Path, manifest: Manifest, *options: str, config: dict[str, Any] = SMALL_LLAMA) -> Result:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "job.yaml").write_text(yaml.safe_dump(manifest))
    arguments = ["plan", str(folder / "job.yaml"), f"--config={folder / 'config.json'}", *options]
    return CliRunner().invoke(main, arguments)


def test_hours_and_time_follow_from_weights_tokens_and_speed(tmp_path: Path) -> None:
    manifest = with_value(with_value(MINIMAL, "spec.training", {"epochs": 3}), "spec.resources", {"gpus": 2})
    done = planned(tmp_path, manifest, FAST, "--tokens=100000", "--gpu-hour-price=2.50 EUR")
    seconds = 6 * PARAMETERS * 300_000 / 0.01e12
    hours = seconds / 0.3 / 3600
    shortest, longest = (format_duration(seconds / share / 2) for share in (0.42, 0.2))
    assert (
        f"Forecast: {shortest} to {longest} on 2 GPUs, about {hours:.2f} GPU hours, {hours * 2.5:.2f} EUR"
        in done.output
    )
    assert "300,000 tokens, if a GPU reaches 20% to 42% of 0.01 TFLOPS" in done.output
    assert done.exit_code == 0


def test_a_named_gpu_gives_memory_and_speed(tmp_path: Path) -> None:
    once = with_value(JOB, "spec.training", {"epochs": 1})
    done = planned(tmp_path, once, "--gpu=l4", "--tokens=10000000")
    assert "Forecast: 49s to 1m43s on 1 L4, about 1.2 GPU minutes" in done.output
    assert "of 121 TFLOPS" in done.output
    assert "on a GPU of 22.5 GiB with any activations" in planned(tmp_path, JOB, "--gpu=l4", config=LARGE).output
    old = planned(tmp_path, JOB, "--gpu=t4")
    assert (old.exit_code, "--gpu is 't4', which has no bfloat16" in old.output) == (10, True)


@pytest.mark.parametrize(
    ("training", "options", "lines"),
    [
        ({"epochs": 1}, [], ["unknown; 100 take some 811,520 tokens or more (1,585 full sequences of an epoch)"]),
        ({"epochs": 4}, [], ["unknown; 100 take some 197,120 tokens or more (385 full sequences of an epoch)"]),
        ({"epochs": 1, "packing": False}, [], ["unknown; 100 take 1,585 rows or more"]),
        (
            {"epochs": 2},
            ["--tokens=51200"],
            [
                "at least 14 = 2 epochs × 100 sequences / (microBatchSize 1 × gradientAccumulationSteps 16)",
                "Remark: the run makes 14 optimizer steps",
                "Tokens: 51,200 in an epoch",
                "Learning rate: 0.0002, constant",
            ],
        ),
        ({"maxSteps": 30}, [], ["Steps: 30 = spec.training.maxSteps", "maxSteps: 100 or more makes enough"]),
    ],
)
def test_a_plan_names_the_steps_and_their_origin(
    tmp_path: Path, training: dict[str, object], options: list[str], lines: list[str]
) -> None:
    of_length = {} if "maxSteps" in training else {"epochs": 1}
    manifest = with_value(JOB, "spec.training", TRAINING | of_length | training)
    output = planned(tmp_path, manifest, *options).output
    for line in lines:
        assert line in output


def test_evaluations_that_leave_settings_without_effect_are_remarked_on_where_the_steps_are_known(
    tmp_path: Path,
) -> None:
    def shown(length: dict[str, int], *options: str) -> str:
        training = TRAINING | {"evalEverySteps": 12, "keep": "best"} | length
        return planned(tmp_path, with_value(JOB, "spec.training", training), *options).output

    words = "Remark: spec.training.evalEverySteps is 12 and the run has 12 steps, with no evaluations between its start"
    assert words in shown({"maxSteps": 12})
    assert "Remark: spec.training.evalEverySteps" not in shown({"maxSteps": 13})
    assert "Remark: spec.training.evalEverySteps" not in shown({"epochs": 1}, "--tokens=1000"), "perhaps more steps"


def test_speed_and_price_may_come_from_a_profile_of_any_release(tmp_path: Path) -> None:
    spec = {"image": "trainer", "gpuTflops": 0.01, "gpuHourPrice": "2.50", "currency": "EUR", "newer": True}
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"kind": "QLoRAProfile", "spec": spec}))
    given = planned(tmp_path, JOB, FAST, "--gpu-hour-price=2.50 EUR", "--tokens=100000")
    assert "Forecast: " in given.output
    assert planned(tmp_path, JOB, f"--profile={profile}", "--tokens=100000").output == given.output
    profile.write_text(yaml.safe_dump({"kind": "QLoRAProfile", "spec": spec | {"gpuMemory": "10Gi"}}))
    assert "on a GPU of 10 GiB" in " ".join(planned(tmp_path, JOB, f"--profile={profile}", config=LARGE).output.split())
    profile.write_text(yaml.safe_dump({"kind": "QLoRAProfile", "spec": spec, "status": {"gpuMemory": "11Gi"}}))
    assert "on a GPU of 11 GiB" in " ".join(planned(tmp_path, JOB, f"--profile={profile}", config=LARGE).output.split())
    own = with_value(JOB, "spec.resources", {"gpuMemory": "22Gi"})
    assert "on a GPU of 22 GiB" in " ".join(planned(tmp_path, own, f"--profile={profile}", config=LARGE).output.split())
    for text in ("spec: {}", "- a", "{"):
        profile.write_text(text)
        done = planned(tmp_path, JOB, f"--profile={profile}")
        assert (done.exit_code, f"{profile} is no QLoRAProfile" in done.output) == (2, True)


def test_a_profiles_host_memory_holds_what_its_gpus_have_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    profile = tmp_path / "profile.yaml"
    job = with_value(JOB, "spec.training", {"maxSequenceLength": 16_384})
    for memory, words in (("24Gi", "The pod has 24Gi; set:\n  spec.resources.memory: 40Gi"), ("96Gi", "fits:")):
        spec = {"image": "trainer", "gpuMemory": "70Gi", "resources": {"train": {"memory": memory}}}
        profile.write_text(yaml.safe_dump({"kind": "QLoRAProfile", "spec": spec}))
        done = planned(tmp_path, job, f"--profile={profile}", config=LARGE)
        assert words in done.output, done.output
        assert "Pod memory unknown" not in done.output
    output = " ".join(planned(tmp_path, job, "--gpu-memory=70Gi", config=LARGE).output.split())
    assert "Pod memory unknown, as no --profile sets it; if less, set: spec.resources.memory: 40Gi" in output


def test_a_number_of_steps_bounds_the_tokens_and_a_budget_is_compared(tmp_path: Path) -> None:
    training = {"maxSteps": 10, "microBatchSize": 1, "gradientAccumulationSteps": 8, "maxSequenceLength": 512}
    manifest = with_value(with_value(JOB, "spec.training", training), "spec.budget", {"gpuHours": 0.001})
    done = planned(tmp_path, manifest, FAST)
    assert "Forecast: at most " in done.output
    assert "40,960 tokens" in done.output
    assert "Above the budget: spec.budget.gpuHours is 0.001" in done.output


def test_unknown_figures_are_left_out(tmp_path: Path) -> None:
    assert "Forecast: unknown: count the tokens of an epoch with --data" in planned(tmp_path, JOB, FAST).output
    left_open = planned(tmp_path, MINIMAL, FAST, "--tokens=100000").output
    assert "Steps: the rows decide on the automatic settings" in left_open
    assert "Forecast: unknown: the rows decide on the epochs" in left_open
    assert "Forecast" not in planned(tmp_path, JOB, "--tokens=100").output
    few = planned(tmp_path, with_value(MINIMAL, "spec.training", {"maxSteps": 9})).output
    assert "Steps: 9 = spec.training.maxSteps" in few
    assert "Remark: the run makes 9 optimizer steps" in few


def test_without_an_inspection_the_active_weights_of_experts_are_unknown(tmp_path: Path) -> None:
    mixture = SMALL_LLAMA | {"num_local_experts": 8}
    done = planned(tmp_path, JOB, FAST, "--tokens=9", config=mixture)
    assert "Forecast: unknown: how many weights" in done.output


@pytest.mark.parametrize("price", ["2.50", "EUR 2.50", "-1 EUR", "1e3 EUR"])
def test_a_price_needs_its_currency(tmp_path: Path, price: str) -> None:
    done = planned(tmp_path, JOB, f"--gpu-hour-price={price}")
    assert done.exit_code == 2
    assert "must be a price and its currency" in done.output
