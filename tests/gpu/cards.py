"""Decides whether a machine's GPUs are enough for a test, and names the missing ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_api.gpus import FIRST_CAPABILITY, OLDEST_DRIVER

DRIVER_VERSION = Path("/proc/driver/nvidia/version")
DRIVER_DEVICE = Path("/dev/nvidiactl")
"""Either is there if the kernel has NVIDIA's driver, whatever PyTorch can do with it."""


@dataclass(frozen=True)
class Card:
    """A visible GPU."""

    name: str
    capability: tuple[int, int]
    gib: float
    """All of its memory."""

    def __str__(self) -> str:
        return f"{self.name} ({self.gib:.1f} GiB, capability {'.'.join(map(str, self.capability))})"


def lacking(cards: Sequence[Card], wanted: int, gib: float, visible: str | None = None) -> str | None:
    """Why a test that needs `wanted` GPUs of at least `gib` GiB cannot run; None if it can.

    The first GPUs count, since a run uses those. `visible` is the value of CUDA_VISIBLE_DEVICES.
    """
    taken = cards[:wanted]
    if len(taken) == wanted and all(card.capability >= FIRST_CAPABILITY and card.gib >= gib for card in taken):
        return None
    number = f"{wanted} CUDA GPU{'s' if wanted > 1 else ''}"
    capability = f"compute capability {'.'.join(map(str, FIRST_CAPABILITY))} (bfloat16) or later"
    size = f" and at least {gib:g} GiB" if gib else ""
    none = "none" if visible != "" else "none to show: CUDA_VISIBLE_DEVICES is set to nothing"
    return f"needs {number} of {capability}{size}, this machine has {', '.join(map(str, cards)) or none}"


def unusable(pytorch: str, cuda: str | None, visible: str | None) -> str | None:
    """Advice if PyTorch sees no GPU although the machine has a driver for one; None if it has no driver.

    `pytorch` and `cuda` are versions, of PyTorch and of the CUDA that it is built with; `visible` is the value of
    CUDA_VISIBLE_DEVICES, which may hide GPUs on purpose.
    """
    if visible == "":
        return None
    if DRIVER_VERSION.exists():
        driver = DRIVER_VERSION.read_text().partition("\n")[0]
    elif DRIVER_DEVICE.exists():
        driver = f"{DRIVER_DEVICE} exists"
    else:
        return None
    chosen = "" if visible is None else f", CUDA_VISIBLE_DEVICES has to name GPUs that there are (it is {visible!r})"
    return (
        f"this machine has NVIDIA's driver ({driver}), and PyTorch {pytorch} sees no GPU. The driver has to be new "
        f"enough for CUDA {cuda} ({OLDEST_DRIVER} or later), a container needs to be given the GPUs{chosen}. "
        "To skip the tests that need a GPU, set CUDA_VISIBLE_DEVICES to nothing"
    )
