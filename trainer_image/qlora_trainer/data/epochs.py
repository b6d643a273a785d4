"""Draws the rows of each epoch from the sources of a mix, and arranges them in sequences.

An epoch that ends with the first exhausted source, as in `datasets.interleave_datasets`, would let a small source
decide how much of the others is seen. One that ends with the last repeats the others without bound.

prepare arranges all epochs, because the learning rate depends on their number of steps from the first one on. In train,
a GPU would wait some ten seconds for an epoch of ten million rows. A row takes four bytes in each epoch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from math import ceil
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy
from numpy.typing import NDArray

from qlora_api.spec.resolved import ResolvedTraining
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.data.packing import Arrangement
from qlora_trainer.data.sampling import Purpose, RowIndices, permutation


@dataclass(frozen=True)
class Mix:
    """The number of rows of each source in an epoch, as MosaicML Streaming's `proportion` defines it.

    A source larger than its share gives a part of its rows, drawn without replacement; a smaller one all of its rows as
    often as its share holds them, and a part of them once more.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]

    @classmethod
    def from_sizes(cls, sizes: Sequence[int], weights: Sequence[float | None]) -> "Mix":
        """The mix by largest remainders. Without weights each row is in an epoch once."""
        parts = [Fraction(weight) for weight in weights if weight is not None]
        if not parts:
            return cls(tuple(sizes), tuple(sizes))
        total = sum(sizes)
        exact = [total * part / sum(parts) for part in parts]
        shares = [int(share) for share in exact]
        by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
        for source in by_remainder[: total - sum(shares)]:
            shares[source] += 1
        return cls(tuple(sizes), tuple(shares))

    def epochs(self, seed: int) -> Iterator[RowIndices]:
        """Row indices of one epoch after the other, without end, each drawn by itself."""
        for epoch in count():
            drawn, first = [], 0
            for source, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
                order = permutation(size, seed, Purpose.MIX, (epoch, source))
                whole, rest = divmod(share, size)
                drawn.append(first + numpy.concatenate([numpy.tile(order, whole), order[:rest]]))
                first += size
            yield numpy.concatenate(drawn)


MAX_EPOCHS = 100_000
MAX_DRAWN_ROWS = 10**9
"""Most rows of all epochs: minutes of drawing and packing, 4 GB on the volume."""


@dataclass(frozen=True)
class EpochArrangements:
    """The sequences of all epochs of a run."""

    rows: NDArray[numpy.int32]
    """int32 [rows of all epochs]: row indices by sequence, memory-mapped."""
    sequence_offsets: NDArray[numpy.int64]
    """int64 [sequences + 1]: where a sequence begins in `rows`."""
    epoch_offsets: NDArray[numpy.int64]
    """int64 [epochs + 1]: the first sequence of each epoch."""

    @classmethod
    def from_epochs(
        cls,
        epochs: Iterable[RowIndices],
        arrange: Callable[[RowIndices], Arrangement],
        training: ResolvedTraining,
        scratch: Path,
        on_epoch: Callable[[int], None],
    ) -> Self:
        """The arrangement of as many of `epochs` as the run has, which `training` decides.

        Memory: an epoch, and 8 bytes per sequence; the rows are in an unnamed file in `scratch`. `on_epoch` gets the
        number of each. Raises OSError, and StepFailure (BAD_CONFIGURATION) for too many epochs.
        """
        sequences_per_step = training.micro_batch_size * training.gradient_accumulation_steps
        sizes, epoch_offsets, steps = [numpy.zeros(1, numpy.int64)], [0], 0
        with TemporaryFile(dir=scratch) as file:
            for number, rows in enumerate(epochs):
                on_epoch(number)
                arrangement = arrange(rows)
                file.write(arrangement.rows.astype("<i4").data)
                sizes.append(numpy.diff(arrangement.offsets))
                epoch_offsets.append(epoch_offsets[-1] + len(arrangement))
                steps += ceil(len(arrangement) / sequences_per_step)
                if number == 0:
                    _require_few_epochs(training, len(rows), steps)
                if steps >= training.max_steps if training.max_steps else number + 1 == (training.epochs or 1):
                    break
            file.flush()
            mapped = numpy.memmap(file, dtype="<i4", mode="r")
        offsets = numpy.cumsum(numpy.concatenate(sizes), dtype=numpy.int64)
        return cls(mapped, offsets, numpy.array(epoch_offsets, dtype=numpy.int64))

    @property
    def first(self) -> Arrangement:
        """The arrangement of the first epoch."""
        offsets = self.sequence_offsets[: self.epoch_offsets[1] + 1]
        return Arrangement(self.rows[: offsets[-1]].astype(numpy.int64), offsets)


def _require_few_epochs(training: ResolvedTraining, rows: int, steps: int) -> None:
    """Raise StepFailure (BAD_CONFIGURATION) if epochs of so many steps are too many."""
    epochs = ceil(training.max_steps / steps) if training.max_steps else training.epochs or 1
    most = min(MAX_EPOCHS, max(1, MAX_DRAWN_ROWS // rows))
    if epochs <= most:
        return
    field, value, allowed = "epochs", training.epochs, most
    if training.max_steps:
        field, value, allowed = "maxSteps", training.max_steps, most * steps
    raise bad_configuration(
        f"spec.training.{field} is {value}: with spec.dataset.mix that is about {epochs} epochs of {rows} rows, which "
        f"prepare would have to draw one by one, and it draws at most {MAX_EPOCHS} epochs and {MAX_DRAWN_ROWS} rows: "
        f"set {field} to at most about {allowed}, or mix larger sources"
    )
