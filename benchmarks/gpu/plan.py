"""Decides the runs, their order and their commands. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, Self

Device = Literal["cuda", "cpu"]
SystemName = Literal["ours", "trl", "trl-flash", "unsloth"]
SYSTEMS: tuple[SystemName, ...] = ("ours", "trl", "trl-flash", "unsloth")
MICRO_BATCHES = (1, 2, 4)
SEQUENCES_PER_STEP = 4
"""Of an optimizer step, whatever its micro batches: each run trains on the same number of tokens."""
RANK, ALPHA = 16, 16
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
"""Whose sizes the random base has on a GPU."""
UNSLOTH = "unsloth==2026.10.9"
"""It brings its own PyTorch, transformers and TRL. The versions of TRL's environment are in uv.lock."""

KERNELS = "kernels>=0.18.2,<0.19"
"""The versions that the locked transformers accepts."""


@dataclass(frozen=True)
class Case:
    """A run: one process."""

    system: SystemName
    micro_batch: int
    recompute: bool
    """Whether activations are recomputed in the backward pass, or kept."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.system}-{self.micro_batch}-{'recomputed' if self.recompute else 'kept'}"

    @property
    def accumulation(self) -> int:
        """Micro batches of an optimizer step."""
        return SEQUENCES_PER_STEP // self.micro_batch


@dataclass(frozen=True)
class Workload:
    """The part that all runs share."""

    device: Device
    max_length: int
    """Tokens of a packed sequence."""
    steps: int
    """Timed optimizer steps. One more is profiled."""
    last: int
    """The median of so many last steps counts: the others warm up."""

    @classmethod
    def on(cls, device: Device, steps: int | None = None) -> Self:
        """Return the workload of a device, with another number of steps if given."""
        length, usual = (2048, 14) if device == "cuda" else (128, 4)
        steps = steps or usual
        return cls(device, length, steps, min(10, max(1, steps - 2)))

    @property
    def rows(self) -> int:
        """Conversations that fill all steps: an average one has some 200 tokens."""
        return (self.steps + 1) * SEQUENCES_PER_STEP * self.max_length // 100


def make_plan(systems: Sequence[SystemName], micro_batches: Sequence[int]) -> tuple[Case, ...]:
    """Return the runs: the systems take turns, so that a slow moment of the machine hits all."""
    return tuple(
        Case(system, micro_batch, recompute)
        for recompute, micro_batch, system in product((True, False), micro_batches, systems)
    )


def interpreter(system: SystemName, *, own: str, uv: str | None, root: Path, given: Mapping[str, str]) -> list[str]:
    """Return the command of a system's Python.

    `own`: this process's interpreter. `uv`: the program that makes the environments of the other systems, `root` the
    project whose lock it reads. `given`: interpreters of environments that exist, by system.
    Raises ValueError without `uv` where it is needed.
    """
    if system in given:
        return [given[system]]
    if system == "ours":
        return [own]
    if uv is None:
        raise ValueError(
            f"the environment of {system} is made by uv, and neither the variable UV nor PATH names that program: run "
            f"`make bench-gpu`, or name an interpreter that has the libraries with --python {system}=PATH"
        )
    isolated = [uv, "run", "--quiet", "--isolated", "--python", own]
    if system == "unsloth":
        return [*isolated, "--no-project", "--with", UNSLOTH, "python"]
    # It downloads the kernels of flash attention, which TRL advises for packed rows, from the Hub.
    further = ["--with", KERNELS] if system == "trl-flash" else []
    project = ["--project", str(root), "--locked", "--extra", "trainer", "--extra", "benchmarks"]
    return [*isolated, *project, *further, "python"]
