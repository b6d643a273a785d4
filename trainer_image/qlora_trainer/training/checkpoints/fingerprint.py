"""The fingerprint of a run: everything that decides its adapter."""

import hashlib
import json
from collections.abc import Collection
from importlib.metadata import version
from typing import Any

from qlora_api.choice import MAX_VALUE_LENGTH, Choice
from qlora_api.printable import shortened
from qlora_api.schema import Decides
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec
from qlora_api.spec.training import PreferenceSpec
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import Device
from qlora_trainer.core.environment import trainer_version
from qlora_trainer.data.fingerprint import dataset_settings

Fingerprint = dict[str, Any]
# numpy draws the order of the data and the seeds of the steps.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
# Another word for leaving the field out.
_SAME_AS_NOT_SET = {"keep": "last", "objective": "supervised", "preference": PreferenceSpec().dump()}
_SHOWN = 3
# Of content only the SHA-256 is known, which would explain nothing.
_CONTENT = {
    "data.rows": "the rows of dataset.source or mix",
    "data.evalRows": "the rows of dataset.eval.source",
    "data.template": "the template of dataset.chatTemplate",
    "data.fingerprint": "the prepared rows",
    "model.base": "the base model in 4-bit",
}
_TOKENIZER = "data.tokenizer."
_NAMES = {
    "data.format": "the format of prepared rows",
    "model.targetModules": "lora.targetModules",
    "ranks": "the number of GPUs",
    "trainer": "the version of the trainer",
}


def run_fingerprint(spec: ResolvedSpec, prepared: PrepareRecord, device: Device, ranks: int) -> Fingerprint:
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
    """The part before preparation: the settings, without model, rows and an earlier adapter."""
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
        "data": {"dataset": dataset_settings(spec.dataset)},
        "device": device,
        # Another number adds gradients in another order.
        "ranks": ranks,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "trainer": trainer_version(),
    }


def settings_of(fingerprint: Fingerprint, left_open: Collection[str], reason: str) -> tuple[Choice, ...]:
    """Return the run's values of settings that a job leaves open, as far as they decide the adapter."""
    known = _flat(fingerprint) | {"training.autoMicroBatch": False}
    known.setdefault("training.keep", _SAME_AS_NOT_SET["keep"])
    found = {path: known.get(path.replace("dataset.", "data.dataset.")) for path in sorted(left_open)}
    return tuple(
        Choice.of(path, value, reason)
        for path, value in found.items()
        if isinstance(value, (int, float, str)) and len(str(value)) <= MAX_VALUE_LENGTH
    )


def digest(fingerprint: Fingerprint) -> str:
    """SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def settings_differences(found: Fingerprint, settings: Fingerprint, left_open: Collection[str] = ()) -> str:
    """The first differences of `run_settings` to a run's fingerprint, or an empty string.

    `left_open`: paths of settings that the job does not decide.
    """
    lora, data = found.get("lora"), found.get("data")
    if not (isinstance(lora, dict) and isinstance(data, dict)):
        return ""
    known = {part: found.get(part) for part in settings} | {
        "lora": {name: value for name, value in lora.items() if name != "from"},
        "data": {"dataset": data["dataset"]} if "dataset" in data else settings["data"],
    }
    return differences(known, settings, frozenset(name.replace("dataset.", "data.dataset.") for name in left_open))


def differences(found: Fingerprint, wanted: Fingerprint, ignored: Collection[str] = ()) -> str:
    """The first differences between two runs for a message, or an empty string."""
    before, now = _flat(found), _flat(wanted)
    names = before.keys() | now.keys()
    changed = sorted(name for name in names if name not in ignored and before.get(name) != now.get(name))
    # By the text: the versions of some libraries are there twice.
    texts = dict.fromkeys(_difference(name, before.get(name), now.get(name)) for name in changed)
    return ", ".join(list(texts)[:_SHOWN])


def _difference(name: str, before: object, now: object) -> str:
    content = _CONTENT.get(name) or (f"the model's {name.removeprefix(_TOKENIZER)}" if _TOKENIZER in name else "")
    if content:
        return f"{content} changed"
    return f"{_field(name)} was {_short(before)}, is {_short(now)}"


def _field(name: str) -> str:
    """The name that the spec has for a part of the fingerprint, or words."""
    if ".libraries." in f".{name}":
        return f"the version of {name.rpartition('.')[2]}"
    return _NAMES.get(name, name.removeprefix("data."))


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def _short(value: object) -> str:
    return "not set" if value is None else shortened(json.dumps(value), 60)
