"""Reads the copy of the profile that a job has started with."""

from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster, Object
from qlora_client.kube.resources import REVISIONS


def profile_of(cluster: Cluster, job: Job) -> Object:
    """Return the profile in the job's ControllerRevision, empty before it has started. Raises ClusterError."""
    name = job.status.get("currentRevision")
    profile: Object = {} if name is None else cluster.get(REVISIONS, str(name))["data"]["profile"]
    return profile
