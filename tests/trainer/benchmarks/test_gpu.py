"""The benchmark on a GPU: its plan and its table, and its program on a CPU."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu.__main__ import file_name, measure
from benchmarks.gpu.card import parse_card
from benchmarks.gpu.meter import profiled
from benchmarks.gpu.plan import SYSTEMS, Case, SystemName, Workload, interpreter, make_plan
from benchmarks.gpu.table import table

CARD = parse_card("NVIDIA H100 80GB HBM3, 580.95.05, 81559, 9.0\n", "")


def test_systems_take_turns_and_each_step_has_the_same_number_of_sequences() -> None:
    plan = make_plan(("ours", "trl"), (1, 4))
    assert [case.name for case in plan[:4]] == [
        "ours-1-recomputed",
        "trl-1-recomputed",
        "ours-4-recomputed",
        "trl-4-recomputed",
    ]
    assert len({case.name for case in plan}) == 2 * 2 * 2
    assert {case.micro_batch * case.accumulation for case in make_plan(SYSTEMS, (1, 2, 4))} == {4}


def test_each_system_has_an_environment_of_its_own() -> None:
    def made(system: SystemName, uv: str | None = "uv", **given: str) -> list[str]:
        return interpreter(system, own="python3", uv=uv, root=Path("/project"), given=given)

    assert made("ours", uv=None) == ["python3"]
    assert made("trl", uv=None, trl="/trl/bin/python") == ["/trl/bin/python"]
    assert {"--isolated", "--locked"} <= set(made("trl"))
    assert {"--isolated", "--no-project"} <= set(made("unsloth"))
    with pytest.raises(ValueError, match="--python unsloth=PATH"):
        made("unsloth", uv=None)


def test_the_card_names_the_result_and_the_processes_that_use_it() -> None:
    assert (CARD.driver, CARD.capability, CARD.processes) == ("580.95.05", "9.0", ())
    assert file_name(CARD) == "gpu-nvidia-h100-80gb-hbm3"
    assert parse_card("NVIDIA L4, 580.95.05, 23034, 8.9\n", "17\n23\n").processes == (17, 23)


def test_only_kernels_are_counted_and_overlapping_ones_once_in_the_time() -> None:
    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA) -> Any:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=time_range, device_type=device, is_user_annotation=name == "step")

    events = [
        event("gemm", 0, 10),
        event("norm", 5, 12),
        event("Memcpy HtoD", 20, 25),
        event("step", 0, 90),
        event("aten::mm", 0, 80, DeviceType.CPU),
    ]
    assert profiled(events) == {"kernels": 2, "busySeconds": pytest.approx(17e-6)}
    assert profiled(events[-1:]) == {}


def test_a_row_has_the_median_of_the_last_steps_or_the_reason_of_a_failure() -> None:
    # The first step is slow and does not count. The others take two seconds, and the GPU works for 1.5 of them.
    steps = [{"seconds": 90.0, "tokens": 8000}, *({"seconds": 2.0, "tokens": 8000} for _ in range(3))]
    sizes = {"allocatedBytes": 6 * 2**30, "reservedBytes": 7 * 2**30, "estimateBytes": 13 * 2**29}
    result = {
        "card": {"name": CARD.name, "driver": CARD.driver},
        "base": "Llama",
        "workload": {"max_length": 2048, "last": 3},
        "sequencesPerStep": 4,
        "date": "2026-12-02",
        "runs": [
            {
                "case": {"system": "ours", "micro_batch": 4, "recompute": False},
                "steps": steps,
                "kernels": 9876,
                "busySeconds": 1.5,
                "libraries": {"torch": "2.15.0", "trl": None},
                **sizes,
            },
            {"case": {"system": "unsloth", "micro_batch": 4, "recompute": False}, "error": "Traceback\nno | wheel"},
        ],
    }
    lines = table(result).splitlines()
    assert lines[0].startswith("NVIDIA H100 80GB HBM3, driver 580.95.05; Llama")
    assert "| ours | 4 | kept | 4,000 | 6.00 | 7.00 | 6.50 | 9,876 | 25% |" in lines
    assert "| unsloth | 4 | kept | failed: no \\| wheel |  |  |  |  |  |" in lines
    assert lines[-1] == "- ours: torch 2.15.0"


# Slow: three programs load PyTorch.
@pytest.mark.slow
def test_it_runs_on_a_cpu_and_goes_on_after_a_system_that_cannot_be_installed(tmp_path: Path) -> None:
    plan = [Case("unsloth", 2, recompute=True), Case("ours", 2, recompute=True)]
    python = {"unsloth": [str(tmp_path / "none")], "ours": [sys.executable]}
    lacking, found = measure(plan, Workload.on("cpu", 2), python)  # type: ignore[arg-type]
    assert str(tmp_path / "none") in lacking["error"]
    assert "error" not in found
    assert [0 < step["tokens"] <= 4 * 128 for step in found["steps"]] == [True, True]
    assert found["estimateBytes"] > 0
    assert found["libraries"]["torch"] is not None
