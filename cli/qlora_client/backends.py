"""Where the Python client's jobs run: what a backend does, and the one for a cluster."""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.status import StepName
from qlora_client.files.adapter import download_adapter
from qlora_client.history import LossHistory, read_histories
from qlora_client.jobs.events import Event, events_of
from qlora_client.jobs.job import Job
from qlora_client.jobs.logs import read_logs
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.resources import JOBS

_LOGGER = logging.getLogger("qlora_client")


class BackendConfig(BaseModel):
    """Where jobs run."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClusterBackendConfig(BackendConfig):
    """A cluster with the operator, reached as kubectl reaches it.

    Attributes:
        namespace: Namespace of the jobs; that of the context if not set.
        context: Context of the kubeconfig; the current one if not set.
        config_file: The kubeconfig; as kubectl finds it if not set. In a pod without one, its service account.
    """

    namespace: str | None = None
    context: str | None = None
    config_file: Path | str | None = None


class Backend(Protocol):
    """What differs between a cluster and this machine. Methods raise ClusterError, and OSError for local files."""

    def create(self, body: dict[str, Any]) -> None:
        """Create the job with this manifest."""

    def get(self, name: str) -> Job:
        """One job. Raises MissingError."""

    def find(self) -> list[Job]:
        """All jobs."""

    def logs(self, name: str, steps: Collection[StepName], *, follow: bool) -> Iterator[str]:
        """The lines that the steps print."""

    def events(self, job: Job) -> list[Event]:
        """What has happened to the job, oldest first."""

    def delete(self, job: Job) -> None:
        """Stop the job and forget it."""

    def download(self, job: Job, target: Path) -> None:
        """Copy the verified adapter into the folder."""

    def histories(self, jobs: Sequence[Job]) -> Mapping[str, LossHistory]:
        """The losses of the jobs, by name."""

    def model_config(self, spec: QLoRAJobSpec) -> Path | None:
        """The config.json of the job's model, if it is on this machine."""


@dataclass(frozen=True)
class ClusterBackend:
    """A namespace of a cluster."""

    cluster: Cluster

    @classmethod
    def of(cls, config: ClusterBackendConfig) -> "ClusterBackend":
        """Nothing is sent yet. Raises ClusterError if the kubeconfig cannot be used."""
        file = None if config.config_file is None else str(config.config_file)
        warn = _LOGGER.warning
        return cls(Cluster.connect(context=config.context, namespace=config.namespace, kubeconfig=file, warn=warn))

    def create(self, body: dict[str, Any]) -> None:
        """As the protocol says."""
        self.cluster.create(JOBS, body)

    def get(self, name: str) -> Job:
        """As the protocol says."""
        return Job(self.cluster.get(JOBS, name))

    def find(self) -> list[Job]:
        """As the protocol says."""
        return list(map(Job, self.cluster.find(JOBS)))

    def logs(self, name: str, steps: Collection[StepName], *, follow: bool) -> Iterator[str]:
        """As the protocol says; with `follow` also of pods that are yet to come."""
        return (line.text for line in read_logs(self.cluster, name, steps, follow=follow, say=_LOGGER.info))

    def events(self, job: Job) -> list[Event]:
        """As the protocol says; a cluster keeps them for an hour or so."""
        return events_of(self.cluster, job.uid)

    def delete(self, job: Job) -> None:
        """As the protocol says."""
        self.cluster.delete(JOBS, job.name, job.uid)

    def download(self, job: Job, target: Path) -> None:
        """As the protocol says."""
        download_adapter(self.cluster, job, target, say=_LOGGER.info)

    def histories(self, jobs: Sequence[Job]) -> Mapping[str, LossHistory]:
        """As the protocol says, as far as the logs and the workspaces have them."""
        return read_histories(self.cluster, jobs, _LOGGER.info)

    def model_config(self, spec: QLoRAJobSpec) -> Path | None:
        """None: it is in the cluster or on a hub."""
        return None
