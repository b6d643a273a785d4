"""The results of the Python client: jobs, plans and comparisons as typed values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from typing import Self, TypeVar

from pydantic import BaseModel, ValidationError

from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import MemoryStatus, Phase, QLoRAJobStatus
from qlora_api.sweep.spec import QLoRASweepSpec
from qlora_api.sweep.status import QLoRASweepStatus, SweepPhase
from qlora_api.usage import ForecastStatus
from qlora_client.comparison import Row
from qlora_client.history import LossHistory
from qlora_client.jobs.job import Job
from qlora_client.kube.errors import ClusterError

Spec = TypeVar("Spec", bound=BaseModel)
Status = TypeVar("Status", bound=BaseModel)


@dataclass(frozen=True)
class QLoRAJob:
    """A job at one moment."""

    name: str
    namespace: str
    uid: str
    """It differs from that of a deleted job of the same name."""
    created: datetime
    phase: Phase
    """The phase; Pending before the operator has seen the job."""
    message: str
    """The reason why it waits, runs or has failed."""
    spec: QLoRAJobSpec
    """The user's spec, with the schema's defaults."""
    status: QLoRAJobStatus
    """The operator's report: progress, memory, usage, adapter and more."""

    @classmethod
    def of(cls, job: Job) -> Self:
        """Return the job as the cluster stores it.

        Raises RuntimeError if it has values of a newer version.
        """
        spec, status = _read(job, QLoRAJobSpec, QLoRAJobStatus)
        phase = status.phase or "Pending"
        return cls(job.name, job.namespace, job.uid, job.created, phase, job.message, spec, status)

    @property
    def ended(self) -> bool:
        """Whether it has ended; only a retry starts it again."""
        return self.phase in ("Succeeded", "Failed")


@dataclass(frozen=True)
class QLoRASweep:
    """A sweep at one moment."""

    name: str
    namespace: str
    uid: str
    """It differs from that of a deleted sweep of the same name."""
    created: datetime
    phase: SweepPhase
    """The phase; Pending before the operator has seen the sweep."""
    message: str
    """The reason why it waits, runs or has failed."""
    spec: QLoRASweepSpec
    """The user's spec, with the schema's defaults."""
    status: QLoRASweepStatus
    """The operator's report: cells, the best of them, usage and more."""

    @classmethod
    def of(cls, sweep: Job) -> Self:
        """Return the sweep, whose object is built like that of a job.

        Raises RuntimeError if it has values of a newer version.
        """
        spec, status = _read(sweep, QLoRASweepSpec, QLoRASweepStatus)
        phase = status.phase or "Pending"
        return cls(sweep.name, sweep.namespace, sweep.uid, sweep.created, phase, sweep.message, spec, status)

    @property
    def ended(self) -> bool:
        """Whether it has ended; only a retry of a cell starts it again."""
        return self.phase in ("Succeeded", "Failed")


def _read(job: Job, of_spec: type[Spec], of_status: type[Status]) -> tuple[Spec, Status]:
    try:
        # Fields of a newer version are ignored, as with other clients of the API.
        spec = of_spec.model_validate(job.spec, extra="ignore")
        # Set here too: the profile in a job's status forbids unknown fields.
        return spec, of_status.model_validate({"phase": "Pending", **job.status}, extra="ignore")
    except ValidationError as error:
        [first, *_] = error.errors(include_url=False)
        field = ".".join(map(str, first["loc"]))
        what = f"{job.name} has a {field or 'spec'} that this version of the client cannot read"
        raise ClusterError(f"{what} ({first['msg']}): upgrade it") from None


@dataclass(frozen=True)
class Plan:
    """The expected needs of a job."""

    memory: MemoryStatus
    """The estimate; its verdict is `unknown` if spec.resources.gpuMemory is not set."""
    objection: str | None
    """Why the job cannot run, with the setting to change first; None if it can, or if that is unknown."""
    forecast: ForecastStatus | None
    """GPU hours, and their cost if a price is given; None if they are unknown."""
    wall_seconds: tuple[float, float] | None
    """The shortest and the longest time that the job's GPUs are expected to take, with the forecast."""
    remark: str
    """Why there is no forecast, or what it leaves out, and what the plan assumes of config and pod."""


@dataclass(frozen=True)
class Comparison:
    """Jobs side by side. Shown as a table in a notebook, and as text by `print`."""

    names: tuple[str, ...]
    settings: tuple[Row, ...]
    """The fields of the spec, by their paths, that are not the same in all jobs."""
    results: tuple[Row, ...]
    """The results of each: phase, losses, speed, memory, GPU hours."""
    histories: Mapping[str, LossHistory]
    """Losses by optimizer step, by the jobs' names."""

    def _lines(self) -> Iterator[Sequence[str]]:
        yield ("", *self.names)
        for row in (*self.settings, *self.results):
            yield (row.label, *row.values)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self._lines(), strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in self._lines())

    def _repr_html_(self) -> str:
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in line) for line in self._lines())
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
