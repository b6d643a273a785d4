"""A comparison: the settings that differ, and the result of each job."""

from datetime import UTC, datetime
from typing import Any

from qlora_client.comparison import ABSENT, Compared, differing_settings, results
from qlora_client.history import LossHistory
from qlora_client.jobs.job import Job

NOW = datetime(2026, 1, 2, 5, 0, tzinfo=UTC)
SPEC: dict[str, Any] = {
    "model": {"source": "hf://org/model"},
    "lora": {"rank": 16, "targetModules": ["q_proj", "v_proj"]},
    "dataset": {"mix": [{"source": "hf://org/a", "weight": 1}]},
    "training": {"learningRate": 2e-4, "packing": True},
}


def job(name: str, spec: dict[str, Any] | None = None, **status: Any) -> Job:
    return Job({"metadata": {"name": name, "namespace": "team", "uid": name}, "spec": spec or SPEC, "status": status})


def changed(**parts: dict[str, Any]) -> dict[str, Any]:
    return SPEC | {name: SPEC.get(name, {}) | part for name, part in parts.items()}


def test_only_differences_are_shown_by_their_path() -> None:
    other = changed(
        lora={"rank": 64, "targetModules": ["all-linear"]},
        dataset={"mix": [{"source": "hf://org/a", "weight": 2}, {"source": "hf://org/b", "weight": 1}]},
        training={"packing": False, "seed": 7},
    )
    rows = differing_settings([job("a"), job("b", other)])
    assert {row.label: row.values for row in rows} == {
        "lora.rank": ("16", "64"),
        "lora.targetModules": ("q_proj, v_proj", "all-linear"),
        "dataset.mix[0].weight": ("1", "2"),
        "dataset.mix[1].source": (ABSENT, "hf://org/b"),
        "dataset.mix[1].weight": (ABSENT, "1"),
        "training.packing": ("true", "false"),
        "training.seed": (ABSENT, "7"),
    }


def test_fixed_inputs_are_compared_and_runtime_settings_are_not() -> None:
    first = job("a", SPEC | {"suspend": True}, modelRevision="c1", image="t:1")
    second = job("b", modelRevision="c2", image="t:1")
    assert {row.label: row.values for row in differing_settings([first, second])} == {
        "the model's revision": ("c1", "c2")
    }
    assert differing_settings([first, first]) == []
    assert differing_settings([first, job("waits")]) == []


def test_results_of_an_ended_and_a_running_job() -> None:
    ended = job(
        "a",
        phase="Succeeded",
        progress={"step": 100, "totalSteps": 100, "loss": 1.23456, "evalLoss": 1.5, "tokensPerSecond": 1234.5},
        usage={"gpuHours": "1.50", "cost": "3.75 EUR"},
        startTime="2026-01-02T03:00:00Z",
        completionTime="2026-01-02T04:12:00Z",
        disruptions=2,
    )
    runs = job("b", phase="Training", progress={"step": 10, "totalSteps": 100}, startTime="2026-01-02T04:00:00Z")
    history = LossHistory({1: 2.0}, {0: 2.4, 50: 1.4, 100: 1.5})
    rows = results([Compared(ended, history), Compared(runs, LossHistory())], NOW)
    assert {row.label: row.values for row in rows} == {
        "Phase": ("Succeeded", "Training"),
        "Optimizer steps": ("100/100", "10/100"),
        "Training loss": ("1.2346", ABSENT),
        "Held-out loss before": ("2.4000", ABSENT),
        "Held-out loss": ("1.5000", ABSENT),
        "Best held-out loss": ("1.4000 at step 50", ABSENT),
        "Speed": ("1,234 tokens/s", ABSENT),
        "GPU hours": ("1.50", ABSENT),
        "Cost": ("3.75 EUR", ABSENT),
        "Recoveries": ("2", "0"),
        "Time": ("1h12m", "1h0m"),
    }
