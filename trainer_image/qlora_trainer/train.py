"""Trains the adapter: the loop, from the prepared data and the base model to the trained folder."""

from collections.abc import Callable
from datetime import datetime

from qlora_trainer.failures import StopRequest
from qlora_trainer.records import RecordWriter, TrainRecord
from qlora_trainer.step import StepContext


def train(
    context: StepContext,
    records: RecordWriter,
    *,
    stop: StopRequest,
    now: Callable[[], datetime],
    monotonic: Callable[[], float],
) -> TrainRecord:
    """Train, from the newest checkpoint if there is one, and leave the adapter in `trained/`.

    `now` gives the time for records (with a time zone), `monotonic` seconds for speeds. Returns at once if the
    completion record matches. Raises StepFailure, or Interrupted after saving when `stop` was set.
    """
    raise NotImplementedError
