"""Names of what is created for a job, and the keys of its labels and annotations.

A name derives from the job's name and UID, so that a retry can never create a second child.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The models take longer to import than most commands of the command line run, which need the labels only.
    from qlora_api.status import StepName

# Labels of everything that is created for a job.
JOB_LABEL = "qlora.dev/job"
JOB_UID_LABEL = "qlora.dev/job-uid"
STEP_LABEL = "qlora.dev/step"
# Labels of the cells of a sweep, and of the claim that was created for them.
SWEEP_LABEL = "qlora.dev/sweep"
SWEEP_UID_LABEL = "qlora.dev/sweep-uid"
# Annotation of a job that was restored from a backup, which resumes the run that its ControllerRevision names.
RESTORED_ANNOTATION = "qlora.dev/restored"
# The same by Velero, which writes this label into everything that it restores.
VELERO_LABEL = "velero.io/restore-name"
# Annotation of a cell whose spec.suspend its sweep has set.
SUSPENDED_ANNOTATION = "qlora.dev/suspended-by-sweep"
# Annotation of a cell that its sweep has stopped for good, with the reason.
STOPPED_ANNOTATION = "qlora.dev/stopped-by-sweep"
# Annotation of a cell: the optimizer steps of its sweep's comparisons of held-out losses, separated by commas.
RUNGS_ANNOTATION = "qlora.dev/rungs"
# Annotation of a cell that its sweep trains together with others: how many of them one pod trains, itself included.
CELLS_IN_POD_ANNOTATION = "qlora.dev/cells-in-pod"
# Annotation of a train Job of a sweep, and of its pods: the names of the cells that it trains, separated by commas.
CELLS_ANNOTATION = "qlora.dev/cells"
# Annotation of a step's pod: the manifest that the pod reads as a file (contract.JOB_FILE), by the downward API.
SPEC_ANNOTATION = "qlora.dev/spec"
OPERATOR = "qlora.dev/operator"
"""Value of spec.managedBy for the operator itself."""
# Kueue's labels of a Job that waits in a queue; on a QLoRAJob they say the same as spec.scheduling.
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
QUEUE_PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
# Label of the pods that have an identity of a cloud, with its name.
CLOUD_IDENTITY_LABEL = "qlora.dev/cloud-identity"
# Label of the pods of cells that share a volume which is attached to one node at a time, with their common folder.
ONE_NODE_LABEL = "qlora.dev/one-node"


def short_uid(uid: str) -> str:
    """Return the first 8 characters of a UID, to distinguish jobs of one name."""
    return uid[:8]


def child_job_name(job_name: str, step: "StepName", attempt: int) -> str:
    """Return `<job>-<step>-<attempt>`, at most 59 characters for 45 of the job."""
    return f"{job_name}-{step}-{attempt}"


def workspace_claim_name(job_name: str, uid: str) -> str:
    """Return the claim's name, with the UID as a retained claim outlives its job."""
    return f"{job_name}-{short_uid(uid)}"


def workspace_folder(job_name: str, uid: str) -> str:
    """The job's own folder on its workspace claim, which other jobs may share."""
    return f"{job_name}-{short_uid(uid)}"


def shared_folder(sweep_name: str, sweep_uid: str) -> str:
    """The folder that the cells of a sweep share on their workspace claim, next to that of each.

    No job has a folder of that name, as no job's name or UID has a dot: who forges a sweep cannot name one.
    """
    return f"{sweep_name}-{short_uid(sweep_uid)}.sweep"


def sweep_pod_name(sweep_name: str, number: int) -> str:
    """Return the first part of the names of a sweep's shared Jobs, by pod `number`."""
    return f"{sweep_name}-p{number:02}"


def other_spec_annotation(job_name: str) -> str:
    """Annotation of a train pod: the manifest of a further job that it trains."""
    return f"{SPEC_ANNOTATION}-of-{job_name}"


def peers_name(uid: str) -> str:
    """Return the name of the Service of a job's train pods.

    It begins with a letter, and their NetworkPolicy's name with it.
    """
    return f"qlora-{uid}"


def node_host(child_name: str, node: int, uid: str) -> str:
    """Host name of a train pod within the namespace, as the headless Service gives it."""
    return f"{child_name}-{node}.{peers_name(uid)}"
