"""Successive halving of a sweep's cells: the rungs, and the number of cells kept."""

from pydantic import Field

from qlora_api.schema import ApiModel
from qlora_api.status_types import MAX_RUNGS


class HalvingSpec(ApiModel):
    """Cells that do badly are stopped early (asynchronous successive halving in its stopping form, arXiv 1810.05934).

    A rung is a number of optimizer steps: minSteps · factor^k. A cell that reaches one continues if its loss on the
    held-out rows is among the best 1/factor of the losses known at that rung by then.
    """

    min_steps: int = Field(
        ge=1,
        le=10_000_000,
        description="Optimizer steps of the first rung: no cell is stopped before. A multiple of evalEverySteps.",
    )
    factor: int = Field(
        3,
        ge=2,
        le=4,
        description="At each rung the best 1/factor of the cells that have reached it continue, at least one; the next "
        "rung is factor times as many steps away.",
    )

    def rungs(self, longest: int | None = None) -> tuple[int, ...]:
        """Return the first rungs in optimizer steps, below `longest` if known.

        At its last step a run has nothing left to stop.
        """
        steps = (self.min_steps * self.factor**number for number in range(MAX_RUNGS))
        return tuple(step for step in steps if step <= 10_000_000 and (longest is None or step < longest))

    def kept(self, reached: int) -> int:
        """Return the number of cells kept of those that have reached a rung."""
        return max(1, reached // self.factor)
