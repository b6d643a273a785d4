"""The pod that reads a claim for a user: its manifest, and the reasons why it does not start; pure."""

from collections.abc import Sequence

from qlora_api.naming import JOB_LABEL
from qlora_api.spec.job import API_VERSION, KIND
from qlora_client.jobs.job import Job
from qlora_client.jobs.pods import CONTAINER, Pod
from qlora_client.kube.cluster import Object

MOUNT = "/volume"
# It copies files and does nothing else. Limits of CPU too, as some quotas ask for them.
_RESOURCES = {"requests": {"cpu": "100m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "256Mi"}}
_UNDISTURBED = {"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}
# Reasons of a waiting container that more time does not fix.
_HOPELESS = (
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
)


def reader_pod(job: Job, profile: Object, claim: str, seconds: int) -> Object:
    """A pod that has the claim at MOUNT, read-only, does nothing, and is ended by the kubelet after `seconds`.

    It is as restricted as the job's own pods: their image, user, nodes and name of the container, no token of a service
    account, and the label that NetworkPolicies for pods of jobs select. It is deleted with the job,
    if it is left over.
    """
    spec: Object = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": 0,
        "securityContext": _identity(profile.get("runAs")),
        "containers": [_container(profile, seconds)],
        "volumes": [{"name": "volume", "persistentVolumeClaim": {"claimName": claim}}],
    }
    optional = {
        "serviceAccountName": profile.get("serviceAccountName"),
        "imagePullSecrets": [{"name": name} for name in profile.get("imagePullSecrets") or ()],
        **_placement(job, profile),
    }
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid, "blockOwnerDeletion": False}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": f"{job.name}-reader-",
            "labels": {
                "app.kubernetes.io/name": "qlora-reader",
                "app.kubernetes.io/part-of": "qlora",
                JOB_LABEL: job.name,
            },
            "annotations": _UNDISTURBED,
            "ownerReferences": [owner],
        },
        "spec": spec | {key: value for key, value in optional.items() if value},
    }


def _container(profile: Object, seconds: int) -> Object:
    return {
        "name": CONTAINER,
        "image": profile["image"],
        "imagePullPolicy": profile.get("imagePullPolicy", "IfNotPresent"),
        "command": ["sleep", str(seconds)],
        "resources": _RESOURCES,
        "volumeMounts": [{"name": "volume", "mountPath": MOUNT, "readOnly": True}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _identity(run_as: Object | None) -> Object:
    """Return user and groups, for the job's files, or leave them to the platform."""
    security: Object = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if run_as is None:
        return security
    return security | {
        "runAsUser": run_as["user"],
        "runAsGroup": run_as["group"],
        "fsGroup": run_as["fsGroup"],
        "fsGroupChangePolicy": "OnRootMismatch",
    }


def _placement(job: Job, profile: Object) -> Object:
    """Where the volume can be mounted: on any node, or where the job's pods ran."""
    if (profile.get("workspace") or {}).get("topology") == "shared":
        return {}
    asked: Object = job.spec.get("scheduling") or {}
    tolerations = [*(profile.get("tolerations") or ()), *(asked.get("tolerations") or ())]
    if gpu := profile.get("gpuResource"):
        tolerations.append({"key": gpu, "operator": "Exists", "effect": "NoSchedule"})
    return {
        "nodeSelector": {**(asked.get("nodeSelector") or {}), **(profile.get("nodeSelector") or {})},
        "tolerations": tolerations,
    }


def is_running(pod: Object) -> bool:
    """Whether files can be read through it."""
    return bool((pod.get("status") or {}).get("phase") == "Running" and Pod(pod).has_log)


def failure_of_start(pod: Object) -> str:
    """Why waiting longer does not help; empty if it may."""
    status: Object = pod.get("status") or {}
    if status.get("phase") in ("Failed", "Succeeded"):
        told = ": ".join(str(status[key]) for key in ("reason", "message") if status.get(key))
        return f"it has ended ({told or status['phase']})"
    reason = Pod(pod).waits_for
    return reason if reason.startswith(_HOPELESS) else ""


def why_not_started(pod: Object, warnings: Sequence[str], seconds: float) -> str:
    """Return the sentence for a pod that has not started in time.

    `warnings`: messages of its Events, oldest first.
    """
    reason = failure_of_start(pod) or Pod(pod).waits_for or (warnings[-1] if warnings else "nothing says why")
    more = f"; {warnings[-1]}" if warnings and warnings[-1] not in reason else ""
    return f"the pod that reads the claim did not start within {seconds:.0f} s: {reason}{more}"
