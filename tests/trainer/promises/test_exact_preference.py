"""Preference tuning equals a plain loop over padded pairs, with full logits and a second, frozen model as reference.

The plain loop shares nothing with the trainer but its files. In float32 both differ by the order of sums only: 1e-5 of
a loss, a reward and a gradient norm is allowed, and of each tensor of the adapter 1e-4 of its length.
"""

from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from safetensors.torch import load_file

from qlora_trainer.core.context import StepContext
from qlora_trainer.model.adapter.attach import adapter_tensors
from qlora_trainer.steps.prepare import prepare
from tests.support.exact import compute_in_float32, random_words
from tests.support.models.adapted import adapted
from tests.support.models.plain_preference import PlainPair, frozen_base, plain_model, plain_parameters, plain_steps
from tests.support.models.tiny import Recorded, write_rows
from tests.support.training import history, run
from tests.trainer.conftest import MakeContext

STEPS = 3
# Twice as much, and the smallest gradients move an adapter by the tolerance on a processor with AVX2.
RATE = 0.005
TOLERANCE = 1e-5


def random_pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """Questions with two answers of 1 to 8 words, which are never the same."""
    random = Random(seed)

    def words() -> str:
        return random_words(random, 8)

    return [{"prompt": words(), "chosen": f"yes {words()}", "rejected": f"no {words()}"} for _ in range(count)]


def prepared_pairs(
    make_context: MakeContext, folder: Path, pairs: list[dict[str, Any]], spec: dict[str, Any] | None = None
) -> StepContext:
    """The context of a job whose prepare step has packed the pairs."""
    write_rows(folder / "data" / "train.jsonl", pairs)
    context = make_context(spec)
    prepare(context, Recorded())
    return context


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_float32(monkeypatch)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("objective", "preference"),
    [("dpo", {"labelSmoothing": 0.2}), ("orpo", {"beta": 0.3})],
    ids=["dpo", "orpo"],
)
def test_a_whole_run_is_that_of_a_plain_loop(
    objective: str, preference: dict[str, float], make_context: MakeContext, tiny_llama: Path, tmp_path: Path
) -> None:
    """Every step sees every pair, so the order of the data does not matter."""
    rows = random_pairs(3, 5)
    training = {
        "objective": objective,
        "preference": preference,
        "maxSteps": STEPS,
        "microBatchSize": 2,
        "gradientAccumulationSteps": len(rows),
        "learningRate": RATE,
        "optimizer": "adamw",
        "maxSequenceLength": 128,
    }
    context = prepared_pairs(make_context, tmp_path, rows, {"training": training})
    model = plain_model(tiny_llama, adapter_tensors(adapted(tiny_llama, seed=0)))
    pairs = [
        PlainPair.of([{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"], tiny_llama)
        for row in rows
    ]
    beta, smoothing = preference.get("beta", 0.1), preference.get("labelSmoothing", 0.0)
    plain = plain_steps(model, frozen_base(tiny_llama), pairs, objective, beta, smoothing, RATE)
    expected = list(islice(plain, STEPS))

    run(context)

    found = [line for line in history(context) if "loss" in line]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs.loss, rel=TOLERANCE)
        assert ours["gradNorm"] == pytest.approx(theirs.grad_norm, rel=10 * TOLERANCE)
        # A reward is a difference of sums of about 50 nats.
        assert ours["chosenReward"] == pytest.approx(theirs.chosen_reward, rel=TOLERANCE, abs=TOLERANCE)
        assert ours["rejectedReward"] == pytest.approx(theirs.rejected_reward, rel=TOLERANCE, abs=TOLERANCE)
        assert ours["rewardMargin"] == pytest.approx(ours["chosenReward"] - ours["rejectedReward"], abs=1e-6)
    # The first step compares the base with itself.
    first = 1 if objective == "dpo" else 0
    assert [line["accuracy"] for line in found[first:]] == pytest.approx([step.accuracy for step in expected[first:]])
    assert expected[-1].loss < expected[0].loss
    trained = load_file(context.workspace.trained / "adapter_model.safetensors")
    for name, parameter in plain_parameters(model).items():
        error = (trained[name] - parameter.detach()).norm() / parameter.detach().norm()
        # Adam divides a gradient by its size, the smallest and least exact ones too.
        assert error < 10 * TOLERANCE, name
