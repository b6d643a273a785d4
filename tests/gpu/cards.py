"""Decides whether a machine's GPUs are enough for a test, and what it lacks."""

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.training.device import FIRST_CAPABILITY


@dataclass(frozen=True)
class Card:
    """A visible GPU."""

    name: str
    capability: tuple[int, int]
    gib: float
    """All of its memory."""

    def __str__(self) -> str:
        return f"{self.name} ({self.gib:.1f} GiB, capability {'.'.join(map(str, self.capability))})"


def lacking(cards: Sequence[Card], wanted: int, gib: float) -> str | None:
    """Why a test that needs `wanted` GPUs of at least `gib` GiB cannot run; None if it can.

    The first GPUs count, since those are what a run takes.
    """
    taken = cards[:wanted]
    if len(taken) == wanted and all(card.capability >= FIRST_CAPABILITY and card.gib >= gib for card in taken):
        return None
    number = f"{wanted} CUDA GPU{'s' if wanted > 1 else ''}"
    capability = f"compute capability {'.'.join(map(str, FIRST_CAPABILITY))} (bfloat16) or later"
    size = f" and at least {gib:g} GiB" if gib else ""
    return f"needs {number} of {capability}{size}, this machine has {', '.join(map(str, cards)) or 'none'}"
