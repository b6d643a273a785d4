"""A sweep of a cluster, from Python."""

from collections.abc import Callable, Collection

from qlora_api.naming import SWEEP_LABEL
from qlora_api.sweep.spec import BEST_SUFFIX
from qlora_client.client_types import Comparison, QLoRASweep
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError
from qlora_client.kube.resources import JOBS, SWEEPS
from qlora_client.waiting import Clock, Wait


class Sweep:
    """A QLoRASweep of the cluster, with the attribute `name`; `sweep` and `get_sweep` of QLoRAClient return it."""

    def __init__(self, name: str, cluster: Cluster, clock: Clock, compare: Callable[..., Comparison]) -> None:
        self.name = name
        self._cluster, self._clock, self._compare = cluster, clock, compare

    def get(self) -> QLoRASweep:
        """The sweep now: its phase, its cells, and the best of them.

        Raises:
            RuntimeError: It is deleted, or cannot be read.
        """
        return QLoRASweep.of(Job(self._cluster.get(SWEEPS, self.name)))

    def wait(
        self,
        timeout: float = 600,
        polling_interval: float = 2,
        callbacks: Collection[Callable[[QLoRASweep], None]] | None = None,
    ) -> QLoRASweep:
        """Wait until the sweep has succeeded, and return it.

        Args:
            timeout: For how many seconds to wait.
            polling_interval: Seconds between two reads. A cluster that cannot be reached is retried.
            callbacks: Called with the sweep at each read.

        Raises:
            ValueError: Seconds that make no sense.
            TimeoutError: It has not ended in time.
            RuntimeError: It has failed, or is deleted.
        """
        return Wait(timeout, polling_interval).follow(self.name, self.get, callbacks, self._clock)

    def compare(self) -> Comparison:
        """The cells side by side, as `QLoRAClient.compare` shows jobs.

        Raises:
            RuntimeError: No cell has been created yet, or one cannot be read.
        """
        jobs = [job["metadata"]["name"] for job in self._cluster.find(JOBS, selector=f"{SWEEP_LABEL}={self.name}")]
        cells = sorted(name for name in jobs if not name.endswith(BEST_SUFFIX))
        if not cells:
            raise ClusterError(f"{self.name} has no cells yet: it is {self.get().phase}")
        return self._compare(*cells)
