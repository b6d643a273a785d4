"""Finds the rights that a user lacks, as the rules of a Role."""

from collections.abc import Iterable, Mapping, Sequence

from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ForbiddenError
from qlora_client.kube.resources import Resource

Rights = Mapping[Resource, Sequence[str]]
"""The verbs that are needed, by resource."""


def lacking(cluster: Cluster, needed: Rights) -> dict[Resource, list[str]]:
    """The rights that the user lacks in the namespace."""
    denied = {kind: [verb for verb in verbs if not cluster.may(verb, kind)] for kind, verbs in needed.items()}
    return {kind: verbs for kind, verbs in denied.items() if verbs}


def rules(rights: Mapping[Resource, Iterable[str]]) -> str:
    """The rules that allow them, as they are written in a Role."""
    return ", ".join(kind.rule(*verbs) for kind, verbs in rights.items())


def require(cluster: Cluster, needed: Rights, purpose: str) -> None:
    """Raise ForbiddenError, which names every rule that is missing, unless the user has all of these rights."""
    denied = lacking(cluster, needed)
    if denied:
        raise ForbiddenError(
            f"{purpose} takes rights that you lack in the namespace {cluster.namespace}: ask for a Role with "
            f"{'the rule' if len(denied) == 1 else 'the rules'} {rules(denied)}"
        )
