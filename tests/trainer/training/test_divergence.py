"""Divergence: a bad run ends before its checkpoints are lost, a healthy one never does."""

import math
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import PrepareRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StepFailure, StopRequest
from qlora_trainer.training import loop
from qlora_trainer.training.optimizer import learning_rate
from qlora_trainer.training.progress.divergence import Stability, has_diverged
from tests.support.failures import failing
from tests.support.runs.report_page import Page
from tests.support.training import StopAtStep, history, prepared, run
from tests.trainer.conftest import Prepare

PATIENCE = 20


def judgements(losses: Iterable[float], norms: Iterable[float] | None = None) -> list[int]:
    """The steps, counted from 1, of comparisons of the run with its base."""
    losses = list(losses)
    stability, judged = Stability(), []
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True), start=1):
        stability = stability.after_step(step, loss, norm)
        if stability.is_out_of_patience(step, PATIENCE):
            judged.append(step)
            stability = Stability()
    return judged


def test_a_loss_that_stays_far_above_its_level_is_checked_after_the_patience() -> None:
    assert judgements([2.0] * 50 + [7.0] * PATIENCE) == [50 + PATIENCE]
    assert judgements([2.0] * 50 + [7.0] * (PATIENCE - 1) + [2.0] + [7.0] * (PATIENCE - 1)) == []


def test_a_gradient_norm_orders_of_magnitude_above_its_level_is_checked_too() -> None:
    assert judgements([2.0] * 70, [0.5] * 50 + [500.0] * PATIENCE) == [70]
    # A hundredfold norm is the limit: it suspects nothing that large rows or small batches do by themselves.
    assert judgements([2.0] * 70, [0.5] * 50 + [55.0] * PATIENCE) == [70]
    assert judgements([2.0] * 70, [0.5] * 50 + [45.0] * PATIENCE) == []


def test_a_slowly_rising_loss_is_checked() -> None:
    # It passes the lowest level by 2 nats at step 91. The running mean stays half a nat behind it all the time.
    creeping = [2.0] * 50 + [2.0 + 0.05 * step for step in range(1, 101)]

    assert judgements(creeping) == [90 + PATIENCE]


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_spikes_do_not_make_a_run_suspect_for_long(seed: int) -> None:
    draw = random.Random(seed)
    losses = [2.0 * 0.999**step + draw.gauss(0, 0.8) + 20.0 * (draw.random() < 0.01) for step in range(2000)]

    assert judgements(losses, [draw.lognormvariate(0, 1.5) for _ in losses]) == []


def test_harder_rows_make_a_run_suspect_until_the_comparison_with_the_base() -> None:
    curriculum = [0.1] * 100 + [3.0] * 100 + [6.0] * 100

    assert judgements(curriculum) == [100 + PATIENCE, 200 + PATIENCE]
    assert not has_diverged(3.0, loss_at_start=3.4)
    assert not has_diverged(3.0, loss_at_start=2.5)
    assert has_diverged(3.0, loss_at_start=0.2)
    assert has_diverged(3.0, loss_at_start=math.nan)
    assert has_diverged(math.nan, loss_at_start=3.0)


def test_the_end_is_checked_after_a_suspect_or_harmful_step_and_not_a_noisy_row() -> None:
    sound, suspect = Stability(2.0, 2.0, 1.0), Stability(2.0, 2.0, 1.0, suspect_since=40)

    # One row of a single token may do far worse than its base, and the last step is not to blame.
    assert not sound.is_end_suspect(loss_before=3.9, loss_after=3.8)
    assert sound.is_end_suspect(loss_before=2.0, loss_after=3.5)
    assert sound.is_end_suspect(loss_before=2.0, loss_after=math.nan)
    assert suspect.is_end_suspect(loss_before=4.5, loss_after=4.4)


@pytest.fixture
def workspace(tmp_path: Path, fluent: Path) -> Prepare:
    """Makes workspaces of the fluent model at a given rate, saved every two steps."""

    def make(name: str, rate: float, **training: Any) -> StepContext:
        settings = {"learningRate": rate, "maxSteps": 40, "scheduler": "constant", "saveEverySteps": 2, **training}
        return prepared(tmp_path / name, fluent, {"training": settings, "dataset": {"eval": None}})

    return make


def given_up(context: StepContext) -> StepFailure:
    with failing(ExitCode.DIVERGED) as caught:
        run(context)
    return caught.value


def kept(context: StepContext) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in context.workspace.checkpoints.glob("step-*"))


def test_a_rate_that_is_far_too_high_ends_the_run_and_names_the_first_bad_step(workspace: Prepare) -> None:
    context = workspace("wild", 1.0, divergencePatience=6, warmupSteps=0)

    message = given_up(context).message

    assert "training diverged at step 7: loss " in message
    assert "suspect since step 2" in message
    assert "the base model without the adapter has 0.0" in message
    assert "nothing was saved yet" in message
    assert "spec.training.learningRate" in message
    assert not context.workspace.trained.exists()


def test_a_cell_that_diverges_leaves_its_curves_on_the_page_of_its_sweep(workspace: Prepare, tmp_path: Path) -> None:
    context = workspace("wild", 1.0, divergencePatience=6, warmupSteps=0)
    expected = given_up(replace(context, mounts=replace(context.mounts, sweep=tmp_path / "shared"))).message
    page = Page((tmp_path / "shared" / "report.html").read_text())
    assert "Held-out loss tiny diverged" in page.words
    assert page.elements.count("svg") == 1, "the training loss; nothing was held out"
    # Its report does not depend on the page.
    (tmp_path / "file").touch()
    again = workspace("again", 1.0, divergencePatience=6, warmupSteps=0)
    assert given_up(replace(again, mounts=replace(again.mounts, sweep=tmp_path / "file"))).message == expected


@pytest.mark.parametrize("steps", [1, 6])
def test_an_adapter_harmed_by_its_last_step_is_no_success(workspace: Prepare, steps: int) -> None:
    context = workspace("short", 1.0, divergencePatience=20, warmupSteps=0, maxSteps=steps)

    message = given_up(context).message

    assert f"training diverged at step {steps}: loss " in message
    assert "with the finished adapter on the rows of the last step (" in message
    assert "the base model without the adapter has 0.0" in message
    assert kept(context) == []
    assert not context.workspace.trained.exists()


def test_a_suspect_run_replaces_no_good_checkpoint_and_resumes_to_the_same_end(
    workspace: Prepare,
) -> None:
    undisturbed, disturbed = (workspace(name, 0.05, divergencePatience=8, warmupSteps=20) for name in ("a", "b"))
    expected = given_up(undisturbed).message
    suspect = int(re.findall(r"suspect since step (\d+)", expected)[0])
    good = kept(undisturbed)
    assert good
    assert good[-1] < suspect
    # The next step's loss shows whether a step did harm: only the checkpoint before is surely sound.
    sound = good[-1] if good[-1] < suspect - 1 else good[-2]
    assert float(history(undisturbed)[sound]["loss"]) < 1.0
    assert ("that step may already have diverged" in expected) == (good[-1] == suspect - 1)

    stop = StopRequest()
    with pytest.raises(Interrupted, match=f"the checkpoint of step {good[-1]} is saved; the steps since then"):
        run(disturbed, stop=stop, records=StopAtStep(suspect + 2, stop))
    assert kept(disturbed) == good

    assert given_up(disturbed).message == expected
    assert kept(disturbed) == good


@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_early_stop_does_not_make_a_harmful_adapter_a_success(keep: str, tmp_path: Path, fluent: Path) -> None:
    settings = {
        "learningRate": 1.0,
        "maxSteps": 40,
        "scheduler": "constant",
        "warmupSteps": 0,
        "keep": keep,
        "evalEverySteps": 2,
        "earlyStopping": {"patience": 1},
    }
    context = prepared(tmp_path / keep, fluent, {"training": settings})

    message = given_up(context).message

    assert "training diverged at step 2: the run would stop early with loss " in message
    assert "on the held-out rows (0.0" in message
    assert not context.workspace.trained.exists()


def test_a_harmful_last_step_does_not_fail_a_run_that_keeps_an_earlier_adapter(
    workspace: Prepare, tmp_path: Path, fluent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loop, "learning_rate", lambda step, steps, of: 1.0 if step == 3 else learning_rate(step, steps, of)
    )
    settings = {"learningRate": 1e-5, "maxSteps": 4, "scheduler": "constant", "warmupSteps": 0, "evalEverySteps": 2}
    last, best = (
        prepared(tmp_path / keep, fluent, {"training": settings | {"keep": keep}}) for keep in ("last", "best")
    )

    assert "with the finished adapter on the rows of the last step (" in given_up(last).message

    found = run(best)
    assert (found.training_step, found.adapter_step) == (4, 2)
    assert {entry["step"]: entry["evalLoss"] for entry in history(best) if "evalLoss" in entry}[4] > 1.0


def test_a_run_whose_best_adapter_does_harm_is_no_success_at_its_end(tmp_path: Path, fluent: Path) -> None:
    settings = {"learningRate": 1.0, "maxSteps": 2, "scheduler": "constant", "warmupSteps": 0, "evalEverySteps": 1}
    context = prepared(tmp_path / "best", fluent, {"training": settings | {"keep": "best"}})

    assert "training diverged at step 2: the run would end with loss " in given_up(context).message
    assert kept(context) == []
    assert not context.workspace.trained.exists()


def test_a_run_that_began_with_a_harmful_adapter_does_not_fail_for_that(
    tmp_path: Path, fluent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"learningRate": 1.0, "maxSteps": 2, "scheduler": "constant", "warmupSteps": 0, "divergencePatience": 0}
    first = prepared(tmp_path / "first", fluent, {"training": settings})
    earlier = run(first)
    assert earlier.loss > 2.0
    begins = {"lora": {"from": {"source": "pvc://adapters/first"}}}
    gentle = {"learningRate": 1e-5, "maxSteps": 1, "divergencePatience": 1}
    context = prepared(tmp_path / "second", fluent, begins | {"training": settings | gentle})
    shutil.copytree(first.workspace.trained, context.workspace.initial_adapter)
    path = context.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    assert record is not None
    status = InitialAdapterStatus(source="pvc://adapters/first", sha256=earlier.adapter_sha256)
    write_completion(path, record.model_copy(update={"initial_adapter": status}))
    monkeypatch.setattr(Stability, "is_out_of_patience", lambda *_: True)

    assert run(context).loss > 2.0


def test_patience_0_turns_the_check_off(workspace: Prepare) -> None:
    context = workspace("patient", 1.0, divergencePatience=0, warmupSteps=0)

    assert run(context).loss > 2.0
    assert kept(context) == [38, 40]


def test_a_healthy_run_of_single_rows_outlasts_the_least_patience(tmp_path: Path, tiny_llama: Path) -> None:
    settings = {"maxSteps": 40, "gradientAccumulationSteps": 1, "divergencePatience": 1, "saveEverySteps": 10}
    context = prepared(tmp_path / "noisy", tiny_llama, {"training": settings}, packed=False)

    assert run(context).training_step == 40
