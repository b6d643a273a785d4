"""Packing: no row is lost, none is cut, and little room is wasted."""

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.packing import pack

CAPACITY = 64
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=200)


@given(LENGTHS)
def test_every_row_is_in_exactly_one_sequence_that_it_fits(lengths: list[int]) -> None:
    sequences = pack(lengths, CAPACITY)
    assert sorted(row for sequence in sequences for row in sequence) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in sequence) <= CAPACITY for sequence in sequences)


@given(LENGTHS)
def test_no_two_sequences_would_fit_into_one(lengths: list[int]) -> None:
    totals = sorted(sum(lengths[row] for row in sequence) for sequence in pack(lengths, CAPACITY))
    assert len(totals) < 2 or totals[0] + totals[1] > CAPACITY


@given(st.lists(st.sets(st.integers(1, CAPACITY - 1), max_size=8), min_size=1, max_size=40), st.randoms())
def test_rows_cut_from_full_sequences_need_hardly_more(cuts: list[set[int]], random: Random) -> None:
    edges = [[0, *sorted(inner), CAPACITY] for inner in cuts]
    lengths = [end - start for row in edges for start, end in itertools.pairwise(row)]
    random.shuffle(lengths)
    assert len(pack(lengths, CAPACITY)) <= 11 / 9 * len(cuts) + 4


@given(LENGTHS)
def test_the_same_rows_give_the_same_sequences(lengths: list[int]) -> None:
    assert pack(lengths, CAPACITY) == pack(list(lengths), CAPACITY)


def test_the_tightest_room_is_taken() -> None:
    assert pack([40, 50, 10], 64) == [[1, 2], [0]]


@pytest.mark.parametrize("length", [0, 65])
def test_a_row_that_fits_nowhere_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens: must be from 1 to 64"):
        pack([3, length], CAPACITY)
