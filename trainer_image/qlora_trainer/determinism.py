"""What must be the same for a resumed run to give the same adapter: threads, random state, and a run's fingerprint."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch

from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import Device
from qlora_trainer.core.environment import trainer_version
from qlora_trainer.core.failures import StepFailure, bad_configuration

Fingerprint = dict[str, Any]
# numpy draws the order of the data and the seeds of the steps.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
# With these, 16-bit products are computed by other instructions, and add in another order.
_UNITS = ("avx512_bf16", "amx_bf16")
# How often to save, where to draw curves and when to give up decide nothing about what is computed.
_WITHOUT_EFFECT = ("saveEverySteps", "divergencePatience", "reportTo", "samples", "autoMicroBatch")


def run_fingerprint(spec: QLoRAJobSpec, prepared: PrepareRecord, device: Device, ranks: int) -> Fingerprint:
    """Everything that decides the adapter, by name. Another number of processes adds gradients in another order."""
    training = {name: value for name, value in spec.training.dump().items() if name not in _WITHOUT_EFFECT}
    return {
        "model": {"revision": prepared.model_revision, "targetModules": list(prepared.target_modules)},
        "data": {"fingerprint": prepared.fingerprint},
        "quantization": spec.quantization.dump(),
        "lora": spec.lora.dump(),
        "training": training,
        "device": device,
        "ranks": ranks,
        "libraries": {name: version(name) for name in _LIBRARIES},
        "trainer": trainer_version(),
    }


def digest(fingerprint: Fingerprint) -> str:
    """SHA-256 of a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def refuse_other_run(found: Fingerprint, wanted: Fingerprint, checkpoint: Path) -> None:
    """Raise StepFailure naming what differs, if a checkpoint is of another run than this one."""
    before, now = _flat(found), _flat(wanted)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        differences = ", ".join(
            f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in changed[:3]
        )
        raise bad_configuration(
            f"{checkpoint} belongs to another run: {differences}; use another workspace, or delete the folder "
            f"{checkpoint.parent} to start over"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf
        for key, inner in value.items()
        for name, leaf in _flat(inner, f"{prefix}.{key}" if prefix else key).items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def seed_step(seed: int, step: int, rank: int) -> None:
    """Start the generators that dropout draws from at a place of the optimizer step's and the process's own.

    Nothing else here draws random numbers after the start, so there is no random state to save: a step that is done
    again, in this process or after a resume, draws the same. The parts are mixed as numpy does (O'Neill's seed_seq).
    """
    torch.manual_seed(int(numpy.random.SeedSequence((seed, step, rank)).generate_state(1, numpy.uint64)[0]))


def processor(device: Device) -> str:
    """What computes: on another kind, the same run may differ in its last digits."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    found = torch.cpu.get_capabilities()
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(unit for unit in _UNITS if found.get(unit))])


def use_device(device: Device, threads: int, local_rank: int) -> torch.device:
    """The device to train on, with a fixed number of threads: another number adds floats in another order.

    Each process of a node takes the GPU of its `local_rank`. Raises StepFailure if a GPU is asked for and there is
    none; training on the CPU instead would take for ever.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise no_gpu()
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise bad_configuration(
            f"this container sees {torch.cuda.device_count()} GPUs, and process {local_rank + 1} has none: check "
            "spec.resources.gpus, or torchrun's --nproc-per-node"
        )
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(threads)
    return torch.device(device)


def no_gpu() -> StepFailure:
    """A GPU is asked for and this process sees none."""
    return bad_configuration(
        "no CUDA GPU is visible in this container: check that the profile asks for nvidia.com/gpu and that the node's "
        "driver is not older than this image's CUDA"
    )
