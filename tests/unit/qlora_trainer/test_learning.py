"""What is remarked on a run whose loss has hardly fallen."""

from pathlib import Path

import pytest

from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.history.metrics_log import read_history
from qlora_trainer.report.learning import learned_little


def remark(folder: Path, losses: list[float], before: float | None = None, after: float | None = None) -> str | None:
    lines = [f'{{"step": {step}, "loss": {loss}}}' for step, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    trained = TrainRecord(
        fingerprint="f",
        adapter_path="trained",
        adapter_sha256="a" * 64,
        training_step=len(losses),
        loss=losses[-1] if losses else 4.0,
        initial_eval_loss=before,
        eval_loss=after,
    )
    return learned_little(trained, read_history(folder / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (5.12, 5.08, "learned little: loss 5.12 to 5.08"),
        (2.0, 2.5, "learned nothing: loss 2 to 2.5"),
        (1.0, 0.91, "learned little: loss 1 to 0.91"),
        (1.0, 0.9, None),
        (0.0, 0.0, None),
    ],
)
def test_a_held_out_loss_that_fell_by_less_than_a_tenth_is_named(
    tmp_path: Path, before: float, after: float, expected: str | None
) -> None:
    assert remark(tmp_path, [9.0, 1.0], before, after) == expected


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], None),  # its history is lost
        ([4.0], "learned little: training loss 4 to 4"),
        ([4.0, 3.9, 3.8], "learned little: training loss 4 to 3.8"),
        ([4.0, 3.9, 3.5], None),
        ([5.0, 3.0, *[4.0] * 17, 3.8], "learned little: training loss 4 to 3.9"),  # the means of two steps each
    ],
)
def test_without_held_out_rows_the_first_steps_are_compared_with_the_last(
    tmp_path: Path, losses: list[float], expected: str | None
) -> None:
    assert remark(tmp_path, losses) == expected
