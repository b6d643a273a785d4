"""The fingerprint of a run: everything that decides its adapter."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_api.printable import shortened
from qlora_api.schema import Decides
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.training import PreferenceSpec
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import Device
from qlora_trainer.core.environment import trainer_version
from qlora_trainer.core.failures import bad_configuration

Fingerprint = dict[str, Any]
# numpy draws the order of the data and the seeds of the steps.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
# Another word for leaving the field out.
_SAME_AS_NOT_SET = {"keep": "last", "objective": "supervised", "preference": PreferenceSpec().dump()}


def run_fingerprint(spec: QLoRAJobSpec, prepared: PrepareRecord, device: Device, ranks: int) -> Fingerprint:
    """Everything that decides the adapter, by name."""
    settings = run_settings(spec, device, ranks)
    initial, content = prepared.initial_adapter, prepared.data_content
    return settings | {
        "model": {
            "revision": prepared.model_revision,
            "base": prepared.base_sha256,
            "targetModules": list(prepared.target_modules),
        },
        # The content of the data and the choice of rows, by name, without addresses.
        "data": dict({"fingerprint": prepared.fingerprint} if content is None else content),
        # Of an earlier adapter its digest, wherever it came from.
        "lora": settings["lora"] | ({} if initial is None else {"from": {"sha256": initial.sha256}}),
    }


def run_settings(spec: QLoRAJobSpec, device: Device, ranks: int) -> Fingerprint:
    """The part before preparation, without model, data and an earlier adapter."""
    without_effect = Decides.NOT_THE_ADAPTER.settings(spec.training)
    training = {
        name: value
        for name, value in spec.training.dump().items()
        if name not in without_effect and _SAME_AS_NOT_SET.get(name) != value
    }
    return {
        "quantization": spec.quantization.dump(),
        "lora": {name: value for name, value in spec.lora.dump().items() if name != "from"},
        "training": training,
        "device": device,
        # Another number adds gradients in another order.
        "ranks": ranks,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "trainer": trainer_version(),
    }


def digest(fingerprint: Fingerprint) -> str:
    """SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def reject_other_run(found: Fingerprint, wanted: Fingerprint, checkpoint: Path) -> None:
    """Raise StepFailure naming the differences if a checkpoint is of another run."""
    different = differences(found, wanted)
    if different:
        raise bad_configuration(
            f"{checkpoint} belongs to another run: {different}; use another workspace, or delete the folder "
            f"{checkpoint.parent} to start over"
        )


def differences(found: Fingerprint, wanted: Fingerprint) -> str:
    """The first differences between two runs for a message, or an empty string."""
    before, now = _flat(found), _flat(wanted)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in changed[:3])


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def _short(value: object) -> str:
    return shortened(json.dumps(value), 60)
