"""Log records of a step while it works, for any text."""

from datetime import UTC, datetime

import pytest

from qlora_api.contract import MAX_ACTIVITY_LENGTH, MAX_PROGRESS_BYTES
from tests.support.models.tiny import Recorded
from tests.trainer.conftest import MakeContext

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize("character", ["😀", "é", '"', "\n", "a"])
@pytest.mark.parametrize("evaluations", [None, tuple((1_000_000, -1.23456789e-100) for _ in range(8))])
def test_an_activity_is_cut_to_the_size_of_a_record(
    make_context: MakeContext, character: str, evaluations: tuple[tuple[int, float], ...] | None
) -> None:
    """A character has at most twelve bytes in JSON."""
    records = Recorded()
    activity = f"writing to {character * 200}"
    records.progress(make_context().identity.progress("publish", NOW, activity, loss=1.25, evaluations=evaluations))
    [line] = records.stream.getvalue().splitlines()
    [record] = records.written
    assert activity.startswith(record["activity"])
    assert record["activity"].startswith(f"writing to {character}")
    kept = len(record["activity"])
    assert kept == MAX_ACTIVITY_LENGTH or len(line) > MAX_PROGRESS_BYTES - 12
    assert len(line) <= MAX_PROGRESS_BYTES
    assert record["loss"] == 1.25
