"""Finds, before anything is downloaded, that training can use no GPU of a profile's nodes."""

from collections.abc import Mapping

from qlora_api.gpus import why_unfit
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
