"""Embeddings and an output layer that two ranks share compute as whole ones do, each rank with half of their bytes."""

from pathlib import Path

import pytest

from tests.support.families import FAMILIES
from tests.support.models.spread import compare
from tests.support.runs.forks import TIMEOUT_S, server


@pytest.mark.parametrize(
    ("family", "counts"),
    [("llama", (13, 21)), ("gemma2", (7, 21)), ("cohere", (0, 9)), ("phi", (5, 0)), ("llama", (0, 0))],
    ids=["whole-chunks", "tied-and-capped", "first-without-targets", "biased", "no-targets"],
)
def test_a_spread_vocabulary_computes_as_a_whole_one(family: str, counts: tuple[int, int], tmp_path: Path) -> None:
    arguments = (FAMILIES[family][0], counts, tmp_path / "store")
    ranks = [server().Process(target=compare, args=(*arguments, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
        process.kill()

    assert [process.exitcode for process in ranks] == [0, 0]
