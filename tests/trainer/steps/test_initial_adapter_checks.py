"""The earlier adapter that a job names: what prepare rejects, by the setting or the file."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_api.artifact_status import InitialAdapterStatus
from qlora_api.contract import ExitCode
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.context import StepContext
from qlora_trainer.model.adapter.initial import InitialAdapter, get_initial_adapter
from qlora_trainer.stores.access import StoreAccess
from qlora_trainer.stores.hub import Hub
from tests.support.earlier_adapter import CONFIG, FROM, WEIGHTS, Place
from tests.support.failures import failing


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
    with failing(code) as failure:
        checked(context)
    for word in words:
        assert word in failure.value.message, failure.value.message


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


@pytest.mark.parametrize("size", ["4", 0, 1025, 4.0, True, None])
def test_a_rank_that_no_adapter_has_is_rejected_where_the_job_leaves_it_open(place: Place, size: object) -> None:
    change_config(place.adapter, r=size)
    context = place.context("second", {"lora": {"from": FROM, "rank": None, "alpha": None}})
    words = f"pvc://adapters/first, has r {json.dumps(size)}, must be a whole number from 1 to 1024"
    rejected(context, ExitCode.BAD_CONFIGURATION, words)


def test_another_base_of_the_same_shapes_is_reported_and_not_rejected(place: Place) -> None:
    change_config(place.adapter, base_model_name_or_path="acme/other", revision="v2")
    found = checked(place.context("second", {"lora": {"from": FROM}}))
    told = found.remark("acme/model", "v1")
    assert told is not None
    assert told.startswith(
        "the adapter of spec.lora.from was trained on acme/other (v2), and this job is on acme/model (v1)"
    )
    assert found.remark("acme/other", "v2") is None


def change_config(adapter: Path, **changes: object) -> None:
    path = adapter / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_classes_that_a_configuration_names_are_not_imported(place: Place) -> None:
    change_config(place.adapter, auto_mapping={"base_model_class": "Popen", "parent_library": "antigravity"})
    checked(place.context("second", {"lora": {"from": FROM}}))
    assert "antigravity" not in sys.modules


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


UNUSABLE, UNSAFE = ExitCode.BAD_CONFIGURATION, ExitCode.UNSAFE_ARTIFACT
HOSTILE: dict[str, tuple[Callable[[Path], object], ExitCode, str]] = {
    "NaN": (
        edit_tensors(lambda found: found[min(found)].fill_(float("nan"))),
        UNUSABLE,
        "holds NaN or infinite numbers",
    ),
    "another shape": (edit_tensors(larger), UNUSABLE, "is of another base"),
    "integers": (
        edit_tensors(lambda found: found.update({min(found): found[min(found)].int()})),
        UNUSABLE,
        "is torch.int32",
    ),
    "one more tensor": (
        edit_tensors(lambda found: found.update({"base_model.model.x": torch.zeros(1)})),
        UNUSABLE,
        "spec.lora.modulesToSave differs: x only in the adapter",
    ),
    "one tensor less": (edit_tensors(lambda found: found.pop(min(found))), UNUSABLE, "first"),
    "no safetensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 99), UNUSABLE, "is not a safe"),
    "a pickle": (pickled, UNSAFE, "only as adapter_model.bin, which can run code"),
    "a terabyte": (lambda folder: os.truncate(folder / WEIGHTS, 2**40), UNSAFE, "has 1099511627776 bytes"),
    "a device": (lambda folder: endless(folder / WEIGHTS), UNSAFE, "a link that leads out"),
    "a link for the configuration": (lambda folder: endless(folder / CONFIG), UNSAFE, "a link that leads out"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), UNUSABLE, f"has no {CONFIG}; it has"),
    "another variant": (lambda folder: change_config(folder, peft_type="IA3"), UNUSABLE, "must be LORA"),
    "no folder": (shutil.rmtree, UNUSABLE, "is not a folder on the volume"),
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

    with failing(ExitCode.UNSAFE_ARTIFACT, match="the adapter at pvc://adapters/first has changed since") as failure:
        checked(context, before)

    assert f"sha256 was {before.sha256}, is " in failure.value.message
    elsewhere = before.model_copy(update={"source": "pvc://adapters/other"})
    assert checked(context, elsewhere).status.sha256 != before.sha256, "the job names another one now"
