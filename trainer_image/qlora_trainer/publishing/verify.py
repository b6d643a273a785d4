"""Verifies a trained adapter before publication: files, tensors and numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from qlora_api.contract import ExitCode, WorkspaceLayout
from qlora_api.printable import shortened_json
from qlora_api.spec.resolved import ResolvedLora, ResolvedSpec
from qlora_trainer.core.completion import PrepareRecord, TrainRecord
from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import StepFailure, bad_configuration, unsafe_artifact
from qlora_trainer.core.file_names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, HISTORY_FILE
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.data.prepared import open_prepared
from qlora_trainer.history.metrics_log import read_history
from qlora_trainer.model.adapter.attach import peft_targets, whole_modules
from qlora_trainer.model.adapter.shapes import B_SUFFIX, MAX_CONFIG_BYTES, Expected, expected_tensors
from qlora_trainer.model.architecture.text_part import text_part
from qlora_trainer.training.checkpoints.fingerprint import digest, run_fingerprint
from qlora_trainer.training.progress.evaluations import expected_end
from qlora_trainer.training.schedule import Schedule


def verify_adapter(
    folder: Path,
    sha256: str,
    lora: ResolvedLora,
    *,
    model_folder: Path,
    target_modules: tuple[str, ...],
    base_name: str,
    base_revision: str,
    initial: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check both files of an adapter, `sha256` being what training recorded for its tensors.

    `initial` are the tensors of an earlier adapter that training continued from.

    Raises StepFailure: UNSAFE_ARTIFACT if they are not what training wrote, DIVERGED if a number is not finite,
    BAD_CONFIGURATION if training changed nothing, INTERNAL_ERROR if it is not the adapter that the spec describes.
    """
    config = AutoConfig.from_pretrained(model_folder, local_files_only=True, trust_remote_code=False)
    skeleton = text_part(config)
    modules, parameters = peft_targets(skeleton, target_modules)
    verify_config(
        folder / ADAPTER_CONFIG_FILE,
        lora,
        target_modules=modules,
        target_parameters=parameters,
        whole_modules=whole_modules(skeleton, lora),
        base_name=base_name,
        base_revision=base_revision,
    )
    verify_tensors(folder / ADAPTER_FILE, sha256, expected_tensors(skeleton, target_modules, lora), lora, initial)


def verify_tensors(
    path: Path,
    sha256: str,
    expected: Mapping[str, Expected],
    lora: ResolvedLora,
    initial: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check the adapter's file: SHA-256, names, shapes, types, and every number."""
    _require_regular(path)
    found = file_sha256(path)
    if found != sha256:
        raise unsafe_artifact(
            f"{path} has sha256 {found}, but training wrote {sha256}: it was changed or damaged afterwards and is not "
            "published; create the job again"
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            _require_same_names(set(tensors.keys()), set(expected))
            unmoved = [
                name
                for name, wanted in expected.items()
                if not _has_moved(name, _check(name, tensors.get_tensor(name), wanted, lora), initial)
            ]
    except SafetensorError as error:
        raise _wrong_adapter(f"{path.name} is not a safetensors file: {error}") from error
    _require_moved(unmoved, sum(name.endswith(B_SUFFIX) for name in expected), is_continued=initial is not None)


def _require_same_names(found: set[str], expected: set[str]) -> None:
    for names, what in ((expected - found, "lacks"), (found - expected, "has unexpected")):
        if names:
            raise _wrong_adapter(f"the adapter {what} {len(names)} of {len(expected)} tensors, first {min(names)}")


def _check(name: str, tensor: torch.Tensor, expected: Expected, lora: ResolvedLora) -> torch.Tensor:
    if tuple(tensor.shape) != expected.shape:
        raise _wrong_adapter(f"{name} has shape {list(tensor.shape)}, not {list(expected.shape)}")
    if tensor.dtype != expected.dtype:
        why = f"spec.lora.dtype is {lora.dtype}" if ".lora_" in name else "fully trained modules keep the base's dtype"
        raise _wrong_adapter(f"{name} is {tensor.dtype}, not {expected.dtype}: {why}")
    if not bool(torch.isfinite(tensor).all()):
        raise StepFailure(
            ExitCode.DIVERGED,
            f"{name} of the trained adapter holds NaN or infinite numbers, so it is not published: lower "
            "spec.training.learningRate and create the job again",
        )
    return tensor


def _has_moved(name: str, tensor: torch.Tensor, initial: Mapping[str, torch.Tensor] | None) -> bool:
    """False for a B that training left as it was: an earlier adapter's, or zero."""
    if not name.endswith(B_SUFFIX):
        return True
    return bool(tensor.any()) if initial is None else not torch.equal(tensor, initial[name].to(tensor.dtype))


def _require_moved(unmoved: list[str], layers: int, *, is_continued: bool) -> None:
    if len(unmoved) == layers:
        # Only settings can do this: gradients that are zero everywhere would have no loss to come from.
        start = "that of spec.lora.from" if is_continued else "still zero"
        raise bad_configuration(
            f"the trained adapter is {start}, unchanged: each change was rounded away; raise "
            "spec.training.learningRate, or set spec.lora.dtype: float32"
        )
    # A new B starts at zero. Rounding takes small updates of numbers that are not zero.
    if unmoved and not is_continued:
        raise _wrong_adapter(f"no gradient has reached {len(unmoved)} of {layers} layers, first {unmoved[0]}")


def verify_config(
    path: Path,
    lora: ResolvedLora,
    *,
    target_modules: tuple[str, ...],
    target_parameters: tuple[str, ...] = (),
    whole_modules: tuple[str, ...],
    base_name: str,
    base_revision: str,
) -> None:
    """Check that adapter_config.json describes this adapter.

    Raises StepFailure: UNSAFE_ARTIFACT if it is missing or a link, INTERNAL_ERROR if it describes another adapter.
    """
    expected: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": base_revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if target_parameters else lora.dropout,
        "target_modules": sorted(target_modules),
        "target_parameters": sorted(target_parameters) or None,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "bias": "none",
        "auto_mapping": None,
        "modules_to_save": sorted(whole_modules) or None,
    }
    config = _read_config(path)
    for key, value in expected.items():
        if config.get(key) != value:
            found = shortened_json(config.get(key))
            raise _wrong_adapter(f"{path.name} has {key}: {found}, not {shortened_json(value)}")


def _read_config(path: Path) -> JsonObject:
    _require_regular(path)
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise _wrong_adapter(f"{path.name} is not JSON of less than {MAX_CONFIG_BYTES} bytes ({error})") from error
    if not isinstance(config, dict):
        raise _wrong_adapter(f"{path.name} is not a JSON object")
    return config


def _require_regular(path: Path) -> None:
    # A user with access to the file behind a link could change what is published.
    if path.is_symlink() or not path.is_file():
        raise unsafe_artifact(
            f"{path} is missing or not a regular file, although training wrote one: it was removed or replaced "
            "afterwards and nothing is published; keep others from writing to the workspace, and create the job again"
        )


def _wrong_adapter(what: str) -> StepFailure:
    return StepFailure(
        ExitCode.INTERNAL_ERROR, f"{what}: this is a bug in the trainer, please report it; nothing was published"
    )


def require_own_training(
    prepared: PrepareRecord, trained: TrainRecord, spec: ResolvedSpec, workspace: WorkspaceLayout
) -> None:
    """Raise StepFailure (UNSAFE_ARTIFACT) unless the train record is of this spec, data and number of steps.

    Where a run may stop early, or keep an earlier adapter than the last, its evaluations decide the steps again.
    Raises OSError if they are missing, ValueError if they cannot be read, StepFailure BAD_DATASET for damaged rows.
    """
    path = workspace.completion("train")
    # Publish runs without a GPU, and the training's device is not recorded.
    fingerprints = {digest(run_fingerprint(spec, prepared, device, trained.ranks)) for device in get_args(Device)}
    if trained.fingerprint not in fingerprints:
        raise unsafe_artifact(
            f"{path} belongs to another run: model, data, settings or versions differ from this job's, so its adapter "
            "is not published; create the job again, and keep one version of the trainer for all of its steps"
        )
    data = open_prepared(workspace.root / prepared.data_path, "train")
    planned = Schedule.from_training(len(data), spec.training, data.epoch_offsets).total_steps
    curve = _evaluations(workspace) if spec.training.early_stopping or spec.training.keep == "best" else []
    end, kept = expected_end(spec.training, planned, curve)
    if trained.training_step != end:
        raise unsafe_artifact(
            f"{path} states {trained.training_step} optimizer steps, but this job has {end}: an adapter that is "
            "not fully trained is not published; delete the file and run the train step again"
        )
    if trained.kept_step != kept:
        raise unsafe_artifact(
            f"{path} states the adapter of step {trained.kept_step}, but spec.training.keep and the evaluations choose "
            f"that of step {kept}, so it is not published; delete the file and run the train step again"
        )


def _evaluations(workspace: WorkspaceLayout) -> list[tuple[int, float]]:
    curve = read_history(workspace.report / HISTORY_FILE).evaluation
    return list(zip(curve.steps, curve.values, strict=True))
