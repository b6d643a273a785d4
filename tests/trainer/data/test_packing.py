"""Packing: no row is lost or cut, little room is wasted, and sequences are mixed."""

from collections.abc import Callable
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data.packing import Arrangement, one_row_each, pack

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=200)


def packed(lengths: list[int], capacity: int = CAPACITY, seed: int = 0) -> list[list[int]]:
    """The sequences, each as the list of its rows."""
    return as_lists(pack_all(numpy.array(lengths, dtype=numpy.int32), capacity, seed))


def pack_all(lengths: Any, capacity: int, seed: int) -> Arrangement:
    """The arrangement of rows that are all used."""
    return pack(numpy.arange(len(lengths)), lengths, capacity, seed)


def as_lists(arrangement: Arrangement) -> list[list[int]]:
    return [arrangement.sequence(index).tolist() for index in range(len(arrangement))]


@given(LENGTHS, st.integers(0, 2**31 - 1))
def test_every_row_is_in_exactly_one_sequence_that_it_fits(lengths: list[int], seed: int) -> None:
    sequences = packed(lengths, seed=seed)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in sequence) <= CAPACITY for sequence in sequences)


@given(LENGTHS, st.integers(0, 2**31 - 1))
def test_no_two_sequences_would_fit_into_one(lengths: list[int], seed: int) -> None:
    totals = sorted(sum(lengths[row] for row in sequence) for sequence in packed(lengths, seed=seed))
    assert len(totals) < 2 or totals[0] + totals[1] > CAPACITY


@given(LENGTHS)
def test_the_same_rows_and_seed_give_the_same_sequences(lengths: list[int]) -> None:
    assert packed(lengths, seed=3) == packed(list(lengths), seed=3)


def test_another_seed_puts_other_rows_together() -> None:
    lengths = [1 + number % 20 for number in range(500)]
    assert packed(lengths, seed=0) != packed(lengths, seed=1)


def mixed(count: int, kind: str) -> Any:
    """Lengths in tokens as data sets have them."""
    chance = numpy.random.default_rng(7)
    draws: dict[str, Callable[[], Any]] = {
        "chat": lambda: chance.lognormal(5.5, 0.8, count),
        "even": lambda: chance.uniform(1, 1024, count),
        "two kinds": lambda: numpy.where(
            chance.random(count) < 0.5, chance.normal(60, 10, count), chance.normal(300, 50, count)
        ),
    }
    return numpy.clip(draws[kind](), 8, 1024).astype(numpy.int32)


@pytest.mark.parametrize("capacity", [1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["chat", "even", "two kinds"])
def test_little_room_is_wasted(kind: str, capacity: int) -> None:
    lengths = mixed(20_000, kind)
    arrangement = pack_all(lengths, capacity, seed=0)
    assert lengths.sum() / (len(arrangement) * capacity) >= 0.97


def test_sequences_mix_rows_of_different_kinds() -> None:
    """Half of the rows are short and come first: a sequence has both kinds."""
    lengths = numpy.array([60] * 5000 + [300] * 5000, dtype=numpy.int32)
    arrangement = pack_all(lengths, 2048, seed=0)
    shares = [float((arrangement.sequence(index) < 5000).mean()) for index in range(len(arrangement))]
    assert 0.4 < numpy.mean(shares) < 0.6
    assert numpy.mean([0 < share < 1 for share in shares]) > 0.95


def test_the_tightest_room_is_taken() -> None:
    """Rows of 40 and 50 exceed half a sequence: each has one when the row of 10 comes."""
    assert sorted(map(sorted, packed([40, 50, 10]))) == [[0], [1, 2]]


def test_a_million_rows_are_packed() -> None:
    lengths = mixed(1_000_000, "chat")
    arrangement = pack_all(lengths, 2048, seed=0)
    assert numpy.array_equal(numpy.sort(arrangement.rows), numpy.arange(1_000_000))
    assert lengths.sum(dtype=numpy.int64) / (len(arrangement) * 2048) >= 0.99


@pytest.mark.parametrize("length", [0, 65])
def test_a_row_that_fits_no_sequence_is_rejected(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens: must be from 1 to 64"):
        packed([3, length])


def test_without_packing_each_row_is_a_sequence() -> None:
    assert as_lists(one_row_each(numpy.array([4, 1, 2]))) == [[4], [1], [2]]


def test_only_the_used_rows_are_packed() -> None:
    used = numpy.array([7, 2, 5])
    assert sorted(map(sorted, as_lists(pack(used, numpy.array([40, 50, 10], dtype=numpy.int32), CAPACITY, 0)))) == [
        [2, 5],
        [7],
    ]
