"""Describes the GPU without using it: the process that starts the others must hold none of its memory."""

import os
import subprocess
from dataclasses import dataclass

_FIELDS = ("name", "driver_version", "memory.total", "compute_cap")


@dataclass(frozen=True)
class Card:
    """A GPU, and who uses it."""

    name: str
    driver: str
    memory_mib: int
    capability: str
    processes: tuple[int, ...]
    """Their ids, as far as this machine shows them."""


def find_card() -> Card:
    """Return the first visible GPU, which is the one that a run takes.

    Raises ValueError if there is none, or another process uses it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        raise ValueError("CUDA_VISIBLE_DEVICES hides all GPUs: unset it, or use --cpu to try the command on a CPU")
    first = "0" if visible is None else visible.partition(",")[0]
    card = parse_card(_ask(first, f"--query-gpu={','.join(_FIELDS)}"), _ask(first, "--query-compute-apps=pid"))
    if card.processes:
        raise ValueError(
            f"{card.name} is used by process {', '.join(map(str, card.processes))}: each run needs the GPU for itself"
        )
    return card


def parse_card(card: str, processes: str) -> Card:
    """Return the card of nvidia-smi's lines of values without units."""
    name, driver, memory, capability = (field.strip() for field in card.strip().split(","))
    return Card(name, driver, int(memory), capability, tuple(map(int, processes.split())))


def _ask(gpu: str, query: str) -> str:
    command = ["nvidia-smi", f"--id={gpu}", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise ValueError(
            "this machine has no nvidia-smi, so no NVIDIA GPU: use --cpu to try the command on a CPU"
        ) from None
    except subprocess.CalledProcessError as error:
        raise ValueError(f"`{' '.join(command)}` failed: {(error.stdout + error.stderr).strip()}") from error
