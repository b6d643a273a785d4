"""Builds the operator's objects: a step's Job, the workspace's claim."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from qlora_api import contract
from qlora_api.contract import PERMANENT_EXIT_CODES, TRAINER_CONTAINER, ExitCode
from qlora_api.naming import (
    JOB_LABEL,
    JOB_UID_LABEL,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    SPEC_ANNOTATION,
    STEP_LABEL,
    child_job_name,
    other_spec_annotation,
    peers_name,
)
from qlora_api.profile import Profile
from qlora_api.spec.gate import GateSpec
from qlora_api.spec.job import API_VERSION, KIND, STEP_FIELDS
from qlora_api.status import Resolved, StepName
from qlora_operator.decisions.manifests.environment import (
    identity_labels,
    network_volumes,
    node_count,
    one_node_labels,
    service_account_name,
    step_environment,
)
from qlora_operator.decisions.manifests.network import Dns
from qlora_operator.decisions.manifests.placement import placement, resources
from qlora_operator.decisions.manifests.volumes import mounts_and_volumes
from qlora_operator.decisions.observed.objects import Object, QLoRAJob
from qlora_operator.decisions.retention import claim_goes_with_job

Manifest = dict[str, Any]
_SHORT_GRACE_SECONDS = 30
UNATTENDED_SECONDS = 7 * 24 * 3600
"""The longest time after the job's deadline that a Job continues without an operator to stop it."""
_UNDISTURBED = {
    # No autoscaler moves a running step to consolidate nodes, and no service mesh adds a proxy that outlives the step.
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
    "sidecar.istio.io/inject": "false",
    "linkerd.io/inject": "disabled",
}


def build_job(
    job: QLoRAJob,
    resolved: Resolved,
    step: StepName,
    attempt: int,
    failures: int = 0,
    others: Sequence[QLoRAJob] = (),
) -> Manifest:
    """Build the batch/v1 Job of one step.

    `failures`: number of failures of the step in earlier Jobs. `others`: the jobs that train trains together with this
    one. The Job depends only on what was resolved and on the jobs as their users, or their sweep, have written them.
    """
    labels, nodes = labels_of(job, step), node_count(job, step)
    queue = _queue(resolved) if step == "train" else {}
    metadata: Manifest = {
        "name": child_job_name(job.name, step, attempt),
        "namespace": job.namespace,
        "labels": labels | queue,
        "ownerReferences": [owner_of(job, controller=True)],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            # The queue alone resumes the Job, and suspends it again.
            **({"suspend": True} if queue else {}),
            **({"completionMode": "Indexed"} if nodes > 1 else {}),
            "completions": nodes,
            "parallelism": nodes,
            # Of several nodes, one that fails ends all: the operator starts them again together.
            "backoffLimit": max(0, job.spec.retry.max_failures - failures) if nodes == 1 else 0,
            **({} if step == "clean" else {"activeDeadlineSeconds": _job_deadline(job)}),
            "ttlSecondsAfterFinished": resolved.profile.finished_job_seconds,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules(together=nodes > 1)},
            "template": {
                "metadata": {
                    "labels": _template_labels(resolved.profile, step)
                    | labels
                    | one_node_labels(job, resolved.profile),
                    "annotations": (resolved.profile.pod_annotations or {})
                    | _UNDISTURBED
                    | {SPEC_ANNOTATION: _document(job, resolved)}
                    | _documents(others),
                },
                "spec": _pod(job, resolved, step, attempt, others),
            },
        },
    }


def _job_deadline(job: QLoRAJob) -> int:
    """Return the seconds until the Job controller ends the Job, waiting included.

    The next Job continues after that. Interrupted pods start again without a limit: only the operator counts them, and
    it may be down.
    """
    return (job.spec.active_deadline_seconds or 0) + UNATTENDED_SECONDS


def build_claim(job: QLoRAJob, resolved: Resolved) -> Manifest:
    """Build the workspace's PersistentVolumeClaim.

    It has an owner only if it is deleted with the job.
    """
    workspace, defaults = job.spec.workspace, resolved.profile.workspace
    spec: Manifest = {
        "accessModes": list(workspace.access_modes or (defaults.access_mode,)),
        "resources": {"requests": {"storage": workspace.size or defaults.size}},
    }
    if storage_class := workspace.storage_class_name or defaults.storage_class_name:
        spec["storageClassName"] = storage_class
    metadata: Manifest = {"name": resolved.claim_name, "namespace": job.namespace, "labels": labels_of(job)}
    if owners := owners_of_claim(job, resolved.profile, ()):
        metadata["ownerReferences"] = owners
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def owners_of_claim(job: QLoRAJob, profile: Profile, found: Iterable[Object]) -> list[Object]:
    """Return the owners that the job's claim is to have, given those that it has."""
    others = [owner for owner in found if owner["uid"] != job.uid]
    own = [owner_of(job, controller=False)] if claim_goes_with_job(job, profile.workspace) else []
    return [*others, *own]


def build_peer_service(job: QLoRAJob) -> Manifest:
    """Build the headless Service of the train pods of several nodes.

    Its names lead them to node 0, before any of them is ready.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _peers_metadata(job),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _peers(job),
            "ports": [{"name": "rendezvous", "port": contract.RENDEZVOUS_PORT}],
        },
    }


def build_peer_policy(job: QLoRAJob, dns: Dns) -> Manifest:
    """Build the NetworkPolicy of the train pods of one job.

    They reach one another and DNS; no other pod reaches them.
    """
    peers = [{"podSelector": {"matchLabels": _peers(job)}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _peers_metadata(job),
        "spec": {
            "podSelector": {"matchLabels": _peers(job)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers}],
            "egress": [{"to": peers}, dns.egress()],
        },
    }


def _peers_metadata(job: QLoRAJob) -> Manifest:
    return {
        "name": peers_name(job.uid),
        "namespace": job.namespace,
        "labels": labels_of(job, "train"),
        "ownerReferences": [owner_of(job, controller=True)],
    }


def _peers(job: QLoRAJob) -> dict[str, str]:
    return {JOB_UID_LABEL: job.uid, STEP_LABEL: "train"}


def document(job: QLoRAJob, profile: Profile) -> str:
    """Serialize the part of the QLoRAJob's manifest that the trainer reads.

    It leaves out fields that are for the operator only, so that a trainer of another release can read it. Memory of
    the GPU and of the pod is the profile's if the job sets none.
    """
    spec = job.spec.dump()
    content = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": job.name, "namespace": job.namespace, "uid": job.run_uid},
        "spec": {field: spec[field] for field in STEP_FIELDS if field in spec},
    }
    return with_memory(_as_json(content), job, profile)


def with_memory(document: str, job: QLoRAJob, profile: Profile) -> str:
    """Return the document with the memory of the profile's GPUs and train pods, unless the job sets them."""
    own, content = job.spec.resources, json.loads(document)
    gpu = profile.gpu_memory if profile.device == "cuda" else None
    resources = content["spec"].setdefault("resources", {})
    for name, value in (
        ("gpuMemory", own.gpu_memory or gpu),
        # It holds activations on a CPU, and inputs of blocks that the GPU has no room for.
        ("memory", own.memory or profile.resources.train.memory),
    ):
        resources.pop(name, None)
        if value is not None:
            resources[name] = value
    return _as_json(content)


def with_gate(document: str, gate: GateSpec | None) -> str:
    """Return the document with this gate."""
    content = json.loads(document)
    content["spec"].pop("gate", None)
    if gate is not None:
        content["spec"]["gate"] = gate.dump()
    return _as_json(content)


def _as_json(content: Any) -> str:
    # Characters are written as they are: escaped, one beyond the basic plane would be twelve.
    return json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def _document(job: QLoRAJob, resolved: Resolved) -> str:
    """Serialize the spec as fixed at the start, for the contract of the job's trainer.

    The gate is the current one. A missing gate may have been dropped by an older definition of the resource: the
    resolved one stays, unless the job is retried.
    """
    return resolved.document if job.spec.gate is None else with_gate(resolved.document, job.spec.gate)


def _documents(others: Sequence[QLoRAJob]) -> dict[str, str]:
    """The same of further jobs, by annotation."""
    fixed = ((other, other.status.resolved) for other in others)
    return {other_spec_annotation(other.name): _document(other, it) for other, it in fixed if it is not None}


def _queue(resolved: Resolved) -> dict[str, str]:
    """Return Kueue's labels for the Job: on a pod they would add a second workload."""
    if not resolved.queue_name:
        return {}
    priority = {QUEUE_PRIORITY_LABEL: resolved.queue_priority_class_name} if resolved.queue_priority_class_name else {}
    return {QUEUE_LABEL: resolved.queue_name} | priority


def labels_of(job: QLoRAJob, step: StepName | None = None) -> dict[str, str]:
    """Return the labels of everything that is created for the job."""
    labels = {
        "app.kubernetes.io/name": "qlora-trainer",
        "app.kubernetes.io/instance": job.name,
        "app.kubernetes.io/part-of": "qlora",
        "app.kubernetes.io/managed-by": "qlora-operator",
        JOB_LABEL: job.name,
        JOB_UID_LABEL: job.uid,
    }
    return labels if step is None else labels | {"app.kubernetes.io/component": step, STEP_LABEL: step}


def _template_labels(profile: Profile, step: StepName) -> dict[str, str]:
    """Return the pods' labels besides those of their Job."""
    return (profile.pod_labels or {}) | {"sidecar.istio.io/inject": "false"} | identity_labels(profile, step)


def owner_of(job: QLoRAJob, *, controller: bool) -> Manifest:
    """Build the job's owner reference."""
    owner = {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid, "blockOwnerDeletion": False}
    return owner | ({"controller": True} if controller else {})


def _failure_rules(*, together: bool) -> list[Manifest]:
    """Build the failure policy, where the first match decides.

    A permanent failure on a drained node is so still permanent. `together`: the Job has several pods that run together.
    One that has stopped as asked leaves the Job as it is, for a queue that has suspended it to resume; a lost one fails
    the Job, so that the others are stopped.
    """

    def on_exit(action: str, codes: Iterable[int]) -> Manifest:
        condition = {"containerName": TRAINER_CONTAINER, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": condition}

    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    return [
        on_exit("FailJob", PERMANENT_EXIT_CODES),
        *([] if together else [disrupted]),
        on_exit("Ignore", [int(ExitCode.INTERRUPTED)]),
    ]


def _pod(job: QLoRAJob, resolved: Resolved, step: StepName, attempt: int, others: Sequence[QLoRAJob]) -> Manifest:
    profile = resolved.profile
    grace = profile.termination_grace_period_seconds if step == "train" else _SHORT_GRACE_SECONDS
    names = [other.name for other in others]
    mounts, volumes = mounts_and_volumes(job, resolved.claim_name, profile, step, resolved.continued, names)
    if step in ("prepare", "publish"):
        added = network_volumes(profile)
        mounts, volumes = mounts + added[0], volumes + added[1]
    pod: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace,
        "securityContext": _pod_security(profile),
        "containers": [_container(job, resolved, step, attempt, others) | {"volumeMounts": mounts}],
        "volumes": volumes,
    }
    optional: Manifest = placement(job, profile, step) | {
        "serviceAccountName": service_account_name(profile, step),
        "imagePullSecrets": [{"name": name} for name in profile.image_pull_secrets],
        "priorityClassName": job.spec.scheduling.priority_class_name,
        "runtimeClassName": profile.runtime_class_name if step == "train" else None,
        "subdomain": peers_name(job.uid) if node_count(job, step) > 1 else None,
    }
    optional["affinity"] = _with_one_node(optional.get("affinity") or {}, one_node_labels(job, profile))
    if profile.host_users is not None:
        pod["hostUsers"] = profile.host_users
    return pod | {key: value for key, value in optional.items() if value}


def _with_one_node(affinity: Manifest, labels: dict[str, str]) -> Manifest:
    """Add the affinity of pods with these labels to one another, unless there are none.

    The first goes to any node, and the others to its node as long as it runs.
    """
    if not labels:
        return affinity
    pods, required = affinity.get("podAffinity", {}), "requiredDuringSchedulingIgnoredDuringExecution"
    term = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
    return affinity | {"podAffinity": pods | {required: [*pods.get(required, ()), term]}}


def _container(job: QLoRAJob, resolved: Resolved, step: StepName, attempt: int, others: Sequence[QLoRAJob]) -> Manifest:
    profile = resolved.profile
    workspace = contract.WORKSPACE_MOUNT / resolved.workspace_path
    return {
        "name": TRAINER_CONTAINER,
        "image": profile.image,
        "imagePullPolicy": profile.image_pull_policy,
        "args": [step, "--job", str(contract.JOB_FILE), "--workspace", str(workspace), *_further(others)],
        "env": step_environment(job, resolved, step, attempt),
        "resources": resources(job, profile, step),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": str(contract.TERMINATION_LOG),
        "terminationMessagePolicy": "File",
    }


def _further(others: Sequence[QLoRAJob]) -> list[str]:
    """The arguments for further jobs, whose workspaces are on the same claim."""
    fixed = ((other.name, other.status.resolved) for other in others)
    return [
        argument
        for name, it in fixed
        if it is not None
        for argument in (
            "--with",
            f"{contract.OTHER_JOBS / name}.json",
            str(contract.WORKSPACE_MOUNT / it.workspace_path),
        )
    ]


def _pod_security(profile: Profile) -> Manifest:
    security: Manifest = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if profile.run_as is None:
        return security
    return security | {
        "runAsUser": profile.run_as.user,
        "runAsGroup": profile.run_as.group,
        "fsGroup": profile.run_as.fs_group,
        "fsGroupChangePolicy": "OnRootMismatch",
        **({"supplementalGroupsPolicy": policy} if (policy := profile.run_as.supplemental_groups_policy) else {}),
    }
