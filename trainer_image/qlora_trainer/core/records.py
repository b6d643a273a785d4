"""Writes records to standard output: redacted, progress every five seconds."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from qlora_api.artifact_status import GateStatus
from qlora_api.contract import MIN_SECONDS_BETWEEN_PROGRESS, ProgressRecord, Record, ResultRecord, encode_record
from qlora_api.sources import SCHEMES
from qlora_api.status import DatasetStatus, MemoryStatus
from qlora_trainer.core.completion import TrainRecord

# Passwords in addresses, tokens of clouds (JWT), private keys, credentials in headers and those of the stores: never in
# a record, whatever a library quotes.
_SECRET = re.compile(
    "|".join(
        (
            r"(?<=://)[^/\s@]+(?=@)",
            r"eyJ[\w-]{8,}\.[\w-]+\.[\w-]*",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*",
            r"(?i:authorization)[\"']?\s*[:=]\s*[\"']?(?:(?i:basic|bearer|sharedkey)\s+)?[^\s\"']+",
            r"(?i:bearer|authorization)\s+\S+",
            *(pattern for scheme in SCHEMES.values() for pattern in scheme.redacted),
        )
    )
)


def redact(text: str) -> str:
    """The text with [redacted] in place of everything that looks like a credential."""
    return _SECRET.sub("[redacted]", text)


def timestamp(now: datetime) -> str:
    """RFC 3339 in UTC with seconds, as the API server writes it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Findings:
    """A step's findings so far. The result record has them, however the step ends."""

    model_revision: str | None = None
    memory: MemoryStatus | None = None
    dataset: DatasetStatus | None = None
    gate: GateStatus | None = None
    trained: TrainRecord | None = None
    """The finished run that prepare has found."""
    progress: ProgressRecord | None = None
    """The latest, written or not."""


class RecordWriter:
    """Writes a step's records to `stream`, and keeps findings for the result."""

    def __init__(self, stream: TextIO, monotonic: Callable[[], float], *, reports_progress: bool = True) -> None:
        """`monotonic` gives seconds."""
        self._stream = stream
        self._reports_progress = reports_progress
        self._monotonic = monotonic
        self._next_progress = float("-inf")
        self.findings = Findings()

    def beside(self) -> "RecordWriter":
        """A writer on the same stream for another job, with its UID in the records."""
        return RecordWriter(self._stream, self._monotonic, reports_progress=self._reports_progress)

    def note(
        self,
        *,
        model_revision: str | None = None,
        memory: MemoryStatus | None = None,
        dataset: DatasetStatus | None = None,
        gate: GateStatus | None = None,
        trained: TrainRecord | None = None,
    ) -> None:
        """Keep findings, so that the result has them even if the step fails afterwards."""
        self.findings = replace(
            self.findings,
            model_revision=model_revision or self.findings.model_revision,
            memory=memory or self.findings.memory,
            dataset=dataset or self.findings.dataset,
            gate=gate or self.findings.gate,
            trained=trained or self.findings.trained,
        )

    def progress(self, record: ProgressRecord, *, force: bool = False) -> None:
        """Write the record, at most once in five seconds unless `force` is set."""
        self.findings = replace(self.findings, progress=record)
        if not self._reports_progress or (not force and self._monotonic() < self._next_progress):
            return
        self._next_progress = self._monotonic() + MIN_SECONDS_BETWEEN_PROGRESS
        self._write(record)

    def result(self, record: ResultRecord, termination_log: Path | None) -> None:
        """Write the last record, also to the termination log. Raises OSError."""
        try:
            if termination_log is not None:
                termination_log.write_text(encode_record(record))
        finally:
            self._write(record)

    def _write(self, record: Record) -> None:
        self._stream.write(encode_record(record) + "\n")
        self._stream.flush()
