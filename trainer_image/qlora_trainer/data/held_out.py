"""Lists the sets of held-out rows that a job names by an address."""

from collections.abc import Iterator
from dataclasses import dataclass

from qlora_api.spec.dataset import HeldOutSource
from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.data.prepared import guard_split


@dataclass(frozen=True)
class HeldOutSet:
    """Rows of an address that are only held out, in the format of the first training source."""

    split: str
    uri: str
    field: str
    """The job's field that names them."""
    rows: HeldOutSource
    check: str | None
    """The column with the checks of the rows, if their answers are scored by these."""


def held_out_sets(job: QLoRAJobSpec) -> Iterator[HeldOutSet]:
    """The rows of dataset.eval.source, if it is set, then those of the guards."""
    columns, evaluation = next(iter(job.dataset.training_sources.values())).columns, job.dataset.eval
    check = None if columns is None else columns.check
    if evaluation is not None and evaluation.source is not None:
        yield HeldOutSet("eval", evaluation.source, "spec.dataset.eval", evaluation, check)
    for number, guard in enumerate(job.guards):
        checked = None if guard.min_score is None else check
        yield HeldOutSet(guard_split(guard.name), guard.source, f"spec.gate.guards[{number}]", guard, checked)
