"""A log whose connection ends is read on where it was: no line is lost, and none comes twice."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from qlora_api.contract import TRAINER_CONTAINER
from qlora_client.history import add_loss
from qlora_client.jobs.logs import _Place
from qlora_client.jobs.pods import CONTAINER
from qlora_client.kube.cluster import LogEntry

BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@given(
    steps=st.lists(st.sampled_from([0, 0, 1, 400_000, 1_000_000, 2_500_000]), max_size=30),
    ends=st.lists(st.integers(0, 30), max_size=4),
)
def test_each_line_comes_once_wherever_the_connection_ends(steps: list[int], ends: list[int]) -> None:
    """`steps`: microseconds between lines. `ends`: lines before each end."""
    time, entries = BEGIN, []
    for number, step in enumerate(steps):
        time += timedelta(microseconds=step)
        entries.append(LogEntry(time, str(number)))
    place, read = _Place(), []
    for end in [*sorted(ends), len(entries)]:
        since = place.time.replace(microsecond=0) if place.time else BEGIN
        read += [entry.text for entry in place.new(each for each in entries[:end] if each.time >= since)]
    assert read == [str(number) for number in range(len(entries))]


def test_a_run_that_resumes_drops_the_losses_after_its_checkpoint() -> None:
    losses: dict[int, float] = {}
    for step, loss in [(0, 9.0), (10, 3.0), (20, 2.0), (30, 1.9), (15, 2.5), (20, None), (25, 2.2)]:
        add_loss(losses, step, loss)
    assert losses == {10: 3.0, 15: 2.5, 25: 2.2}


def test_the_container_is_that_of_the_contract() -> None:
    assert CONTAINER == TRAINER_CONTAINER
