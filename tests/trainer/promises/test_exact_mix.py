"""A run over a mix that is interrupted in any epoch ends in the same bytes."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.context import StepContext
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from tests.support.commands.command import Files
from tests.support.manifests import merged
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.ranks import EXACT, TWO, same_numbers, succeeded
from tests.support.runs.report_page import Page
from tests.support.training import Lost, LostAtStep, adapter_bytes, history, interrupted_at, run
from tests.trainer.conftest import MakeContext

SPEC: dict[str, Any] = {
    "dataset": {
        "source": None,
        "mix": [{"source": "pvc://data/pods.jsonl", "weight": 3}, {"source": "pvc://data/nodes.jsonl", "weight": 2}],
        "eval": {"fraction": 0.2},
    },
    "training": {"maxSteps": 9, "gradientAccumulationSteps": 2, "saveEverySteps": 2, "evalEverySteps": 3},
}


@pytest.fixture(autouse=True)
def sources(tmp_path: Path) -> None:
    """Two files."""
    for name, size in (("pods", 24), ("nodes", 6)):
        rows = [chat_row(f"{name} {n}?", f"{name} " * (n % 4 + 1)) for n in range(size)]
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)


def workspace(make_context: MakeContext, root: Path, spec: dict[str, Any]) -> StepContext:
    """A new prepared workspace."""
    context = StepContext(**{**vars(make_context(spec)), "workspace": WorkspaceLayout(root)})
    prepare(context, Recorded())
    return context


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_is_interrupted_in_its_second_epoch_ends_in_the_same_bytes(
    make_context: MakeContext, tmp_path: Path
) -> None:
    undisturbed = workspace(make_context, tmp_path / "undisturbed", SPEC)
    run(undisturbed)
    data = PreparedDataset(next(undisturbed.workspace.data.glob("*/train.safetensors")))
    steps = [-(-(end - first) // 2) for first, end in zip(data.epoch_offsets, data.epoch_offsets[1:], strict=False)]
    assert len(steps) >= 2
    assert steps[0] < 7 < 9 <= sum(steps), "step 7 is in the middle of the second epoch"
    resumed = workspace(make_context, tmp_path / "resumed", SPEC)
    interrupted_at(resumed, 3)
    with pytest.raises(Lost):
        run(resumed, records=LostAtStep(7))
    interrupted_at(resumed, 7)
    run(resumed)
    assert adapter_bytes(resumed) == adapter_bytes(undisturbed)
    assert history(resumed) == history(undisturbed)
    publish(resumed, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    page = Page((resumed.workspace.report / "report.html").read_text())
    assert page.open == []
    assert "pvc://data/nodes.jsonl 2 6 1 0 5 10, each 2 times" in page.words
    model_card = (resumed.workspace.adapter / "README.md").read_text()
    assert "from\na mix of 2 sources (sha256" in model_card
    assert "|\n| `pvc://data/pods.jsonl` | 24 | 19 | 14 | " in model_card


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_mix_of_pairs_of_answers_ends_in_the_same_bytes_too(make_context: MakeContext, tmp_path: Path) -> None:
    """The reference losses of pairs are kept for each row, not for a sequence."""
    for name, size in (("pods", 24), ("nodes", 6)):
        rows = [{"prompt": f"{name} {n}?", "chosen": name * (n % 3 + 1), "rejected": "no " * 3} for n in range(size)]
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    spec = merged(SPEC, {"training": {"objective": "dpo", "evalEverySteps": 100}})
    undisturbed = workspace(make_context, tmp_path / "undisturbed", spec)
    run(undisturbed)
    data = PreparedDataset(next(undisturbed.workspace.data.glob("*/train.safetensors")))
    assert all(data[index].row_numbers == tuple(data.row_numbers(index)) for index in range(len(data)))
    assert {number for index in range(len(data)) for number in data.row_numbers(index)} <= set(range(data.rows))
    resumed = workspace(make_context, tmp_path / "resumed", spec)
    interrupted_at(resumed, 7)
    run(resumed)
    assert adapter_bytes(resumed) == adapter_bytes(undisturbed)


@pytest.mark.slow
def test_two_processes_train_on_the_same_rows_as_one(make_context: MakeContext, tmp_path: Path) -> None:
    spec = merged(SPEC, merged(EXACT, {"training": {"maxSteps": 6}}))
    alone = workspace(make_context, tmp_path / "alone", spec)
    run(alone)
    both = workspace(make_context, tmp_path / "both" / "workspace", merged(spec, TWO))
    models = both.mounts.claims["models"]
    (tmp_path / "both" / "data").symlink_to(tmp_path / "data")
    succeeded(Files(tmp_path / "both", models, both.spec.dump()).run("train"))
    same_numbers(both, alone, tolerance=1e-4)
