"""A stop within an optimizer step that takes minutes: the step is dropped, and the one before it is saved."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.model.losses.batch import MicroBatch
from qlora_trainer.training import loop
from qlora_trainer.training.schedule import Schedule
from tests.support.ranks import EXACT
from tests.support.runs.forks import train_ranks
from tests.support.training import adapter_bytes, history, prepared, run

REPEATS, STOPPED_AT = 4000, 30


def lengthen_second_step(folder: Path) -> None:
    """Repeat the micro batches of this process's second step, and let the last rank get SIGTERM in one of them."""
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    micro_batches, add, passed = Schedule.micro_batches, loop._add_gradients, 0

    def repeated(self: Schedule, step: int) -> list[MicroBatch]:
        return micro_batches(self, step) * (REPEATS if step == 1 else 1)

    def counted(run: Any, state: Any, *arguments: Any) -> bool:
        nonlocal passed
        if state.step == 1:
            passed += 1
            assert passed <= STOPPED_AT, "the step goes on"
            (folder / f"passed-{rank}").write_text(str(passed))
            if passed == STOPPED_AT and rank == size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return add(run, state, *arguments)

    Schedule.micro_batches = repeated  # type: ignore[method-assign]
    loop._add_gradients = counted  # type: ignore[assignment]


@pytest.fixture
def alone(tmp_path: Path, tiny_llama: Path) -> StepContext:
    """The job of one process, which is not disturbed."""
    context = prepared(tmp_path / "alone", tiny_llama, EXACT, packed=False)
    run(context)
    return context


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_drops_the_step_after_the_micro_batch_of_the_stop(
    ranks: int, tmp_path: Path, tiny_llama: Path, request: pytest.FixtureRequest
) -> None:
    undisturbed: StepContext = (
        request.getfixturevalue("alone") if ranks == 1 else request.getfixturevalue("together")[1]
    )
    context = prepared(tmp_path / "job", tiny_llama, undisturbed.spec.dump(), packed=False)

    train_ranks(context, partial(lengthen_second_step, tmp_path), ends=ExitCode.INTERRUPTED)

    passed = [int((tmp_path / f"passed-{rank}").read_text()) for rank in range(ranks)]
    assert passed == [STOPPED_AT] * ranks
    assert [path.name for path in context.workspace.checkpoints.iterdir()] == ["step-1"]
    train_ranks(context)
    assert adapter_bytes(context) == adapter_bytes(undisturbed)
    assert history(context) == history(undisturbed)
