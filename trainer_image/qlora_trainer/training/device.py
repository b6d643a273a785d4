"""The device to train on: choose it, name it, seed its random numbers, and read how much of its memory is in use."""

import resource
from pathlib import Path

import numpy
import torch

from qlora_trainer.core.context import Device
from qlora_trainer.core.failures import StepFailure, bad_configuration

# With these, 16-bit matmuls are computed by other instructions, and add in another order.
_UNITS = ("avx512_bf16", "amx_bf16")
_PROCESS_MEMORY = Path("/proc/self/statm")


def use_device(device: Device, threads: int, local_rank: int) -> torch.device:
    """The device to train on, with a fixed number of CPU threads: another number adds floats in another order.

    Each rank of a node takes the GPU of its `local_rank`. Raises StepFailure if the device is `cuda` and there is no
    GPU; training on the CPU instead would never finish.
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
    """The failure of a step that needs a GPU and sees none."""
    return bad_configuration(
        "no CUDA GPU is visible in this container: check that the profile requests nvidia.com/gpu and that the node's "
        "driver is not older than this image's CUDA"
    )


def processor(device: Device) -> str:
    """The kind of processor that computes: on another kind, the same run may differ in its last digits."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    found = torch.cpu.get_capabilities()
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(unit for unit in _UNITS if found.get(unit))])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators that dropout draws from, for this optimizer step and rank.

    Nothing else draws random numbers once training has started, so there is no random state to save: a step that is
    repeated, in this process or after a resume, draws the same. The parts are mixed as numpy does (O'Neill's seed_seq).
    """
    torch.manual_seed(int(numpy.random.SeedSequence((seed, step, rank)).generate_state(1, numpy.uint64)[0]))


def memory_bytes(device: Device) -> int:
    """The most GPU memory that this process has used since the last call, so that each step shows its own peak.

    On a CPU, the main memory that the process uses now.
    """
    if device == "cuda":
        peak = int(torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        return peak
    resident_pages = int(_PROCESS_MEMORY.read_text().split()[1])
    return resident_pages * resource.getpagesize()


def peak_memory_bytes(device: Device) -> int:
    """The most memory that this process has used: of the GPU, or on a CPU of main memory."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
