"""Decides, before anything is downloaded, what training can expect of the GPUs of a profile's nodes."""

from collections.abc import Mapping

from qlora_api.gpus import gpu_memory_of, why_unfit
from qlora_api.profile import Profile
from qlora_operator.decisions.observed.objects import Reason
from qlora_operator.decisions.profiles.stored_profile import Labels

GPU_NOT_SUPPORTED = "GPUNotSupported"
_NAMED = 3


def objection_to_nodes(profile: str, nodes: Mapping[str, Labels]) -> Reason | None:
    """Return why no job of the profile can train on its nodes, or None if one may.

    `nodes`: the labels, by name, of the nodes that its nodeSelector selects. Nodes without the labels of NVIDIA's GPU
    Feature Discovery are left out: nothing is known of them. Without any others, as in an empty pool of an autoscaler,
    nothing objects. Taints and affinity count for nothing: they only narrow the nodes further.

    A node affinity of the pods would need no right to list nodes. But where the workspace is `shared`, `prepare` runs
    elsewhere and would download first; an autoscaler would add more nodes with the same driver; and the scheduler's
    message names neither node nor driver.
    """
    known = {name: why for name, labels in sorted(nodes.items()) if (why := why_unfit(labels)) is not None}
    if not known or not all(known.values()):
        return None
    unfit = [f"{name} with {why}" for name, why in known.items()]
    further = f"; and {len(unfit) - _NAMED} more nodes" if len(unfit) > _NAMED else ""
    return Reason(
        GPU_NOT_SUPPORTED,
        f"train cannot use the GPUs of profile {profile!r}: {'; '.join(unfit[:_NAMED])}{further}; the job starts when "
        "the administrator upgrades an old driver, or names other nodes in the profile's nodeSelector",
    )


def memory_of_nodes(profile: Profile, nodes: Mapping[str, Labels]) -> str | None:
    """Return the memory of each GPU of a profile's nodes by their labels, or None if it is unknown.

    Nodes without the label, and those that training cannot use, are left out. With GPUs of several sizes it is unknown:
    the smallest may be those of a taint or a job's own nodeSelector, and would reject jobs that fit the others.
    """
    sizes = {gpu_memory_of(labels, profile.gpu_resource) for labels in nodes.values() if not why_unfit(labels)}
    known = sizes - {None}
    return f"{known.pop()}Gi" if len(known) == 1 else None
