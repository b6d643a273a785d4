"""Reads the facts about a cluster with the user's rights; missing rights are recorded. Then checks them."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from qlora_api.naming import JOB_LABEL, JOB_UID_LABEL
from qlora_api.profile import Profile
from qlora_api.served_schema import OPENAPI_PATH
from qlora_client.doctor.cluster_checks import check_cluster
from qlora_client.doctor.facts import Check, Facts, NamedProfile, Operator, Unknown, profiles_of
from qlora_client.doctor.namespace_checks import check_namespace
from qlora_client.doctor.profile_checks import check_profiles
from qlora_client.files.claims import NEEDED as READS_CLAIMS
from qlora_client.kube.cluster import Cluster, Object, Rights, lacking
from qlora_client.kube.errors import ForbiddenError, MissingError, RejectedError
from qlora_client.kube.resources import EVENTS, JOBS, LOGS, PODS, PROFILES, REVISIONS, SWEEPS, Resource

DEPLOYMENTS = Resource("apps", "v1", "deployments")
LEASES = Resource("coordination.k8s.io", "v1", "leases")
NODES = Resource("", "v1", "nodes", namespaced=False)
NAMESPACES = Resource("", "v1", "namespaces", namespaced=False)
QUOTAS = Resource("", "v1", "resourcequotas")
LIMIT_RANGES = Resource("", "v1", "limitranges")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies")
STORAGE_CLASSES = Resource("storage.k8s.io", "v1", "storageclasses", namespaced=False)
RUNTIME_CLASSES = Resource("node.k8s.io", "v1", "runtimeclasses", namespaced=False)

_OPERATOR = "app.kubernetes.io/name=qlora-operator"
_SETTINGS = "qlora.dev/settings"
_MOST_TRIALS = 8
_PURPOSES: Mapping[str, Rights] = {
    "submit, suspend, resume, retry and cancel jobs": {JOBS: ("create", "patch")},
    "submit sweeps": {SWEEPS: ("create",)},
    "list and watch": {JOBS: ("get", "list", "watch"), EVENTS: ("list",)},
    "logs and compare": {PODS: ("list",), LOGS: ("get",)},
    "adapter, report and compare from a claim": READS_CLAIMS,
}
"""The rights that the commands need, by purpose."""

_Answer = TypeVar("_Answer")


def gather(cluster: Cluster, operator_namespace: str) -> Facts:
    """The facts about the cluster and the namespace. Raises ClusterError only if nothing can be asked.

    Deployments are listed in all namespaces, or, without that right, in `operator_namespace`.
    """
    server_version, now = cluster.server()
    schemas = _schemas(cluster)
    profiles = [] if schemas is None else _list(cluster, PROFILES)
    facts = Facts(
        namespace=cluster.namespace,
        now=now,
        server_version=server_version,
        schemas=schemas,
        cli_version=version("qlora-operator"),
        operators=_operators(cluster, operator_namespace),
        profiles=profiles,
        jobs=[] if schemas is None else _list(cluster, JOBS),
        revisions=_list(cluster, REVISIONS, JOB_UID_LABEL) if isinstance(profiles, Unknown) else [],
        nodes=_list(cluster, NODES),
        storage_classes=_list(cluster, STORAGE_CLASSES),
        runtime_classes=_list(cluster, RUNTIME_CLASSES),
        own_namespace=_allowed(lambda: cluster.get(NAMESPACES, cluster.namespace), NAMESPACES, "get"),
        quotas=_list(cluster, QUOTAS),
        limit_ranges=_list(cluster, LIMIT_RANGES),
        network_policies=_list(cluster, NETWORK_POLICIES),
        denied=_denied(cluster),
    )
    return _with_trials(facts, cluster)


def _allowed(ask: Callable[[], _Answer], resource: Resource, verb: str) -> _Answer | Unknown:
    try:
        return ask()
    except ForbiddenError:
        role = "Role" if resource.namespaced else "ClusterRole"
        return Unknown(f"you may not {verb} {resource.in_rules}: a {role} with the rule {resource.rule(verb)} helps")
    except MissingError as error:
        return Unknown(str(error))


def _list(cluster: Cluster, resource: Resource, selector: str = "") -> list[Object] | Unknown:
    return _allowed(lambda: cluster.find(resource, selector=selector), resource, "list")


def _schemas(cluster: Cluster) -> Object | None:
    try:
        return cluster.page(OPENAPI_PATH)
    except MissingError:
        return None


def _operators(cluster: Cluster, namespace: str) -> list[Operator] | Unknown:
    try:
        found = cluster.find(DEPLOYMENTS, everywhere=True, selector=_OPERATOR)
        # The chart's nameOverride changes the label.
        found = found or [
            each for each in cluster.find(DEPLOYMENTS, everywhere=True) if _SETTINGS in _annotations(each)
        ]
    except ForbiddenError:
        there = cluster.within(namespace)
        answer = _allowed(lambda: there.find(DEPLOYMENTS, selector=_OPERATOR), DEPLOYMENTS, "list")
        if isinstance(answer, Unknown):
            return Unknown(f"{answer.why} in {namespace}, if that is where the operator runs (--operator-namespace)")
        found = answer
    return [_operator(cluster, deployment) for deployment in found]


def _operator(cluster: Cluster, deployment: Object) -> Operator:
    settings = _settings(_annotations(deployment).get(_SETTINGS))
    lease: Object | Unknown | None = None
    if not isinstance(settings, Unknown):
        elected = settings.get("leaderElection") or {}
        there = cluster.within(deployment["metadata"]["namespace"])
        name = elected.get("leaseName") or "qlora-operator"
        if elected.get("enabled") is not False:
            lease = _allowed(lambda: there.get(LEASES, name), LEASES, "get")
    return Operator(deployment, settings, lease)


def _annotations(deployment: Object) -> Mapping[str, str]:
    template: Mapping[str, Any] = (deployment.get("spec") or {}).get("template") or {}
    return (template.get("metadata") or {}).get("annotations") or {}


def _settings(text: str | None) -> Object | Unknown:
    if text is None:
        return Unknown(f"its pods have no annotation {_SETTINGS}, as those of the chart have")
    try:
        settings = YAML(typ="safe").load(io.StringIO(text))
    except (YAMLError, ValueError) as error:
        return Unknown(f"its settings are not YAML: {error}")
    return settings if isinstance(settings, dict) else Unknown("its settings are no object")


def _denied(cluster: Cluster) -> dict[str, Sequence[str]]:
    """By purpose, the rules that the user lacks."""
    missing = {purpose: lacking(cluster, rights) for purpose, rights in _PURPOSES.items()}
    return {
        purpose: [kind.rule(*verbs) for kind, verbs in rights.items()] for purpose, rights in missing.items() if rights
    }


def _with_trials(facts: Facts, cluster: Cluster) -> Facts:
    profiles = profiles_of(facts)[:_MOST_TRIALS]
    return replace(facts, trials={each.name: _trial(cluster, each) for each in profiles if _is_valid(each)})


def _is_valid(profile: NamedProfile) -> bool:
    try:
        Profile.model_validate(profile.content, extra="ignore")
    except ValidationError:
        return False
    return True


def _trial(cluster: Cluster, profile: NamedProfile) -> str | Unknown | None:
    """Return the API server's answer to a dry run of a train pod, None if admitted."""
    try:
        cluster.create(PODS, trial_pod(Profile.model_validate(profile.content, extra="ignore")), dry_run=True)
    except ForbiddenError:
        return Unknown(f"you may not create pods, even as a dry run: a Role with the rule {PODS.rule('create')} helps")
    except RejectedError as error:
        return str(error)
    return None


def trial_pod(profile: Profile) -> Object:
    """Return a pod with train's fields for admission: user, resources, restrictions."""
    train = profile.resources.train
    gpu = {profile.gpu_resource: "1"} if profile.gpu_resource else {}
    user = profile.run_as
    identity = {} if user is None else {"runAsUser": user.user, "runAsGroup": user.group, "fsGroup": user.fs_group}
    container = {
        "name": "trainer",
        "image": profile.image,
        "resources": {
            "requests": {"cpu": train.cpu, "memory": train.memory},
            "limits": {"memory": train.memory, **gpu},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    optional = {"runtimeClassName": profile.runtime_class_name, "serviceAccountName": profile.service_account_name}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "qlora-doctor-", "labels": {JOB_LABEL: "qlora-doctor"}},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, **identity},
            "containers": [container],
            **{key: value for key, value in optional.items() if value},
        },
    }


def examine(facts: Facts) -> list[Check]:
    """All checks, in the order of the table: the cluster, the profiles, the namespace."""
    return [*check_cluster(facts), *check_profiles(facts), *check_namespace(facts)]
