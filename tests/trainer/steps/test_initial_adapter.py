"""Training that begins with an earlier adapter: from its loss on, resumed exactly."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.completion import PublishRecord, TrainRecord
from qlora_trainer.core.context import Mounts, StepContext
from qlora_trainer.core.failures import StepFailure, StopRequest
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.model.adapter.initial import InitialAdapter, get_initial_adapter
from qlora_trainer.steps.clean import clean
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.steps.publish import publish
from qlora_trainer.steps.train_together import train_together
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.contents import parse_manifest
from qlora_trainer.stores.hub import Hub
from qlora_trainer.training import suspect_run as judging
from qlora_trainer.training.progress.divergence import Stability
from tests.support.manifests import merged
from tests.support.models.tiny import JOB_UID, POD_UID, Recorded, chat_row, write_rows
from tests.support.training import adapter_bytes, history, interrupted_at, run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FROM = {"source": "pvc://adapters/first"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a test's jobs have their claims and workspaces."""

    root: Path
    models: Path

    @property
    def adapter(self) -> Path:
        """Published files of the first job."""
        return self.root / "adapters" / "first"

    def context(self, name: str, spec: dict[str, Any] | None = None) -> StepContext:
        """A job with a workspace of this name."""
        default = {
            "model": {"source": "pvc://models/model"},
            "dataset": {"source": "pvc://data/train.jsonl", "eval": {"fraction": 0.2}},
            "lora": {"rank": 4, "alpha": 8},
            "training": {
                "maxSteps": 4,
                "gradientAccumulationSteps": 2,
                "maxSequenceLength": 64,
                "learningRate": 0.01,
                "evalEverySteps": 2,
                "saveEverySteps": 2,
                "samples": 0,
            },
            "output": {"destination": f"pvc://adapters/{name}"},
        }
        document = {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": name, "uid": JOB_UID},
            "spec": merged(default, spec or {}),
        }
        return StepContext(
            document=QLoRAJobDocument.model_validate(document),
            workspace=WorkspaceLayout(self.root / name),
            mounts=Mounts(claims={"models": self.models, **{n: self.root / n for n in ("data", "adapters")}}),
            device="cpu",
            pod_uid=POD_UID,
            attempt=1,
            workspace_uri=f"pvc://work/{name}",
        )


def published(context: StepContext) -> PublishRecord:
    return publish(context, Recorded(), now=lambda: datetime(2026, 1, 2, tzinfo=UTC))


def targets(lora: LoraSpec) -> tuple[str, ...]:
    """The layers of the tiny Llama that get an adapter, as its inspection finds them."""
    parts = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]
    names = [f"model.layers.{block}.{part}" for block in lora.layers_to_transform or (0, 1) for part in parts]
    return tuple(name for name in names if {"all-linear", name.rpartition(".")[2]} & set(lora.target_modules))


def checked(context: StepContext, earlier: InitialAdapterStatus | None = None) -> InitialAdapter:
    """Prepare's handling of the earlier adapter, without the rest of the step."""
    model = context.mounts.claims["models"] / "model"
    lora, folder = context.spec.lora, context.workspace.initial_adapter
    access = StoreAccess(context.mounts, lambda: Hub(None), context.secret("lora"))
    found = get_initial_adapter(lora, access, folder, model, targets(lora), earlier)
    assert found is not None
    return found


def rejected(context: StepContext, code: ExitCode, *words: str) -> None:
    """The earlier adapter is rejected, by one sentence with all these words."""
    with pytest.raises(StepFailure) as failure:
        checked(context)
    assert failure.value.exit_code is code, failure.value
    for word in words:
        assert word in failure.value.message, failure.value.message


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> tuple[Place, TrainRecord]:
    """A published job with the records of its training. Do not change it: copy it."""
    place = Place(tmp_path_factory.mktemp("earlier"), tiny_llama.parent)
    write_rows(
        place.root / "data" / "train.jsonl", [chat_row(f"Question {n}?", "pods " * (n % 7 + 1)) for n in range(20)]
    )
    (place.root / "adapters").mkdir()
    context = place.context("first")
    prepare(context, Recorded())
    record = run(context)
    published(context)
    return place, record


@pytest.fixture
def place(tmp_path: Path, earlier: tuple[Place, TrainRecord]) -> Place:
    """Its data and its adapter, for a test to change."""
    original, _ = earlier
    for name in ("data", "adapters"):
        shutil.copytree(original.root / name, tmp_path / name)
    return Place(tmp_path, original.models)


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
    assert prepared.remarks == ()
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
    with pytest.raises(StepFailure, match="rank is 8, and the adapter has 4") as failure:
        prepare(context, Recorded())
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION
    assert not list(context.workspace.root.iterdir())


def test_an_adapter_that_has_changed_in_the_workspace_is_not_trained_further(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM}})
    prepare(context, Recorded())
    tensors = load_file(place.adapter / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, context.workspace.initial_adapter / WEIGHTS)
    with pytest.raises(StepFailure, match="no longer the adapter that prepare has checked") as failure:
        run(context)
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT


def test_a_training_that_changes_nothing_is_not_published(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM}, "training": {"learningRate": 1e-30, "maxSteps": 1}})
    prepare(context, Recorded())
    run(context)
    with pytest.raises(StepFailure, match="unchanged: each update was rounded away") as failure:
        published(context)
    assert failure.value.exit_code is ExitCode.BAD_CONFIGURATION


def test_a_16_bit_adapter_continues_in_32_bit_and_not_the_reverse(place: Place) -> None:
    rejected(
        place.context("second", {"lora": {"from": FROM, "dtype": "bfloat16"}}),
        ExitCode.BAD_CONFIGURATION,
        "spec.lora.dtype is bfloat16, which would round it: set spec.lora.dtype: float32",
    )
    halves = {name: tensor.to(torch.float16) for name, tensor in load_file(place.adapter / WEIGHTS).items()}
    save_file(halves, place.adapter / WEIGHTS)
    checked(place.context("third", {"lora": {"from": FROM}}))


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank": 8}, ["spec.lora.rank is 8, and the adapter has 4"]),
        (
            {"rank": 2, "alpha": 4},
            ["spec.lora.rank is 2, and the adapter has 4; spec.lora.alpha is 4, and the adapter has 8"],
        ),
        ({"useRslora": True}, ["spec.lora.useRslora is true, and the adapter has false"]),
        ({"useDora": True}, ["spec.lora.useDora is true, and the adapter has false"]),
        (
            {"targetModules": ["q_proj", "v_proj"]},
            ["spec.lora.targetModules differs: down_proj, gate_proj, k_proj, o_proj, up_proj only in the adapter"],
        ),
        ({"layersToTransform": [1]}, ["spec.lora.layersToTransform differs: 7 layers only in the adapter"]),
        ({"modulesToSave": ["lm_head"]}, ["spec.lora.modulesToSave differs: lm_head only in this job"]),
    ],
)
def test_every_setting_that_differs_is_named_before_anything_is_trained(
    place: Place, lora: dict[str, Any], words: list[str]
) -> None:
    context = place.context("second", {"lora": {"from": FROM} | lora})
    rejected(context, ExitCode.BAD_CONFIGURATION, *words, "set these fields to what the adapter has")


def test_another_base_of_the_same_shapes_is_reported_and_not_rejected(place: Place) -> None:
    change_config(place, base_model_name_or_path="acme/other", revision="v2")
    found = checked(place.context("second", {"lora": {"from": FROM}}))
    told = found.remark("acme/model", "v1")
    assert told is not None
    assert told.startswith(
        "the adapter of spec.lora.from was trained on acme/other (v2), and this job is on acme/model (v1)"
    )
    assert found.remark("acme/other", "v2") is None


def change_config(place: Place, **changes: object) -> None:
    path = place.adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_classes_that_a_configuration_names_are_not_imported(place: Place) -> None:
    change_config(place, auto_mapping={"base_model_class": "Popen", "parent_library": "antigravity"})
    checked(place.context("second", {"lora": {"from": FROM}}))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, 'is of type "IA3": must be LORA'),
        ({"r": [4]}, "spec.lora.rank is 4, and the adapter has [4]"),
        ({"bias": "all"}, '"bias": "all", which this trainer does not support'),
        ({"alpha_pattern": {"q_proj": 64}}, '"alpha_pattern": {"q_proj": 64}, which this trainer does not support'),
        ({"fan_in_fan_out": True}, '"fan_in_fan_out": true, which this trainer does not support'),
        ({"use_something_new": True}, '"use_something_new": true, which this trainer does not support'),
        ({"init_lora_weights": "pissa_niter_4"}, 'initialized with "pissa_niter_4". PEFT changed the base for it'),
    ],
)
def test_a_lora_variant_with_another_computation_is_rejected(
    place: Place, changes: dict[str, object], words: str
) -> None:
    change_config(place, **changes)
    rejected(place.context("second", {"lora": {"from": FROM}}), ExitCode.BAD_CONFIGURATION, words)


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return edit


def larger(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = torch.zeros(tensors[name].shape[0], tensors[name].shape[1] + 1)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def huge(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.truncate(2**40)


HOSTILE: dict[str, tuple[Callable[[Path], object], ExitCode, str]] = {
    "NaN": (
        edit_tensors(lambda tensors: tensors[min(tensors)].fill_(float("nan"))),
        ExitCode.BAD_CONFIGURATION,
        "holds NaN or infinite numbers",
    ),
    "another shape": (edit_tensors(larger), ExitCode.BAD_CONFIGURATION, "is of another base"),
    "integers": (
        edit_tensors(lambda tensors: tensors.update({min(tensors): tensors[min(tensors)].to(torch.int32)})),
        ExitCode.BAD_CONFIGURATION,
        "is torch.int32",
    ),
    "one more tensor": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.x": torch.zeros(1)})),
        ExitCode.BAD_CONFIGURATION,
        "spec.lora.modulesToSave differs: x only in the adapter",
    ),
    "one tensor less": (edit_tensors(lambda tensors: tensors.pop(min(tensors))), ExitCode.BAD_CONFIGURATION, "first"),
    "no safetensors": (
        lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99),
        ExitCode.BAD_CONFIGURATION,
        "is not a safe",
    ),
    "a pickle": (pickled, ExitCode.UNSAFE_ARTIFACT, "only as adapter_model.bin, which can run code"),
    "a terabyte": (huge, ExitCode.UNSAFE_ARTIFACT, "has 1099511627776 bytes"),
    "a device": (lambda folder: endless(folder / WEIGHTS), ExitCode.UNSAFE_ARTIFACT, "a link that leads out"),
    "a link for the configuration": (
        lambda folder: endless(folder / CONFIG),
        ExitCode.UNSAFE_ARTIFACT,
        "a link that leads out",
    ),
    "no configuration": (
        lambda folder: (folder / CONFIG).unlink(),
        ExitCode.BAD_CONFIGURATION,
        f"has no {CONFIG}; it has",
    ),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("["), ExitCode.BAD_CONFIGURATION, "is not JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), ExitCode.BAD_CONFIGURATION, "is not a JSON object"),
    "nested without end": (
        lambda folder: (folder / CONFIG).write_text("[" * 100_000),
        ExitCode.BAD_CONFIGURATION,
        "is not JSON",
    ),
    "no folder": (shutil.rmtree, ExitCode.BAD_CONFIGURATION, "is not a folder on the volume"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_invalid_or_malicious_adapter_files_are_rejected(place: Place, what: str) -> None:
    spoil, code, words = HOSTILE[what]
    spoil(place.adapter)
    rejected(place.context("second", {"lora": {"from": FROM}}), code, words)


def test_an_adapter_of_another_digest_than_the_job_states_is_rejected(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM | {"sha256": "0" * 64}}})
    rejected(context, ExitCode.UNSAFE_ARTIFACT, f"and spec.lora.from.sha256 is {'0' * 64}")


def test_an_adapter_that_has_changed_since_the_job_was_prepared_is_rejected(place: Place) -> None:
    """As after a clean-up: the run that has been trained began with another one."""
    context = place.context("second", {"lora": {"from": FROM}})
    before = checked(context).status
    assert checked(context, before).status == before
    edit_tensors(lambda tensors: tensors[min(tensors)].add_(1))(place.adapter)

    with pytest.raises(StepFailure, match="the adapter at pvc://adapters/first has changed since") as failure:
        checked(context, before)

    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert f"sha256 was {before.sha256}, is " in failure.value.message
    elsewhere = before.model_copy(update={"source": "pvc://adapters/other"})
    assert checked(context, elsewhere).status.sha256 != before.sha256, "the job names another one now"


@pytest.mark.slow
def test_a_cleaned_job_rejects_a_changed_earlier_adapter(place: Place) -> None:
    context = place.context("second", {"lora": {"from": FROM}})
    prepare(context, Recorded())
    clean(context.workspace)
    edit_tensors(lambda tensors: tensors[min(tensors)].add_(1))(place.adapter)
    with pytest.raises(StepFailure, match="has changed since this job was prepared"):
        prepare(context, Recorded())


@pytest.mark.slow
def test_the_run_is_compared_with_its_start_and_resumes_to_the_last_bit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that unlearns the earlier adapter has diverged, even if no worse than the base."""
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
    monkeypatch.setattr(judging, "has_diverged", note)
    compared = place.context("compared", spec)
    run(compared)
    assert adapter_bytes(compared) == adapter_bytes(context)
    assert len(pairs) == 2
    assert pairs[0][0] == pytest.approx(pairs[0][1], abs=1e-3), "at the first step it is where it began"
    assert abs(pairs[1][0] - pairs[1][1]) > 0.1, "and then it is elsewhere"
