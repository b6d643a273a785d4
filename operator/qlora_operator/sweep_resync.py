"""Requests every sweep at an interval, so that a lost event only delays it."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from qlora_operator.cluster import Cluster, ClusterError
from qlora_operator.workqueue import Key

logger = logging.getLogger(__name__)

_PAUSE_AFTER_ERROR = 10.0


async def look_at_all_sweeps(
    cluster: Cluster, namespaces: Sequence[str], enqueue: Callable[[Key], None], interval: float
) -> None:
    """Request all sweeps of the namespaces (of the cluster if there are none), now and at each interval.

    Runs until canceled. A list that fails is tried again soon: what has failed is logged once.
    """
    said = ""
    while True:
        pause, problem = interval, ""
        for namespace in namespaces or (None,):
            try:
                for key in await cluster.sweep_names(namespace):
                    enqueue(key)
            except ClusterError as error:
                pause, problem = min(interval, _PAUSE_AFTER_ERROR), str(error)
        if problem and problem != said:
            logger.warning("the sweeps cannot be listed, tried again: %s", problem)
        said = problem
        await asyncio.sleep(pause)
