"""The checks of an adapter's two files that need no model: rejections and their reasons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qlora_api.contract import ExitCode
from qlora_api.spec.resolved import ResolvedLora
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.model.adapter.shapes import Expected
from qlora_trainer.publishing.verify import verify_config, verify_tensors
from tests.support.resolved import resolved_lora

LORA = resolved_lora(rank=4, alpha=8)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "acme/tiny",
    "revision": "c0ffee",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["model.layers.0.q_proj", "model.layers.1.q_proj"],
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "auto_mapping": None,
    "modules_to_save": None,
}
"""What PEFT writes for this adapter, as far as it matters."""


def verify(path: Path, lora: ResolvedLora = LORA) -> None:
    verify_config(
        path,
        lora,
        target_modules=("model.layers.1.q_proj", "model.layers.0.q_proj"),
        whole_modules=(),
        base_name="acme/tiny",
        base_revision="c0ffee",
    )


def rejected(path: Path, message: str) -> None:
    with pytest.raises(StepFailure) as failure:
        verify(path)
    assert failure.value.exit_code is ExitCode.INTERNAL_ERROR
    assert failure.value.message.startswith(message)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_a_configuration_that_describes_the_adapter_is_accepted(path: Path) -> None:
    verify(path)
    path.write_text(json.dumps(CONFIG | {"use_rslora": True, "use_dora": True}))
    verify(path, LORA.model_copy(update={"use_rslora": True, "use_dora": True}))


@pytest.mark.parametrize("key", [key for key, value in CONFIG.items() if value is not None])
def test_a_configuration_that_leaves_something_out_is_rejected(path: Path, key: str) -> None:
    path.write_text(json.dumps({name: value for name, value in CONFIG.items() if name != key}))
    rejected(path, f"adapter_config.json has {key}: null, not ")


def test_a_linked_configuration_is_rejected_even_if_its_target_is_right(path: Path) -> None:
    """A process that changes that file later would change the published adapter."""
    behind = path.rename(path.with_name("elsewhere.json"))
    path.symlink_to(behind)
    replaced(lambda: verify(path))


def test_linked_tensors_are_rejected_even_if_their_target_is_right(tmp_path: Path) -> None:
    path, behind = tmp_path / "adapter_model.safetensors", tmp_path / "elsewhere.safetensors"
    name, learned = "base_model.model.q_proj.lora_B.weight", torch.ones(2, 4)
    expected = {name: Expected(tuple(learned.shape), learned.dtype)}
    save_file({name: learned}, behind)
    verify_tensors(behind, file_sha256(behind), expected, LORA)
    path.symlink_to(behind)
    replaced(lambda: verify_tensors(path, file_sha256(behind), expected, LORA))


def test_files_deleted_since_the_training_are_an_unsafe_artifact(tmp_path: Path) -> None:
    replaced(lambda: verify(tmp_path / "adapter_config.json"))
    replaced(lambda: verify_tensors(tmp_path / "adapter_model.safetensors", "a" * 64, {}, LORA))


def replaced(check: Callable[[], None]) -> None:
    """It is rejected for good, and the trainer is not blamed."""
    with pytest.raises(StepFailure, match="is missing or not a regular file") as failure:
        check()
    assert failure.value.exit_code is ExitCode.UNSAFE_ARTIFACT
    assert failure.value.exit_code.permanent
