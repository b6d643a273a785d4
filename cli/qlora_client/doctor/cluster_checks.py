"""Checks the cluster's API server, definitions and operator; pure."""

import re
from datetime import datetime, timedelta

from qlora_api.served_schema import missing_fields, unknown_fields
from qlora_client.doctor.facts import Check, Facts, Object, Operator, Unknown

OLDEST_KUBERNETES = (1, 34)
_VERSION_LABEL = "app.kubernetes.io/version"
_MOST_NAMED = 3
_UNSEEN = timedelta(minutes=2)
# A leader renews its Lease six times before it runs out.
_LATE = 2
# The previous holder cannot release the Lease if its rights are removed together with it.
_ABSENT_LEADER = "check again in a minute if the operator has just been installed, or else see its pods' log"


def check_cluster(facts: Facts) -> list[Check]:
    """The checks that need no profile."""
    return [_check_version(facts), _check_definitions(facts), *_check_operators(facts), _check_unseen(facts)]


def _check_version(facts: Facts) -> Check:
    name, oldest = "Kubernetes", ".".join(map(str, OLDEST_KUBERNETES))
    found = re.match(r"v(\d+)\.(\d+)", facts.server_version)
    if found is None:
        return Check(name, "unknown", f"the API server calls its version {facts.server_version[:40]!r}")
    if (int(found[1]), int(found[2])) < OLDEST_KUBERNETES:
        return Check(name, "problem", f"the API server is {facts.server_version}: upgrade it to {oldest} or later")
    return Check(name, "ok", f"the API server is {facts.server_version}")


def _check_definitions(facts: Facts) -> Check:
    name = "Definitions"
    if facts.schemas is None:
        return Check(
            name, "problem", "the cluster does not know QLoRAJob: install the operator's chart, which brings it"
        )
    missing, newer = missing_fields(facts.schemas), unknown_fields(facts.schemas)
    if missing:
        return Check(
            name,
            "problem",
            f"the cluster's definitions lack {_some(missing)}, which this program knows: upgrade the operator's chart "
            "there, or use the program of that release",
        )
    if newer:
        return Check(
            name,
            "warning",
            f"the cluster's definitions have {_some(newer)}, which this program does not know: upgrade the program",
        )
    return Check(name, "ok", "QLoRAJob and QLoRASweep are served with the fields that this program knows")


def _check_operators(facts: Facts) -> list[Check]:
    name = "Operator"
    if isinstance(facts.operators, Unknown):
        return [Check(name, "unknown", facts.operators.why)]
    if not facts.operators:
        return [Check(name, "problem", "there is no Deployment of the operator: install its chart")]
    checks = [check for operator in facts.operators for check in _check_operator(operator, facts)]
    if len(facts.operators) > 1:
        places = ", ".join(operator.deployment["metadata"]["namespace"] for operator in facts.operators)
        text = f"there are {len(facts.operators)} operators, in {places}: make sure that no namespace is served by two"
        checks.append(Check("Operators", "warning", text))
    return checks


def _check_operator(operator: Operator, facts: Facts) -> list[Check]:
    metadata = operator.deployment["metadata"]
    place = f"{metadata['namespace']}/{metadata['name']}"
    return [
        _check_deployment(operator.deployment, place, facts.cli_version),
        *_check_lease(operator, place, facts.now),
        *_check_served(operator, place, facts.namespace),
    ]


def _check_deployment(deployment: Object, place: str, cli_version: str) -> Check:
    name = "Operator"
    wanted = (deployment.get("spec") or {}).get("replicas", 1)
    ready = (deployment.get("status") or {}).get("readyReplicas", 0)
    if wanted == 0:
        return Check(name, "problem", f"{place} is scaled to 0: scale it to 1 or more")
    if not ready:
        return Check(name, "problem", f"{place} has no ready pod: see its pods' log and Events")
    if ready < wanted:
        return Check(name, "warning", f"{place} has {ready} of {wanted} pods ready: see the others' log and Events")
    version = (deployment["metadata"].get("labels") or {}).get(_VERSION_LABEL)
    if version not in (None, cli_version):
        return Check(
            name, "warning", f"{place} is of version {version} and this program of {cli_version}: use the same version"
        )
    return Check(name, "ok", f"{place} runs with {ready} ready pod{'s' if ready > 1 else ''}")


def _check_lease(operator: Operator, place: str, now: datetime) -> list[Check]:
    name, lease = "Operator's Lease", operator.lease
    if lease is None:
        return []
    if isinstance(lease, Unknown):
        return [Check(name, "unknown", lease.why)]
    spec = lease.get("spec") or {}
    holder, renewed = spec.get("holderIdentity"), spec.get("renewTime")
    if not holder or not renewed:
        return [Check(name, "problem", f"nobody holds the Lease of {place}, so no job goes on: {_ABSENT_LEADER}")]
    age = now - datetime.fromisoformat(renewed)
    if age > _LATE * timedelta(seconds=spec.get("leaseDurationSeconds") or 0):
        return [
            Check(
                name,
                "problem",
                f"{holder} has not renewed the Lease of {place} for {age.total_seconds():.0f} s, so no job goes on: "
                f"{_ABSENT_LEADER}",
            )
        ]
    return [Check(name, "ok", f"{holder} holds it")]


def _check_served(operator: Operator, place: str, namespace: str) -> list[Check]:
    if isinstance(operator.settings, Unknown):
        return []
    served = operator.settings.get("namespaces") or ()
    if served and namespace not in served:
        return [
            Check(
                "Namespace served",
                "problem",
                f"{place} serves {_some(sorted(served))} and not {namespace}: add it to the chart's value `namespaces`",
            )
        ]
    return [Check("Namespace served", "ok", f"{place} serves {namespace}")]


def _check_unseen(facts: Facts) -> Check:
    """Detect a dead operator for users who may not read its Deployment."""
    name = "Jobs seen"
    if isinstance(facts.jobs, Unknown):
        return Check(name, "unknown", facts.jobs.why)
    unseen = [
        job["metadata"]["name"]
        for job in facts.jobs
        if not (job.get("status") or {}).get("phase")
        and facts.now - datetime.fromisoformat(job["metadata"]["creationTimestamp"]) > _UNSEEN
    ]
    if unseen:
        minutes = _UNSEEN.total_seconds() / 60
        return Check(
            name,
            "problem",
            f"no operator has looked at {_some(unseen)} for over {minutes:.0f} minutes: it does not run, or does not "
            f"serve {facts.namespace}; ask the administrator",
        )
    return Check(name, "ok", f"no job of {facts.namespace} waits for an operator to look at it")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
