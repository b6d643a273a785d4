"""Publishes the adapter: verified, described, and written where it belongs, whole or not at all."""

from collections.abc import Callable
from datetime import datetime

from qlora_trainer.records import PublishRecord, RecordWriter
from qlora_trainer.step import StepContext


def publish(context: StepContext, records: RecordWriter, *, now: Callable[[], datetime]) -> PublishRecord:
    """Verify the trained adapter, write the report and publish to the destination. `now` gives the time for records.

    Returns at once if the completion record matches and the files at the destination are still what it says.
    Raises StepFailure.
    """
    raise NotImplementedError
