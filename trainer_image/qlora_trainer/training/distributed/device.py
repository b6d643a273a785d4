"""The device to train on: its choice, name, random seed and used memory."""

import gc
import logging
import os
import platform
import resource
from pathlib import Path

import numpy
import torch
from bitsandbytes.cextension import lib as bitsandbytes_library

from qlora_api.contract import ExitCode
from qlora_api.gpus import FIRST_CAPABILITY
from qlora_api.memory.estimate import GIB
from qlora_api.status import MemoryStatus
from qlora_trainer.core.context import Device
from qlora_trainer.core.cpu import BFLOAT16_UNITS, ComputeType, compute_type
from qlora_trainer.core.failures import StepFailure, bad_configuration

logger = logging.getLogger(__name__)
_PROCESS_MEMORY = Path("/proc/self/statm")


def use_device(device: Device, threads: int, local_rank: int) -> torch.device:
    """The device to train on, with a fixed number of CPU threads: another number adds floats in another order.

    Each rank of a node takes the GPU of its `local_rank`. Raises StepFailure (BAD_CONFIGURATION) if it cannot be used.
    """
    if device == "cuda":
        require_gpu(local_rank)
        torch.cuda.set_device(local_rank)
        # cuBLAS may split the many tokens of a LoRA gradient into parts, and would add these in bfloat16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_num_threads(threads)
    return torch.device(device)


def require_gpu(local_rank: int) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) without a GPU for this rank of a node."""
    if not torch.cuda.is_available():
        raise bad_configuration(
            "no CUDA GPU is visible in this container: check that the profile requests nvidia.com/gpu and that the "
            "node's driver is not older than this image's CUDA"
        )
    if local_rank >= torch.cuda.device_count():
        raise bad_configuration(
            f"this container sees {torch.cuda.device_count()} GPUs, and process {local_rank + 1} has none: check "
            "spec.resources.gpus, or torchrun's --nproc-per-node"
        )
    name, capability = torch.cuda.get_device_name(local_rank), torch.cuda.get_device_capability(local_rank)
    if capability < FIRST_CAPABILITY:
        raise bad_configuration(
            f"the GPU {name} has compute capability {_version_text(capability)}, and training in bfloat16 needs "
            f"{_version_text(FIRST_CAPABILITY)} or later, as an A100, A10, L4, L40S, H100 or RTX 3090 has it: choose a "
            "profile in spec.scheduling.profileName, or a nodeSelector in the profile, that leads to such GPUs"
        )
    if not bitsandbytes_library.compiled_with_cuda:
        raise bad_configuration(
            f"bitsandbytes has no kernels for the GPU {name} with CUDA {torch.version.cuda}: set the profile's image "
            "to the trainer of the operator's release, and see `python -m bitsandbytes` in it"
        )


def require_memory(memory: MemoryStatus, total: int, *, can_shrink: bool) -> None:
    """Compare what the run needs with the `total` bytes of the GPU that it got.

    `can_shrink`: whether the run needs less when memory runs out, by smaller micro batches or recomputation. Raises
    StepFailure DOES_NOT_FIT.
    """
    if memory.estimate_bytes is None or memory.low_bytes is None or memory.estimate_bytes <= total:
        return
    found = (
        f"training needs about {memory.estimate_bytes / GIB:.1f} GiB of GPU memory (at least "
        f"{memory.low_bytes / GIB:.1f}), and this GPU has {total / GIB:.1f}"
    )
    if memory.low_bytes > total and not can_shrink:
        raise StepFailure(
            ExitCode.DOES_NOT_FIT,
            f"{found}: set spec.resources.gpuMemory to the memory of the profile's GPUs, and prepare names the "
            "settings to change",
        )
    logger.warning("%s: it may run out of memory", found)


def _version_text(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def own_compute_type(device: Device) -> ComputeType:
    """Choose the type of matmuls on this machine. Raises StepFailure if the environment has another."""
    if device == "cuda":
        return "bfloat16"
    try:
        return compute_type(platform.machine(), torch.cpu.get_capabilities(), os.environ)
    except ValueError as error:
        raise bad_configuration(str(error)) from error


def processor(device: Device) -> str:
    """The kind of processor. On another kind, the same run may differ by rounding."""
    if device == "cuda":
        return str(torch.cuda.get_device_name())
    found = torch.cpu.get_capabilities()
    # With these, 16-bit matmuls are computed by other instructions, and add in another order.
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(unit for unit in BFLOAT16_UNITS if found.get(unit))])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators that dropout draws from, for this optimizer step and rank.

    Nothing else draws random numbers in training, so there is no random state to save: a repeated step draws the same.
    """
    torch.manual_seed(int(numpy.random.SeedSequence((seed, step, rank)).generate_state(1, numpy.uint64)[0]))


def memory_bytes(device: Device) -> int:
    """The most GPU memory used since the last call, or main memory used now."""
    if device == "cuda":
        peak = peak_memory_bytes(device)
        torch.cuda.reset_peak_memory_stats()
        return peak
    resident_pages = int(_PROCESS_MEMORY.read_text().split()[1])
    return resident_pages * resource.getpagesize()


def peak_memory_bytes(device: Device) -> int:
    """The most memory that this process has used, of the GPU or on a CPU."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> None:
    """Free the memory of a pass that was given up."""
    # It left cycles, whose tensors are memory in use until they are found.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
