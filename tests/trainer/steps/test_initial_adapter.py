"""Training that begins with an earlier adapter: from its loss on, resumed exactly."""

import json
import shutil
from datetime import UTC, datetime

import pytest
from safetensors.torch import load_file, save_file

from qlora_api.contract import ExitCode
from qlora_trainer.core.completion import TrainRecord
from qlora_trainer.core.failures import StopRequest
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.train_together import train_together
from qlora_trainer.stores.contents import parse_manifest
from qlora_trainer.training import suspect_run
from qlora_trainer.training.progress.divergence import Stability
from tests.support.earlier_adapter import FROM, WEIGHTS, Place, published
from tests.support.failures import failing
from tests.support.models.tiny import Recorded
from tests.support.training import adapter_bytes, history, interrupted_at, run


def test_it_begins_with_the_earlier_adapters_last_loss_and_reports_it(
    place: Place, earlier: tuple[Place, TrainRecord]
) -> None:
    _, before = earlier
    context = place.context("second", {"lora": {"from": FROM | {"sha256": before.adapter_sha256}}})
    prepared = prepare(context, Recorded())
    shutil.rmtree(place.adapter)  # the copied files are enough from here on
    trained = run(context)
    assert trained.initial_eval_loss == before.eval_loss
    assert trained.eval_loss is not None
    assert before.eval_loss is not None
    assert trained.eval_loss < before.eval_loss
    assert trained.fingerprint != before.fingerprint
    adapter = published(context).adapter
    origin = {"source": FROM["source"], "sha256": before.adapter_sha256}
    assert adapter.dump()["from"] == origin
    assert len(prepared.remarks) == 1, "on few steps, and nothing on the adapter"
    folder = place.root / "adapters" / "second"
    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    assert manifest is not None
    assert manifest.dump()["initialAdapter"] == origin
    card = (folder / "README.md").read_text()
    assert (
        f"| Initialized with | the adapter `{FROM['source']}`, sha256 `{before.adapter_sha256}` |\n| Optimizer" in card
    )
    report = context.workspace.report
    assert json.loads((report / "summary.json").read_text())["initialAdapter"] == origin
    assert before.adapter_sha256 in (report / "report.html").read_text()


def test_rank_and_alpha_that_are_left_open_are_those_of_the_adapter(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM, "rank": None, "alpha": None}})
    chosen = [(each.setting, each.value, each.reason) for each in prepare(context, Recorded()).settings]
    said = "as the adapter of lora.from"
    assert chosen == [("lora.rank", "4", said), ("lora.alpha", "8", said)]


def test_a_job_of_a_group_begins_with_its_own_earlier_adapter(place: Place, earlier: tuple[Place, TrainRecord]) -> None:
    _, before = earlier
    contexts = [place.context("anew"), place.context("second", {"lora": {"from": FROM}})]
    for context in contexts:
        prepare(context, Recorded())
    anew, second = train_together(
        contexts,
        [Recorded(), Recorded()],
        stop=StopRequest(),
        now=lambda: datetime(2026, 1, 2, tzinfo=UTC),
        monotonic=lambda: 0.0,
    )
    assert isinstance(anew, TrainRecord)
    assert isinstance(second, TrainRecord)
    assert second.initial_eval_loss == pytest.approx(before.eval_loss, rel=1e-2)
    assert anew.initial_eval_loss == pytest.approx(before.initial_eval_loss, rel=1e-2)
    assert (second.initial_eval_loss or 0.0) < (anew.initial_eval_loss or 0.0)


def test_a_job_without_an_earlier_adapter_names_none(earlier: tuple[Place, TrainRecord]) -> None:
    place, _ = earlier
    for text in (
        (place.adapter / "manifest.json").read_text(),
        (place.adapter / "README.md").read_text(),
        (place.root / "first" / "report" / "summary.json").read_text(),
        (place.root / "first" / "records" / "prepare.json").read_text(),
    ):
        assert "initialAdapter" not in text
        assert "Initialized with" not in text


def test_it_resumes_to_the_last_bit(place: Place) -> None:
    spec = {"lora": {"from": FROM, "dropout": 0.1}}
    undisturbed, interrupted = place.context("undisturbed", spec), place.context("interrupted", spec)
    prepare(undisturbed, Recorded())
    shutil.copytree(undisturbed.workspace.root, interrupted.workspace.root)
    run(undisturbed)
    interrupted_at(interrupted, 1)
    shutil.rmtree(interrupted.workspace.initial_adapter)  # a checkpoint has all that is needed
    run(interrupted)
    assert adapter_bytes(interrupted) == adapter_bytes(undisturbed)
    assert history(interrupted) == history(undisturbed)


def test_prepare_reuses_its_copy_until_the_job_names_another_adapter(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM}})
    record = prepare(context, Recorded())
    tensors = load_file(place.adapter / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, place.adapter / WEIGHTS)
    assert prepare(context, Recorded()) == record
    other = place.context("second", {"lora": {"from": FROM | {"sha256": file_sha256(place.adapter / WEIGHTS)}}})
    again = prepare(other, Recorded())
    assert again.initial_adapter != record.initial_adapter
    assert again.fingerprint == record.fingerprint, "the data need not be tokenized otherwise"


def test_a_mismatch_ends_prepare_before_the_data_and_leaves_nothing(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM, "rank": 8}})
    with failing(ExitCode.BAD_CONFIGURATION, match="rank is 8, and the adapter has 4"):
        prepare(context, Recorded())
    assert not list(context.workspace.root.iterdir())


def test_an_adapter_that_has_changed_in_the_workspace_is_not_trained_further(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM}})
    prepare(context, Recorded())
    tensors = load_file(place.adapter / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, context.workspace.initial_adapter / WEIGHTS)
    with failing(ExitCode.UNSAFE_ARTIFACT, match="no longer the adapter that prepare has checked"):
        run(context)


def test_a_training_that_changes_nothing_is_not_published(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM}, "training": {"learningRate": 1e-30, "maxSteps": 1}})
    prepare(context, Recorded())
    run(context)
    with failing(ExitCode.BAD_CONFIGURATION, match="unchanged: each change was rounded away"):
        published(context)


@pytest.mark.slow
def test_the_run_is_compared_with_its_start_and_resumes_to_the_last_bit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that unlearns the earlier adapter diverges, though no worse than the base."""
    spec = {"lora": {"from": FROM}, "training": {"maxSteps": 2, "learningRate": 0.05, "evalEverySteps": 1000}}
    context = place.context("second", spec)
    prepare(context, Recorded())
    shutil.copytree(context.workspace.root, place.root / "compared")
    run(context)
    pairs: list[tuple[float, float]] = []

    def note(loss: float, loss_at_start: float) -> bool:
        pairs.append((loss, loss_at_start))
        return False

    monkeypatch.setattr(Stability, "is_out_of_patience", lambda *_: True)
    monkeypatch.setattr(suspect_run, "has_diverged", note)
    compared = place.context("compared", spec)
    run(compared)
    assert adapter_bytes(compared) == adapter_bytes(context)
    assert len(pairs) == 2
    assert pairs[0][0] == pytest.approx(pairs[0][1], abs=1e-3), "at the first step it is where it began"
    assert abs(pairs[1][0] - pairs[1][1]) > 0.1, "and then it is elsewhere"
