"""Reads and changes the ConfigMap with the records of a namespace's channels."""

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_api.channel import CHANNELS_LABEL
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import MissingError, RejectedError
from qlora_client.kube.resources import CONFIG_MAPS


@dataclass(frozen=True)
class ChannelMap:
    """The ConfigMap as it was read."""

    name: str
    version: str | None
    """Its resourceVersion; None if it does not exist."""
    records: Mapping[str, str]
    """By the key of the channel."""


def read_channel_map(cluster: Cluster, name: str) -> ChannelMap:
    """Read the ConfigMap. Raises ClusterError, also for one that is not labeled as one of channels."""
    try:
        body = cluster.get(CONFIG_MAPS, name)
    except MissingError:
        return ChannelMap(name, None, {})
    if (body["metadata"].get("labels") or {}).get(CHANNELS_LABEL) != "true":
        raise RejectedError(
            f'the ConfigMap {name} has no label {CHANNELS_LABEL}: "true", so it is not one of channels: name another '
            "with --config-map, or label it"
        )
    return ChannelMap(name, body["metadata"]["resourceVersion"], body.get("data") or {})


def write_record(cluster: Cluster, found: ChannelMap, key: str, record: str) -> None:
    """Set the record. Raises RejectedError if the ConfigMap was changed after it was read."""
    if found.version is None:
        metadata = {"name": found.name, "labels": {CHANNELS_LABEL: "true"}}
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {key: record}}
        cluster.create(CONFIG_MAPS, body)
    else:
        change = {"metadata": {"resourceVersion": found.version}, "data": {key: record}}
        cluster.merge(CONFIG_MAPS, found.name, change)
