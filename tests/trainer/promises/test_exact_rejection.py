"""A checkpoint of another run is rejected with the name of the difference."""

import dataclasses
import math
import re
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.contract import ExitCode
from qlora_api.spec.training import EarlyStoppingSpec, LoraSpec, PreferenceSpec, QuantizationSpec, TrainingSpec
from qlora_trainer.core import environment
from qlora_trainer.core.completion import PrepareRecord, read_completion, write_completion
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StopRequest
from qlora_trainer.steps.prepare import prepare
from qlora_trainer.training.checkpoints import fingerprint
from tests.support.failures import failing
from tests.support.models.tiny import Recorded, chat_row, write_rows
from tests.support.training import StopAtStep, adapter_bytes, job, prepared, run
from tests.trainer.conftest import MakeContext

SECTIONS: dict[str, type[BaseModel]] = {"quantization": QuantizationSpec, "lora": LoraSpec, "training": TrainingSpec}
# These decide when to save, to draw and to stop, and what is computed twice.
WITHOUT_EFFECT = {
    "training.save_every_steps": 1,
    "training.divergence_patience": 1000,
    "training.report_to": ("tensorboard",),
    "training.samples": 1,
    "training.auto_micro_batch": True,
    "training.gradient_checkpointing": False,
}
# Values that the schema alone does not give.
OTHER_VALUES: dict[str, Any] = {
    "training.keep": "best",
    "training.early_stopping": EarlyStoppingSpec(patience=1),
    "training.objective": "dpo",
    "training.preference": PreferenceSpec(beta=0.2),
}
# No job may have these without another one.
TOGETHER: dict[str, tuple[str, Any]] = {
    "training.batch_size": ("training.packing", False),
    "training.epochs": ("training.max_steps", None),
    "training.preference": ("training.objective", "dpo"),
    "training.sharding": ("resources.gpus", 2),
}
FIELDS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]
# Where an earlier adapter came from decides nothing: its SHA-256, which prepare records, does.
DECIDING = [field for field in FIELDS if field not in (*WITHOUT_EFFECT, "lora.initial_adapter")]


def another_value(field: FieldInfo, current: Any) -> Any:
    """A value that the field allows and that differs from `current`."""
    return _another(field.annotation, field.metadata, current)


def _another(kind: Any, constraints: list[Any], current: Any) -> Any:
    origin = get_origin(kind)
    if origin is typing.Annotated:
        inner, *more = get_args(kind)
        return _another(inner, [*constraints, *_flat(more)], current)
    if origin in (types.UnionType, typing.Union):
        return _another(next(part for part in get_args(kind) if part is not types.NoneType), constraints, current)
    if origin is Literal:
        return next(value for value in get_args(kind) if value != current)
    if origin is tuple:
        item = _another(get_args(kind)[0], [], None)
        return (item, *(current or ())) if current != (item,) else (*current, item)
    if kind is bool:
        return not current
    if kind is str:
        return "q_proj"
    low: Any = next((getattr(c, "ge", getattr(c, "gt", None)) for c in constraints if isinstance(c, Ge | Gt)), 0)
    high = next((getattr(c, "le", getattr(c, "lt", None)) for c in constraints if isinstance(c, Le | Lt)), math.inf)
    if kind is int:
        return current + 1 if current is not None and current < high else max(1, low)
    assert kind is float, f"this test does not know fields of type {kind}"
    start = low if current is None else current
    return (start + min(high, start + 1)) / 2


def _flat(metadata: list[Any]) -> list[Any]:
    return [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]


def with_value(context: StepContext, field: str, value: Any) -> StepContext:
    """The same workspace for a job with another value of one field, and of one that it needs."""
    spec = job().spec
    for path, other in ((field, value), *([TOGETHER[field]] if field in TOGETHER else [])):
        section, name = path.split(".")
        spec = spec.model_copy(update={section: getattr(spec, section).model_copy(update={name: other})})
    return dataclasses.replace(context, document=job().model_copy(update={"spec": spec}))


def camel(field: str) -> str:
    """The field as a manifest has it."""
    section, name = field.split(".")
    return f"{section}.{SECTIONS[section].model_fields[name].alias}"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> StepContext:
    """A workspace with a checkpoint of its first step. A rejection leaves it as it is."""
    context, stop = prepared(tmp_path_factory.mktemp("interrupted") / "workspace", tiny_llama), StopRequest()
    with pytest.raises(Interrupted):
        run(context, stop=stop, records=StopAtStep(1, stop))
    return context


def rejection(context: StepContext) -> str:
    """The reason why the train step does not continue."""
    with failing(ExitCode.BAD_CONFIGURATION, match="step-1 belongs to another run: ") as caught:
        run(context)
    return caught.value.message


@pytest.mark.parametrize("field", DECIDING)
def test_another_value_of_any_field_that_decides_the_result_is_rejected_by_name(
    field: str, interrupted: StepContext
) -> None:
    section, name = field.split(".")
    current = getattr(getattr(interrupted.spec, section), name)
    other = OTHER_VALUES.get(field) or another_value(SECTIONS[section].model_fields[name], current)
    assert other != current

    assert re.search(rf"{re.escape(camel(field))}[.\w]* was ", rejection(with_value(interrupted, field, other)))


@pytest.mark.parametrize("field", WITHOUT_EFFECT)
def test_a_field_that_may_change_between_attempts_changes_no_byte(field: str, tiny_llama: Path, tmp_path: Path) -> None:
    undisturbed, changed = (prepared(tmp_path / name, tiny_llama) for name in ("undisturbed", "changed"))
    run(undisturbed)
    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(changed, stop=stop, records=StopAtStep(3, stop))

    run(with_value(changed, field, WITHOUT_EFFECT[field]))

    assert adapter_bytes(changed) == adapter_bytes(undisturbed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_revision": "sha256:other"}, 'model.revision was "sha256:tiny", is "sha256:other"'),
        ({"fingerprint": "other"}, "the prepared rows changed"),
        ({"target_modules": ("q_proj",)}, "lora.targetModules was "),
        (
            {"initial_adapter": InitialAdapterStatus(source="pvc://adapters/first", sha256="0" * 64)},
            f'lora.from.sha256 was not set, is "{"0" * 64}"'[:60],
        ),
    ],
)
def test_another_model_and_other_data_are_rejected(
    change: dict[str, Any], named: str, interrupted: StepContext
) -> None:
    path = interrupted.workspace.completion("prepare")
    record = read_completion(path, PrepareRecord)
    assert record is not None
    write_completion(path, record.model_copy(update=change))
    try:
        assert named in rejection(interrupted)
    finally:
        write_completion(path, record)


def other_version(package: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let version 0.0.1 of the package be installed. Returns the version that is."""
    installed = version
    for module in (environment, fingerprint):
        monkeypatch.setattr(module, "version", lambda name: "0.0.1" if name == package else installed(name))
    return installed(package)


@pytest.mark.parametrize(
    ("package", "named"),
    [
        *((name, f"version of {name}") for name in ("torch", "transformers", "peft", "bitsandbytes", "numpy")),
        ("qlora-operator", "version of the trainer"),
    ],
)
def test_another_version_of_a_library_or_of_the_trainer_is_rejected(
    package: str, named: str, interrupted: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = other_version(package, monkeypatch)

    assert f'{named} was "{installed}", is "0.0.1"' in rejection(interrupted)


def test_a_changed_setting_is_rejected_before_anything_is_read(interrupted: StepContext) -> None:
    with failing(ExitCode.BAD_CONFIGURATION, match="run: training.learningRate was 0.01, is 0.02; .*--restart"):
        prepare(with_value(interrupted, "training.learning_rate", 0.02), Recorded())


def test_a_changed_row_is_rejected_before_anything_is_trained(make_context: MakeContext, tmp_path: Path) -> None:
    rows = [chat_row(f"Which pods? {number}", f"kubectl get pods {number}") for number in range(8)]
    context, stop = make_context(), StopRequest()
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    prepare(context, Recorded())
    with pytest.raises(Interrupted):
        run(context, stop=stop, records=StopAtStep(1, stop))
    write_rows(tmp_path / "data" / "train.jsonl", [*rows[:-1], chat_row("Which pods? 7", "kubectl get pods 8")])

    with failing(ExitCode.BAD_CONFIGURATION, match="run: the rows of dataset.source or mix changed; "):
        prepare(context, Recorded())


def test_data_that_another_version_of_the_trainer_prepared_are_prepared_again(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context()
    write_rows(tmp_path / "data" / "train.jsonl", [chat_row(f"Which pods? {number}", "all") for number in range(8)])
    before = prepare(context, Recorded())
    other_version("qlora-operator", monkeypatch)
    after = prepare(context, Recorded())

    assert after.fingerprint != before.fingerprint
    assert after.data_content == before.data_content, "the rows themselves are the same"
