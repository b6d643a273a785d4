"""The GPUs that a plan can name: their memory and speed; and those of nodes that training cannot use.

Memory is the total that `nvidia-smi` shows, with error correction as it is delivered: the readings that modal-labs
publishes of its machines (modal-client, pull request 2797), and for others

- A10G: NVIDIA/DCGM, issue 232
- RTX 3090 and 5090: noonghunna/club-3090, issues 390 and 1229
- RTX 4090: RLinf, issue 255
- A40: chatdoc-com/OCRFlux, issue 64
- RTX A6000: gist 193ee00f46c94ee7fb6f048588bc8032 of bigsnarfdude
- RTX 6000 Ada: the README of Advantech-COE/X86-GPU_Passthrough-EdgeSync-SDK
- H200: NVIDIA's
- B200: NVIDIA/TensorRT-LLM, issue 10278

Speed is dense bfloat16 on tensor cores with 32-bit sums, in 10^12 operations per second: NVIDIA's data sheets of each
GPU (where they give it with sparsity, half of it; of the RTX 6000 Ada a quarter of its 8-bit one) and, for GeForce, its
RTX Blackwell white paper. The T4 has no bfloat16, so no job can be trained on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FIRST_CAPABILITY = (8, 0)
"""The first compute capability with bfloat16 and PyTorch's kernel for rows."""
GROUPED_MAJORS = (9, 10)
"""Major compute capabilities with PyTorch's kernel for groups of rows: Hopper, and Blackwell of data centers."""
_GROUPED_GIB = 64
OLDEST_DRIVER = 580
"""Major version of the oldest driver for CUDA 13, which PyTorch brings.

NVIDIA, CUDA Compatibility, Minor Version Compatibility.
"""
_LARGEST_GIB = 9999
_MIB_PER_GIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that a plan can name."""

    name: str
    label: str
    memory_mib: int
    tflops: float
    has_bfloat16: bool = True

    @property
    def gib(self) -> float:
        """Its memory in GiB."""
        return self.memory_mib / _MIB_PER_GIB


_GPUS = (
    Gpu("t4", "T4", 15_360, 65, has_bfloat16=False),
    Gpu("a10", "A10", 23_028, 125),
    Gpu("a10g", "A10G", 23_028, 70),
    Gpu("l4", "L4", 23_034, 121),
    Gpu("4090", "RTX 4090", 24_564, 165),
    Gpu("3090", "RTX 3090", 24_576, 71),
    Gpu("5090", "RTX 5090", 32_607, 209.5),
    Gpu("a100-40", "A100 40 GB", 40_960, 312),
    Gpu("l40s", "L40S", 46_068, 362),
    Gpu("a40", "A40", 46_068, 150),
    Gpu("6000-ada", "RTX 6000 Ada", 49_140, 364),
    Gpu("a6000", "RTX A6000", 49_140, 155),
    Gpu("h100", "H100 SXM", 81_559, 989),
    Gpu("a100", "A100 80 GB", 81_920, 312),
    Gpu("h200", "H200", 143_771, 989),
    Gpu("b200", "B200", 183_359, 2250),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _GPUS}
"""By name, those with the least memory first."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU of that name. Raises ValueError unless a job can be trained on it."""
    able = ", ".join(gpu.name for gpu in GPUS.values() if gpu.has_bfloat16)
    if name not in GPUS:
        raise ValueError(f"gpu is {name!r}: must be one of {able}")
    if not GPUS[name].has_bfloat16:
        raise ValueError(f"gpu is {name!r}, which has no bfloat16, and training needs it: must be one of {able}")
    return GPUS[name]


def why_unfit(labels: Mapping[str, str]) -> str | None:
    """Return why the trainer's image cannot use the GPUs of a node with these labels.

    The labels are those of NVIDIA's GPU Feature Discovery. Returns an empty text if it can, and None without a label of
    the driver: nothing is known then.
    """
    capability = tuple(labels.get(f"nvidia.com/gpu.compute.{part}", "") for part in ("major", "minor"))
    if all(map(str.isdecimal, capability)) and tuple(map(int, capability)) < FIRST_CAPABILITY:
        return f"compute capability {'.'.join(capability)}, and {'.'.join(map(str, FIRST_CAPABILITY))} is needed"
    # The second is the older name, which is deprecated.
    driver = labels.get("nvidia.com/cuda.driver-version.major", labels.get("nvidia.com/cuda.driver.major", ""))
    if not driver.isdecimal():
        return None
    return f"driver {driver}, and {OLDEST_DRIVER} is needed" if int(driver) < OLDEST_DRIVER else ""


def gpu_memory_of(labels: Mapping[str, str], resource: str | None) -> int | None:
    """Return the GiB of each GPU of a node with these labels, rounded down, or None if they do not have it.

    `resource`: the extended resource of its GPUs, or of parts of one (MIG). GPU Feature Discovery has a label for each.
    """
    mib = labels.get(f"{resource}.memory", "")
    gib = int(mib) // _MIB_PER_GIB if mib.isdecimal() else 0
    return gib if 0 < gib <= _LARGEST_GIB else None


def has_room_for_groups(gib: float | None) -> bool:
    """Whether a GPU of this memory dequantizes all experts of a block together, if it has the kernel.

    GPUs with the kernel have the memory, except a part of one (MIG). False if it is not known.
    """
    return gib is not None and gib >= _GROUPED_GIB
