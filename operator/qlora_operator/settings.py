"""Reads the administrator's settings from a YAML file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora_api.kubernetes_values import DNS_LABEL
from qlora_api.schema import ApiModel
from qlora_operator.decisions.manifests.network import JobNetworkPolicies, Port
from qlora_operator.metrics.jobs import DEFAULT_RUNNING_JOBS, SERIES_PER_RUNNING_JOB
from qlora_operator.metrics.transitions import DEFAULT_NAMESPACES, OTHER_NAMESPACES

ENV_SETTINGS = "QLORA_OPERATOR_SETTINGS"
READS_PER_SECOND = 125
SECONDS_BETWEEN_PASSES = 2.0
"""Of a sweep: cells change their status in these seconds one after the other, and one pass covers them."""

Name = Annotated[str, Field(min_length=1, max_length=63, pattern=DNS_LABEL)]

# The errors of the YAML library for a value that does not match its tag, or for bytes that are not text.
_UNUSABLE_VALUES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class SettingsError(Exception):
    """The settings are invalid: the message has field, value and the allowed ones."""


class ProgressSettings(ApiModel):
    """Progress from the logs of running pods."""

    enabled: bool = Field(
        True, description="Read progress from the logs of pods. If false, progress is shown only when training ends."
    )
    reads_per_second: int = Field(
        READS_PER_SECOND,
        ge=1,
        le=1000,
        description="Logs that are read per second, at most. Each running job is read every ten seconds, or less often "
        "if these do not suffice: 125 read each of 2,000 jobs every 16 seconds.",
    )


class MetricsSettings(ApiModel):
    """What the metrics show."""

    running_jobs: int = Field(
        DEFAULT_RUNNING_JOBS,
        ge=0,
        le=10_000,
        description="Running jobs that have metrics of their own, with their namespace and name as labels: at most "
        f"{SERIES_PER_RUNNING_JOB} series each. With more of them, those with the earliest startTime; none if 0.",
    )
    namespaces: int = Field(
        DEFAULT_NAMESPACES,
        ge=0,
        le=10_000,
        description="Namespaces that are labels of the histograms of jobs. With more of them, those whose jobs change "
        f"first after the operator's start; the rest are {OTHER_NAMESPACES}.",
    )


class LeaderElectionSettings(ApiModel):
    """Which of several operators works: the one that holds a Lease."""

    enabled: bool | None = Field(
        None, description="Work only while this operator holds the Lease. If not set: in a pod, and nowhere else."
    )
    namespace: Name | None = Field(None, description="Namespace of the Lease; that of the operator's pod if not set.")
    lease_name: Name = Field("qlora-operator", description="Name of the Lease.")
    lease_duration_seconds: int = Field(
        12,
        ge=3,
        le=300,
        description="Seconds after which another operator takes over from one that has ended without giving up the "
        "Lease. The leader stops its work after two thirds of it without a renewal. An answer of the API server may "
        "take a sixth of it.",
    )


class Settings(ApiModel):
    """The administrator's settings of the operator."""

    namespaces: tuple[Name, ...] = Field((), description="Namespaces to serve; all if empty.")
    progress: ProgressSettings = Field(ProgressSettings(), description="Progress of running jobs.")
    metrics: MetricsSettings = Field(MetricsSettings(), description="What the metrics show.")
    resync_seconds: float = Field(
        300,
        ge=1,
        le=86_400,
        description="Seconds between full resyncs, which reconcile every job in case an event was lost.",
    )
    watch_silence_seconds: float = Field(
        75,
        ge=5,
        le=300,
        description="Seconds of silence after which a watch is connected again. The API server sends something every "
        "minute, so that only a broken connection is silent for longer.",
    )
    leader_election: LeaderElectionSettings = Field(
        LeaderElectionSettings(), description="Election of the operator that works, if several run."
    )
    job_network_policies: JobNetworkPolicies = Field(
        JobNetworkPolicies(), description="NetworkPolicies for the pods of jobs."
    )
    workers: int = Field(
        16,
        ge=1,
        le=64,
        description="Number of jobs that are reconciled at the same time; of one namespace, at most 7 in 8 of them, "
        "unless it is the only one that the operator serves.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Log level.")
    probe_port: Port = Field(8080, description="Port of /healthz and /readyz.")
    metrics_port: Port = Field(9090, description="Port of /metrics.")


SettingsModel = TypeVar("SettingsModel", bound=ApiModel)


def find_settings(
    argument: Path | None, environ: Mapping[str, str] = os.environ, *, variable: str = ENV_SETTINGS
) -> Path:
    """Find the settings file: from the command line, else from the environment's variable.

    Raises SettingsError without either.
    """
    if argument is not None:
        return argument
    if path := environ.get(variable):
        return Path(path)
    raise SettingsError(f"no settings file: give --settings FILE, or set {variable}")


def load_settings(path: Path) -> Settings:
    """The operator's settings in the file. Raises SettingsError with the fields that are wrong."""
    return read_settings(path, Settings)


def read_settings(path: Path, model: type[SettingsModel]) -> SettingsModel:
    """The settings in the file. Raises SettingsError with the fields that are wrong."""
    try:
        content = YAML(typ="safe").load(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except (YAMLError, RecursionError, *_UNUSABLE_VALUES) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    try:
        return model.model_validate(content if content is not None else {})
    except ValidationError as error:
        raise SettingsError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'the file'}: {problem['msg']}{_found(problem['input'])}"
        for problem in error.errors(include_url=False)
    )


def _found(value: object) -> str:
    # A number with thousands of digits has no decimal text in Python.
    shown = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 10**20)
    return f" (found {value!r})" if shown else ""
