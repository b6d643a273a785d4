"""Checks the facts about a cluster; pure."""

from qlora_client.doctor.cluster_checks import check_cluster
from qlora_client.doctor.facts import Check, Facts
from qlora_client.doctor.namespace_checks import check_namespace
from qlora_client.doctor.profile_checks import check_profiles


def examine(facts: Facts) -> list[Check]:
    """All checks, in the order of the table: the cluster, the profiles, the namespace."""
    return [*check_cluster(facts), *check_profiles(facts), *check_namespace(facts)]
