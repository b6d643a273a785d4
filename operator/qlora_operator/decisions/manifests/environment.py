"""Decides the environment of a step: settings, the network, trackers, cloud identity and cache."""

from typing import Any

from qlora_api import contract
from qlora_api.connections import TrackingServers
from qlora_api.naming import CLOUD_IDENTITY_LABEL, ONE_NODE_LABEL, child_job_name, node_host
from qlora_api.profile import Profile
from qlora_api.status import Resolved, StepName
from qlora_operator.decisions.manifests.volumes import uses_benchmarks, uses_cache
from qlora_operator.decisions.observed.objects import QLoRAJob

Manifest = dict[str, Any]
_SECRET_MODE = 0o440


def network_environment(profile: Profile) -> dict[str, str]:
    """Return environment variables for the proxy and the certificates.

    The names are those that all client libraries read.
    """
    authority, secret = profile.ca_config_map, profile.proxy_secret_name
    values = {
        contract.ENV_CA_FILE: str(contract.CA_MOUNT / authority.name / authority.key) if authority else None,
        "HTTPS_PROXY": profile.https_proxy,
        "NO_PROXY": ",".join(profile.no_proxy or ()),
        contract.ENV_PROXY_SECRET: str(contract.PROXY_MOUNT / secret) if secret else None,
    }
    return {name: value for name, value in values.items() if value}


def network_volumes(profile: Profile) -> tuple[list[Manifest], list[Manifest]]:
    """Return `volumeMounts` and `volumes` of certificates and proxy credentials.

    As long as the ConfigMap or the Secret does not exist the pod waits, which costs no retry.
    """
    mounts: list[Manifest] = []
    volumes: list[Manifest] = []
    if (authority := profile.ca_config_map) is not None:
        mounts.append(_mount("ca", str(contract.CA_MOUNT / authority.name)))
        items = [{"key": authority.key, "path": authority.key}]
        volumes.append({"name": "ca", "configMap": {"name": authority.name, "items": items}})
    if (name := profile.proxy_secret_name) is not None:
        mounts.append(_mount("proxy", str(contract.PROXY_MOUNT / name)))
        items = [{"key": key, "path": key} for key in contract.PROXY_KEYS]
        volumes.append({"name": "proxy", "secret": {"secretName": name, "items": items, "defaultMode": _SECRET_MODE}})
    return mounts, volumes


def _mount(volume: str, path: str) -> Manifest:
    return {"name": volume, "mountPath": path, "readOnly": True}


_WITH_IDENTITY = ("prepare", "publish")
# Azure's webhook adds a token to pods with this label. Those of the other clouds use the account.
_OF_PROVIDER = {"azure": {"azure.workload.identity/use": "true"}}


def cloud_environment(profile: Profile) -> dict[str, str | None]:
    """Return environment variables for a step that uses object stores.

    They have the stores' addresses, and whether there is an identity.
    """
    google, azure, identity = profile.google_storage, profile.azure_storage, profile.cloud_identity
    return {
        "GOOGLE_BASE_URL": google.endpoint if google else None,
        "AZURE_STORAGE_ACCOUNT_NAME": azure.account if azure else None,
        "AZURE_STORAGE_ENDPOINT": azure.endpoint if azure else None,
        contract.ENV_CLOUD_IDENTITY: identity.provider if identity else None,
    }


def service_account_name(profile: Profile, step: StepName) -> str | None:
    """Return the ServiceAccount of a step's pod, or None for the namespace's default."""
    if profile.cloud_identity is not None and step in _WITH_IDENTITY:
        return profile.cloud_identity.service_account_name
    return profile.service_account_name


def identity_labels(profile: Profile, step: StepName) -> dict[str, str]:
    """Return the labels of a pod with an identity.

    NetworkPolicies and the cloud's webhook select by them.
    """
    identity = profile.cloud_identity
    if identity is None or step not in _WITH_IDENTITY:
        return {}
    return {CLOUD_IDENTITY_LABEL: identity.provider} | _OF_PROVIDER.get(identity.provider, {})


def one_node_labels(job: QLoRAJob, profile: Profile) -> dict[str, str]:
    """Return the label of pods that must run on one node, empty for all others.

    That are those of cells that one pod trains: they are prepared at the same time, and a zonal volume is attached to
    one node at a time.
    """
    together = job.cells_in_pod > 1 and profile.workspace.topology == "zonal"
    return {ONE_NODE_LABEL: job.shares} if together and job.shares is not None else {}


def node_count(job: QLoRAJob, step: StepName) -> int:
    """Pods of the step's Job."""
    return job.spec.resources.node_count if step == "train" else 1


def step_environment(job: QLoRAJob, resolved: Resolved, step: StepName, attempt: int) -> list[Manifest]:
    """Return the environment variables of a step's container."""
    values = {
        "HOME": "/tmp",  # noqa: S108 - the one folder outside the workspace that a pod can write to
        contract.ENV_ATTEMPT: str(attempt),
        contract.ENV_CONTRACT_VERSION: str(resolved.contract_version),
        contract.ENV_DEVICE: resolved.profile.device,
        contract.ENV_OUTPUT_CLAIM: resolved.claim_name,
    }
    if step in ("prepare", "publish"):
        values |= _servers(resolved.profile) | network_environment(resolved.profile)
    if step == "publish":
        values |= _of_publish(resolved.profile)
    values |= _model_cache(job, resolved, step)
    if (evaluation := resolved.profile.evaluation) is not None and uses_benchmarks(job.spec, step):
        values[contract.ENV_BENCHMARKS] = str(contract.BENCHMARKS_MOUNT / (evaluation.path or ""))
        values[contract.ENV_BENCHMARKS_SHA256] = evaluation.sha256
    # Not the job that publishes the best cell: that cell is on the page already.
    writes_report = step in ("train", "publish") and job.spec.continues is None
    if (step == "prepare" or writes_report) and resolved.shared_path is not None:
        values[contract.ENV_SWEEP_FOLDER] = str(contract.WORKSPACE_MOUNT / resolved.shared_path)
    if step == "prepare" and job.cells_in_pod > 1:
        values[contract.ENV_GROUP_SIZE] = str(job.cells_in_pod)
    if step == "publish" and resolved.profile.gpu_resource and resolved.profile.gpu_hour_price:
        values[contract.ENV_GPU_HOUR_PRICE] = f"{resolved.profile.gpu_hour_price} {resolved.profile.currency}"
    if step == "train" and job.rungs:
        values[contract.ENV_RUNGS] = job.rungs
    if step == "train" and job.spec.resources.gpu_count > 1:
        values |= resolved.profile.nccl or {}
    if node_count(job, step) > 1:
        child = child_job_name(job.name, step, attempt)
        values[contract.ENV_RENDEZVOUS] = f"{node_host(child, 0, job.uid)}:{contract.RENDEZVOUS_PORT}"
        wait = resolved.profile.node_wait_seconds or contract.DEFAULT_NODE_WAIT_SECONDS
        values[contract.ENV_NODE_WAIT] = str(wait)
    if step == "train" and resolved.profile.device == "cpu":
        values["LD_PRELOAD"] = contract.CPU_ALLOCATOR
    pod_uid = {"name": contract.ENV_POD_UID, "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}}
    # As many threads as the pod requests CPUs, rounded up: libraries would start one per core of the node.
    threads = {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}}}
    fields = [pod_uid, threads]
    if node_count(job, step) > 1:
        index = {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
        fields.append({"name": contract.ENV_NODE, "valueFrom": {"fieldRef": index}})
    return [*fields, *({"name": name, "value": value} for name, value in values.items())]


def _model_cache(job: QLoRAJob, resolved: Resolved, step: StepName) -> dict[str, str]:
    """Return where the job shares its base: the cache, or the sweep's common claim."""
    if resolved.profile.model_cache is not None and uses_cache(job.spec, step):
        return {contract.ENV_MODEL_CACHE: str(contract.MODEL_CACHE_MOUNT)}
    if resolved.shared_path is not None and step != "clean":
        return {contract.ENV_MODEL_CACHE: str(contract.WORKSPACE_MOUNT / resolved.shared_path)}
    return {}


def _servers(profile: Profile) -> dict[str, str]:
    """Return the administrator's servers, so that credentials go nowhere else."""
    values: dict[str, str | None] = {
        "HF_ENDPOINT": profile.hub_endpoint,
        "AWS_ENDPOINT_URL": profile.object_store.endpoint,
        "AWS_REGION": profile.object_store.region,
        contract.ENV_REGISTRIES: " ".join(profile.registries),
        **cloud_environment(profile),
    }
    return {name: value for name, value in values.items() if value}


def _of_publish(profile: Profile) -> dict[str, str]:
    """The image, for the lineage, and the servers of trackers."""
    tracking = profile.tracking or TrackingServers()
    values = {
        contract.ENV_IMAGE: profile.image,
        contract.ENV_MLFLOW_SERVER: tracking.mlflow and tracking.mlflow.url,
        contract.ENV_WANDB_SERVER: tracking.wandb and tracking.wandb.url,
    }
    return {name: value for name, value in values.items() if value}
