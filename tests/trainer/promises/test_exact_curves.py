"""The losses of a small run with two seeds, committed, so that a change of the computation is seen.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.trainer.promises.test_exact_curves

writes them again into `curves/`, each with the processor, threads and libraries of its computation. Where these are the
same here, every loss must be the same number; elsewhere, as bfloat16 matmuls are summed in another order, it may differ
by a thousandth of itself.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from qlora_trainer.core.completion import PrepareRecord, read_completion
from qlora_trainer.training.checkpoints.fingerprint import run_fingerprint
from tests.support.models.tiny import SHAPE, save_model
from tests.support.training import history, prepared, run

CURVES = Path(__file__).parent / "curves"
SEEDS = (0, 1)
TOLERANCE = 1e-3
# Features that oneDNN and MKL choose their kernels by; a virtual machine hides the name of its processor.
_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")
_PROCESSOR = ("cpu family", "model", "stepping", "cache size")


def measured(seed: int, root: Path) -> dict[str, Any]:
    """Losses of 12 steps with dropout, accumulation, a schedule and evaluations."""
    model = save_model(root / "model", LlamaConfig(**SHAPE))
    context = prepared(root / "workspace", model, {"training": {"seed": seed, "maxSteps": 12, "evalEverySteps": 4}})
    run(context)
    record = read_completion(context.workspace.completion("prepare"), PrepareRecord)
    assert record is not None
    lines = history(context)
    capabilities = torch.cpu.get_capabilities()
    return {
        "computedWith": {
            "libraries": run_fingerprint(record.resolve(context.spec), record, "cpu", 1)["libraries"],
            "processor": [
                *(line for line in _first_processor() if line.partition(":")[0] in _PROCESSOR),
                *(name for name in _INSTRUCTIONS if capabilities.get(name)),
            ],
            "threads": torch.get_num_threads(),
        },
        "losses": [line["loss"] for line in lines if "loss" in line],
        "evaluations": [line["evalLoss"] for line in lines if "evalLoss" in line],
    }


def _first_processor() -> list[str]:
    """Lines `name: value` of the kernel about it."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return [": ".join(part.strip() for part in line.split(":", 1)) for line in lines]


def committed(seed: int) -> dict[str, Any]:
    """The curve of this seed as it was computed when it was committed."""
    curve: dict[str, Any] = json.loads((CURVES / f"seed-{seed}.json").read_text())
    return curve


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("seed", SEEDS)
def test_the_losses_are_those_committed_for_this_seed_and_for_no_other(seed: int, tmp_path: Path) -> None:
    expected = committed(seed)

    found = measured(seed, tmp_path)

    assert found["computedWith"]["threads"] == expected["computedWith"]["threads"] == 1
    tolerance = 0.0 if found["computedWith"] == expected["computedWith"] else TOLERANCE
    assert len(found["losses"]) == 12
    assert len(found["evaluations"]) == 4
    for name in ("losses", "evaluations"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=0)
    assert found["losses"][-1] < 0.95 * found["losses"][0]
    # Were the other seed's curve within the tolerance too, this test would not see that a seed is ignored.
    for other in set(SEEDS) - {seed}:
        pairs = zip(found["losses"], committed(other)["losses"], strict=True)
        assert max(abs(loss - of_other) / of_other for loss, of_other in pairs) > 5 * TOLERANCE


def main() -> None:
    """Write the curves of both seeds."""
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as root:
            text = json.dumps(measured(seed, Path(root)), indent=2, sort_keys=True)
        (CURVES / f"seed-{seed}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
