"""Checks the namespace: admission of pods and claims, their connections, and the user's rights; pure."""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation

from pydantic import ValidationError

from qlora_api.kubernetes_values import amount
from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL, STEP_LABEL
from qlora_api.profile import Profile
from qlora_client.doctor.facts import Check, Facts, NamedProfile, Object, Unknown, profiles_of, selects

_ENFORCED = "pod-security.kubernetes.io/enforce"
_STEP_LABELS = {JOB_LABEL: "any", JOB_UID_LABEL: "any"}


def check_namespace(facts: Facts) -> list[Check]:
    """The checks of the user's namespace."""
    needs = dict(_needs(profiles_of(facts)))
    return [
        _check_pod_security(facts),
        *_check_trials(facts),
        *_check_quotas(facts, needs),
        *_check_limits(facts, needs),
        _check_network(facts),
        *_check_rights(facts),
    ]


def _needs(profiles: Sequence[NamedProfile]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Return a job's share of a quota by its names: the largest pod and the claim."""
    for named in profiles:
        try:
            profile = Profile.model_validate(named.content, extra="ignore")
        except ValidationError:
            # Another check reports it.
            continue
        train = profile.resources.train
        gpu = {f"requests.{profile.gpu_resource}": "1"} if profile.gpu_resource else {}
        yield (
            named.name,
            {
                "requests.cpu": train.cpu,
                "cpu": train.cpu,
                "requests.memory": train.memory,
                "memory": train.memory,
                "limits.memory": train.memory,
                "pods": "1",
                "count/pods": "1",
                "count/jobs.batch": "1",
                "count/qlorajobs.qlora.dev": "1",
                "persistentvolumeclaims": "1",
                "requests.storage": profile.workspace.size,
                **gpu,
            },
        )


def _check_pod_security(facts: Facts) -> Check:
    name = "Pod Security"
    if isinstance(facts.own_namespace, Unknown):
        return Check(name, "unknown", facts.own_namespace.why)
    level = (facts.own_namespace["metadata"].get("labels") or {}).get(_ENFORCED)
    if level is None:
        return Check(
            name,
            "ok",
            f"{facts.namespace} enforces no level by a label, and jobs run at any: consider `restricted`",
        )
    return Check(name, "ok", f"{facts.namespace} enforces {level}, and pods of jobs are admitted at any level")


def _check_trials(facts: Facts) -> Iterator[Check]:
    for profile, answer in facts.trials.items():
        name = f"Admission, profile {profile}"
        if isinstance(answer, Unknown):
            yield Check(name, "unknown", answer.why)
        elif answer is None:
            yield Check(name, "ok", f"{facts.namespace} admits a pod like that of train (asked with a dry run)")
        else:
            yield Check(
                name, "problem", f"{facts.namespace} does not admit a pod like that of train, so change it: {answer}"
            )


def _check_quotas(facts: Facts, needs: Mapping[str, Mapping[str, str]]) -> Iterator[Check]:
    name = "Quotas"
    if isinstance(facts.quotas, Unknown):
        yield Check(name, "unknown", facts.quotas.why)
        return
    problems = [check for quota in facts.quotas for check in _short(quota, needs)]
    yield from problems
    if not problems:
        yield Check(name, "ok", f"no ResourceQuota of {facts.namespace} leaves too little for a job")


def _short(quota: Object, needs: Mapping[str, Mapping[str, str]]) -> Iterator[Check]:
    """The quota's shortages, by profile."""
    name, status, spec = f"Quota {quota['metadata']['name']}", quota.get("status") or {}, quota.get("spec") or {}
    hard, used = status.get("hard") or {}, status.get("used") or {}
    if spec.get("scopes") or spec.get("scopeSelector"):
        # It counts selected pods only, and the selection is not evaluated here.
        return
    if "limits.cpu" in hard:
        text = (
            "it counts limits.cpu, which pods of jobs do not set: they are rejected unless a LimitRange sets a default "
            "CPU limit"
        )
        yield Check(name, "warning", text)
    for key, limit in hard.items():
        taken = used.get(key, "0")
        for profile, need in needs.items():
            lack = _lack(key, limit, taken, need)
            if lack:
                remedy = "raise it" if lack == "never" else "raise it, or wait until others have ended"
                text = (
                    f"of {key} it has {taken} of {limit} used, and a job of the profile {profile} takes {need[key]}: "
                    f"{remedy}"
                )
                yield Check(name, "problem" if lack == "never" else "warning", text)


def _lack(key: str, limit: str, used: str, need: Mapping[str, str]) -> str:
    """Return `never` (quota too small), `now` (used up) or empty (there is room)."""
    wanted, most, taken = _number(need.get(key, "0")), _number(limit), _number(used)
    if None in (wanted, most, taken) or not wanted or most is None or taken is None:
        return ""
    if wanted > most:
        return "never"
    return "now" if wanted > most - taken else ""


def _number(quantity: str) -> Decimal | None:
    try:
        return amount(str(quantity))
    except (InvalidOperation, KeyError):
        return None


def _check_limits(facts: Facts, needs: Mapping[str, Mapping[str, str]]) -> Iterator[Check]:
    name = "Limit ranges"
    if isinstance(facts.limit_ranges, Unknown):
        yield Check(name, "unknown", facts.limit_ranges.why)
        return
    problems = [
        Check(f"LimitRange {found['metadata']['name']}", "problem", text)
        for found in facts.limit_ranges
        for entry in (found.get("spec") or {}).get("limits") or ()
        for text in _excluded(entry, needs)
    ]
    yield from problems
    if not problems:
        yield Check(name, "ok", f"no LimitRange of {facts.namespace} excludes a job")


def _excluded(entry: Object, needs: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    key = {"Container": "memory", "Pod": "memory", "PersistentVolumeClaim": "requests.storage"}.get(entry["type"])
    resource = "storage" if key == "requests.storage" else "memory"
    most = (entry.get("max") or {}).get(resource)
    if key is None or most is None:
        return
    for profile, need in needs.items():
        wanted, allowed = _number(need[key]), _number(most)
        if wanted is not None and allowed is not None and wanted > allowed:
            yield (
                f"a {entry['type']} may have {most} of {resource}, and a job of the profile {profile} takes "
                f"{need[key]}: raise it, or ask for less in the profile or the job"
            )


def _check_network(facts: Facts) -> Check:
    name = "Network policies"
    if isinstance(facts.network_policies, Unknown):
        return Check(name, "unknown", facts.network_policies.why)
    fetching = _egress(facts.network_policies, "prepare")
    training = _egress(facts.network_policies, "train")
    if fetching and not any((policy.get("spec") or {}).get("egress") for policy in fetching):
        names = ", ".join(policy["metadata"]["name"] for policy in fetching)
        return Check(
            name,
            "problem",
            f"{names} let prepare and publish connect nowhere, so that they cannot download or upload: enable the "
            "chart's jobNetworkPolicies, or allow DNS and the servers",
        )
    if not training:
        return Check(
            name,
            "ok",
            "no NetworkPolicy restricts the pods of jobs yet: the operator creates its own before the first job, "
            "unless the chart's jobNetworkPolicies are off",
        )
    return Check(name, "ok", "prepare and publish may connect to servers, and the connections of train are restricted")


def _egress(policies: Sequence[Object], step: str) -> list[Object]:
    """The policies that restrict where a pod of the step may connect to."""
    labels = _STEP_LABELS | {STEP_LABEL: step}
    return [
        policy
        for policy in policies
        if "Egress" in ((policy.get("spec") or {}).get("policyTypes") or ())
        and selects(policy["spec"].get("podSelector"), labels)
    ]


def _check_rights(facts: Facts) -> Iterator[Check]:
    for purpose, missing in facts.denied.items():
        yield Check(f"Your rights: {purpose}", "warning", f"ask for a Role with the rules {', '.join(missing)}")
    if not facts.denied:
        yield Check("Your rights", "ok", f"you may do everything that this program does in {facts.namespace}")
