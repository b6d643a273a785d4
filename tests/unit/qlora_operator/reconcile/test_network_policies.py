"""When the operator writes the NetworkPolicies of a namespace: before a Job, and seldom."""

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from qlora_api.profile import Profile
from qlora_operator.decisions.manifests.network import JobNetworkPolicies
from qlora_operator.kube.errors import RejectedError
from qlora_operator.reconcile.isolation import Isolation
from tests.support.builders import PROFILE, PROFILES, job_body, message_of, reason_of
from tests.support.cluster.memory_cluster import MemoryCluster, operator, shown, until_it_waits


@dataclass
class Written:
    """The policies that were applied, by namespace, and a clock."""

    names: list[tuple[str, str]] = field(default_factory=list)
    rejects: bool = False
    seconds: float = 0.0

    async def apply_network_policy(self, namespace: str, manifest: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        if self.rejects:
            raise RejectedError("exceeded quota: policies")
        self.names.append((namespace, manifest["metadata"]["name"]))

    def isolation(self, profiles: dict[str, Profile], network: JobNetworkPolicies | None = None) -> Isolation:
        settings = network or JobNetworkPolicies()
        return Isolation(self, settings, profiles, lambda: self.seconds)  # type: ignore[arg-type]


OF_TEAM = [("team", "qlora-jobs"), ("team", "qlora-servers")]


def test_a_thousand_jobs_that_start_at_once_need_each_policy_of_their_namespace_once() -> None:
    written = Written()
    isolation = written.isolation(PROFILES)

    async def start() -> None:
        await asyncio.gather(*(isolation.apply(namespace) for _ in range(500) for namespace in ("team", "other")))

    asyncio.run(start())
    assert sorted(written.names) == sorted([*OF_TEAM, *(("other", name) for _, name in OF_TEAM)])


def test_policies_are_written_again_after_a_minute_and_when_a_profile_changes() -> None:
    """A user may have changed them, and a namespace may be another one of the same name."""
    written, profiles = Written(), dict(PROFILES)
    isolation = written.isolation(profiles)
    for written.seconds in (0, 59, 61, 62):
        asyncio.run(isolation.apply("team"))
    assert written.names == OF_TEAM * 2
    profiles["other"] = Profile.model_validate(PROFILE.dump() | {"hubEndpoint": "http://hub.example.org:8080"})
    asyncio.run(isolation.apply("team"))
    assert written.names == OF_TEAM * 3


def test_a_platform_with_policies_of_its_own_gets_none() -> None:
    written = Written()
    asyncio.run(written.isolation(PROFILES, JobNetworkPolicies(enabled=False)).apply("team"))
    assert written.names == []


@pytest.mark.parametrize("rejects", [False, True])
def test_no_job_starts_before_its_namespaces_policies_exist(rejects: bool) -> None:
    written, cluster = Written(rejects=rejects), MemoryCluster(job_body())
    reconciler = replace(operator(cluster, shown(cluster)), isolate=written.isolation(PROFILES).apply)
    until_it_waits(reconciler)
    assert [kind for kind in cluster.writes if kind == "Job"] == ([] if rejects else ["Job"])
    if rejects:
        assert reason_of(cluster.status) == "NetworkPolicyRejected"
        assert "exceeded quota: policies" in message_of(cluster.status)
