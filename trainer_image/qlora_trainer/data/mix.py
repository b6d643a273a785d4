"""Draws the rows of each epoch from the sources of a mix, in proportion to their weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy

from qlora_trainer.data.sampling import Purpose, RowIndices, permutation


@dataclass(frozen=True)
class Mix:
    """How many rows of each source an epoch has. It has as many as all sources together.

    The definition is that of MosaicML Streaming for streams with a `proportion`: a source larger than its share gives
    a part of its rows, drawn without replacement; a smaller one all of its rows as often as its share holds them, and
    a part of them once more.
    """

    sizes: tuple[int, ...]
    """Rows of each source."""
    shares: tuple[int, ...]
    """Rows of each source in an epoch."""

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[float | None]) -> "Mix":
        """The mix of sources with so many rows. Where they are None each row is in every epoch once.

        Shares are rounded by largest remainders, so that they add up to all rows.
        """
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
        """The rows of one epoch after the other, without end: indices into the rows of all sources, one after another.

        Each epoch is drawn independently of the others, in random order within a source.
        """
        epoch = 0
        while True:
            yield self._epoch(seed, epoch)
            epoch += 1

    def _epoch(self, seed: int, epoch: int) -> RowIndices:
        drawn, first = [], 0
        for source, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            order = permutation(size, seed, Purpose.MIX, (epoch, source))
            whole, rest = divmod(share, size)
            drawn.append(first + numpy.concatenate([numpy.tile(order, whole), order[:rest]]))
            first += size
        return numpy.concatenate(drawn)
