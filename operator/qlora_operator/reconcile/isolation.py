"""Keeps the NetworkPolicies for the pods of jobs in each namespace where the operator creates Jobs."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qlora_api.profile import Profile
from qlora_operator.decisions.manifests.network import JobNetworkPolicies, Manifest, build_policies
from qlora_operator.kube.client import Cluster

# Without a watch: a namespace may be deleted and created again, and a user may change its policies. Applying two
# objects a minute is cheaper than watching those of all namespaces.
_SECONDS = 60.0


@dataclass(frozen=True)
class Isolation:
    """Applies a namespace's policies, at most once a minute while they stay the same."""

    cluster: Cluster
    network: JobNetworkPolicies
    profiles: Mapping[str, Profile]
    monotonic: Callable[[], float]
    _applied: dict[str, tuple[float, list[Manifest]]] = field(default_factory=dict)
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def apply(self, namespace: str) -> None:
        """Return when the policies are in the namespace. Raises ClusterError."""
        if not self.network.enabled:
            return
        wanted = build_policies(self.network, self.profiles.values())
        # Of a thousand jobs that start together, the others wait for the first.
        async with self._locks.setdefault(namespace, asyncio.Lock()):
            due, applied = self._applied.get(namespace, (0.0, []))
            if applied == wanted and self.monotonic() < due:
                return
            for policy in wanted:
                await self.cluster.apply_network_policy(namespace, policy)
            self._applied[namespace] = (self.monotonic() + _SECONDS, wanted)
