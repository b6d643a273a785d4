"""Posts Events, which only explain: nothing waits for one, or fails without it."""

import logging

from qlora_operator.decisions.observed.objects import Object
from qlora_operator.keys import Key
from qlora_operator.kube.client import Cluster
from qlora_operator.kube.errors import AlreadyExistsError, ClusterError

logger = logging.getLogger(__name__)


async def post(cluster: Cluster, key: Key, event: Object) -> None:
    """Post the Event about that object, unless it exists, and log a failure."""
    try:
        await cluster.create_event(key[0], event)
    except AlreadyExistsError:
        logger.debug("this Event exists already", extra={"key": key})
    except ClusterError as error:
        logger.warning("an Event cannot be posted: %s", error, extra={"key": key})
