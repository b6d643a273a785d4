"""The GPU tests are skipped where a GPU is missing, too old or too small, and say so."""

import pytest

from tests.gpu.cards import Card, lacking

T4 = Card("Tesla T4", (7, 5), 14.6)
A10 = Card("NVIDIA A10", (8, 6), 22.1)
H100 = Card("NVIDIA H100", (9, 0), 79.1)


@pytest.mark.parametrize(
    ("cards", "wanted", "gib"), [((A10,), 1, 0), ((H100,), 1, 44), ((H100, A10), 2, 8), ((H100, T4), 1, 44)]
)
def test_a_test_runs_where_there_is_all_that_it_needs(cards: tuple[Card, ...], wanted: int, gib: float) -> None:
    assert lacking(cards, wanted, gib) is None


@pytest.mark.parametrize(
    ("cards", "wanted", "gib", "reason"),
    [
        ((), 1, 0, "needs 1 CUDA GPU of compute capability 8.0 (bfloat16) or later, this machine has none"),
        ((T4,), 1, 0, "8.0 (bfloat16) or later, this machine has Tesla T4 (14.6 GiB, capability 7.5)"),
        # A run takes the first GPU.
        ((T4, H100), 1, 0, "this machine has Tesla T4 (14.6 GiB, capability 7.5), NVIDIA H100"),
        ((A10,), 1, 44, "and at least 44 GiB, this machine has NVIDIA A10 (22.1 GiB, capability 8.6)"),
        ((H100,), 2, 8, "needs 2 CUDA GPUs of compute capability 8.0"),
    ],
)
def test_a_test_is_skipped_for_a_reason_that_names_what_is_needed_and_what_there_is(
    cards: tuple[Card, ...], wanted: int, gib: float, reason: str
) -> None:
    assert reason in (lacking(cards, wanted, gib) or "")
