"""Promises of the chart with any values; the rest is in the golden renderings."""

from collections.abc import Callable, Iterator
from itertools import product

from qlora_api.profile import PROFILE_KIND
from qlora_api.spec.job import MUTABLE_FIELDS, QLoRAJobSpec
from qlora_operator.settings import ENV_SETTINGS, Settings
from tests.support.chart.rendered import NAMESPACE, RELEASE, SETTINGS, VERSION, Object, Rendered, place

Comparisons = Iterator[tuple[object, object]]
"""What was found, and what must be."""
Promise = Callable[[Rendered], Comparisons]
PROMISES: list[Promise] = []
# All rights of the operator: the verbs by resource.
_RIGHTS = {
    "qlorajobs.qlora.dev": {"get", "list", "watch", "create", "patch", "delete"},
    "qlorajobs.qlora.dev/status": {"patch"},
    "qlorasweeps.qlora.dev": {"get", "list", "watch", "delete"},
    "qlorasweeps.qlora.dev/status": {"patch"},
    "jobs.batch": {"get", "list", "watch", "create", "delete"},
    "controllerrevisions.apps": {"get", "list", "create", "patch"},
    "pods": {"list", "watch"},
    "pods/log": {"get"},
    "persistentvolumeclaims": {"get", "create", "patch", "delete"},
    "services": {"create"},
    "networkpolicies.networking.k8s.io": {"create", "patch"},
    "events": {"create"},
}
# Further rights in the whole cluster, whatever it serves.
PROFILE_RIGHTS = {
    "qloraprofiles.qlora.dev": {"list", "watch"},
    "qloraprofiles.qlora.dev/status": {"patch"},
    "namespaces": {"list"},
    "nodes": {"list"},
}
# Further rights in the operator's namespace.
OWN_RIGHTS = {
    "leases.coordination.k8s.io qlora-operator": {"get", "update"},
    # RBAC cannot limit it to a name: the object does not exist yet.
    "leases.coordination.k8s.io": {"create"},
}
_AGGREGATED = "rbac.authorization.k8s.io/aggregate-to-"
_KINDS = ("qlorajobs.qlora.dev", "qlorasweeps.qlora.dev")
_READ, _WRITE = {"get", "list", "watch"}, {"create", "update", "patch", "delete", "deletecollection"}
# Their rights, and which roles of the cluster they extend. A tenant writes no status: that is the operator's report.
TENANTS = {
    "view": (dict.fromkeys(_KINDS, _READ) | {f"{kind}/status": {"get"} for kind in _KINDS}, {"view", "edit", "admin"}),
    "edit": (dict.fromkeys(_KINDS, _WRITE), {"edit", "admin"}),
}
# Writes that are a report: of the status, and of Events.
_HARMLESS = {("qlorajobs.qlora.dev/status", "patch"), ("qlorasweeps.qlora.dev/status", "patch"), ("events", "create")}
# The sweep's own writes to the spec of a cell.
_OF_CELLS = {"suspend", "cleanupAfterSeconds"}
_OF_THE_POD = "serviceAccountName automountServiceAccountToken enableServiceLinks securityContext containers volumes"
_OF_THE_ADMINISTRATOR = "imagePullSecrets priorityClassName nodeSelector tolerations affinity"
_OF_THE_CONTAINER = """
name image imagePullPolicy env ports livenessProbe readinessProbe resources securityContext terminationMessagePolicy
volumeMounts
"""


def promise(function: Promise) -> Promise:
    PROMISES.append(function)
    return function


@promise
def each_has_the_rights_that_it_uses(chart: Rendered) -> Comparisons:
    """The operator cannot read a Secret; with `namespaces`, it has no right elsewhere."""
    values = chart.values
    roles = {place(each): (rights_of(each["rules"]), _extended(each)) for each in chart.of("Role", "ClusterRole")}
    granted = []
    for binding in chart.of("RoleBinding", "ClusterRoleBinding"):
        namespace, role = binding["metadata"].get("namespace"), binding["roleRef"]
        bound = place({"kind": role["kind"], "metadata": {"namespace": namespace, "name": role["name"]}})
        granted.append((namespace, role["kind"], binding["kind"], binding["subjects"], roles.pop(bound)))
    account = [{"kind": "ServiceAccount", "name": chart.pod["serviceAccountName"], "namespace": NAMESPACE}]
    kinds = ("Role", "RoleBinding") if values["namespaces"] else ("ClusterRole", "ClusterRoleBinding")
    wanted: list[object] = [(each, *kinds, account, (rights(values), set())) for each in values["namespaces"] or [None]]
    wanted.append((None, "ClusterRole", "ClusterRoleBinding", account, (PROFILE_RIGHTS, set())))
    if readers := values["tenantRoles"].get("profileReaders"):
        groups = [{"kind": "Group", "apiGroup": "rbac.authorization.k8s.io", "name": each} for each in readers]
        read = {"qloraprofiles.qlora.dev": _READ}
        wanted.append((None, "ClusterRole", "ClusterRoleBinding", groups, (read, set())))
    if values["settings"]["leaderElection"]["enabled"]:
        lease = chart.settings["leaderElection"]["leaseName"]
        own = {kind.replace("qlora-operator", lease): verbs for kind, verbs in OWN_RIGHTS.items()}
        wanted.append((NAMESPACE, "Role", "RoleBinding", account, (own, set())))
    yield sorted(granted, key=str), sorted(wanted, key=str)
    tenants = {f"ClusterRole {chart.name}-{role}": rights for role, rights in TENANTS.items()}
    yield roles, tenants if values["tenantRoles"]["create"] and not values["namespaces"] else {}


def rights_of(rules: list[Object]) -> dict[str, set[str]]:
    """Verbs by `resource.group/subresource`, as kubectl writes it, and the object's name."""
    rights: dict[str, set[str]] = {}
    for rule in rules:
        assert rule.keys() <= {"apiGroups", "resources", "resourceNames", "verbs"}, rule
        named = [f" {name}" for name in rule.get("resourceNames", [])] or [""]
        for group, resource, name in product(rule["apiGroups"], rule["resources"], named):
            kind, slash, subresource = resource.partition("/")
            rights.setdefault(f"{kind}.{group}".strip(".") + slash + subresource + name, set()).update(rule["verbs"])
    return rights


def _extended(role: Object) -> set[str]:
    """The roles of the cluster that it extends."""
    labels = role["metadata"]["labels"].items()
    return {name.removeprefix(_AGGREGATED) for name, value in labels if _AGGREGATED in name and value == "true"}


def rights(values: Object) -> dict[str, set[str]]:
    """All rights of the operator in the namespaces that it serves."""
    rights = dict(_RIGHTS)
    if values["kueue"]["enabled"]:
        rights["workloads.kueue.x-k8s.io"] = {"list"}
    if values["announce"]["enabled"]:
        rights["configmaps"] = {"create", "patch"}
    if not values["settings"]["progress"]["enabled"]:
        del rights["pods/log"]
    return rights


@promise
def only_the_operators_pod_gets_a_token(chart: Rendered) -> Comparisons:
    """Another pod that runs with its account by mistake gets none."""
    given = chart.values["serviceAccount"]
    name = given["name"] or (chart.name if given["create"] else "default")
    yield (chart.pod["serviceAccountName"], chart.pod["automountServiceAccountToken"]), (name, True)
    found = {place(each): each["automountServiceAccountToken"] for each in chart.of("ServiceAccount")}
    yield found, {f"ServiceAccount {NAMESPACE}/{name}": False} if given["create"] else {}


_WRITES_NO_STATUS = (
    "!authorizer.group('qlora.dev').resource('qlorajobs').subresource('status').namespace(request.namespace) "
    ".check('patch').allowed()"
)


@promise
def each_write_of_the_operator_is_admitted_by_a_policy(chart: Rendered) -> Comparisons:
    """RBAC selects kinds only. The API server tries the rules in test_admission.py."""
    policies = {each["metadata"]["name"].removeprefix(f"{chart.name}-"): each["spec"] for each in _admission(chart)}
    bound = [{"policyName": f"{chart.name}-{name}", "validationActions": ["Deny"]} for name in policies]
    yield [each["spec"] for each in chart.of("ValidatingAdmissionPolicyBinding")], bound
    account = f"system:serviceaccount:{NAMESPACE}:{chart.pod['serviceAccountName']}"
    if writers := policies.pop("revision-writers", None):
        rule = {"apiGroups": ["apps"], "apiVersions": ["v1"], "resources": ["controllerrevisions"]}
        rules = [rule | {"operations": ["CREATE", "UPDATE"]}]
        yield (writers["failurePolicy"], writers["matchConstraints"]), ("Fail", {"resourceRules": rules})
        yield [each["expression"] for each in writers["matchConditions"]], [_WRITES_NO_STATUS]
    granted = {(kind, verb) for kind, verbs in rights(chart.values).items() for verb in verbs & _WRITE}
    covered = {_right(spec["matchConstraints"], verb) for spec in policies.values() for verb in _verbs(spec)}
    yield covered, granted - _HARMLESS if chart.values["admission"]["enabled"] else set()
    for spec in policies.values():
        yield [each["expression"] for each in spec["matchConditions"]], [f"request.userInfo.username == '{account}'"]
        (rule,) = spec["matchConstraints"]["resourceRules"]
        versions = ["*"] if "qlora.dev" in rule["apiGroups"] else ["v1"]
        yield (spec["failurePolicy"], rule["apiVersions"]), ("Fail", versions)
    kept = {QLoRAJobSpec.model_fields[name].alias for name in MUTABLE_FIELDS | {"resources"}} - _OF_CELLS
    for changes in (spec["validations"][-1]["expression"] for name, spec in policies.items() if name == "cells"):
        yield {name for name in kept if f"object.spec.?{name} == oldObject.spec.?{name}" in changes}, kept


def _admission(chart: Rendered) -> list[Object]:
    return chart.of("ValidatingAdmissionPolicy")


def _right(constraints: Object, verb: str) -> tuple[str, str]:
    (rule,) = constraints["resourceRules"]
    (kind,), (group,) = rule["resources"], rule["apiGroups"]
    return f"{kind}.{group}".strip("."), verb


def _verbs(spec: Object) -> set[str]:
    (rule,) = spec["matchConstraints"]["resourceRules"]
    return {{"CREATE": "create", "UPDATE": "patch", "DELETE": "delete"}[each] for each in rule["operations"]}


@promise
def the_pod_has_no_privileges(chart: Rendered) -> Comparisons:
    """It has neither a writable root file system nor anything of its node."""
    identity = chart.values.get("runAs")
    numbers = {"runAsUser": identity["user"], "runAsGroup": identity["group"]} if identity else {}
    profile = {"seccompProfile": {"type": "RuntimeDefault"}}
    yield chart.pod["securityContext"], {"runAsNonRoot": True, **profile, **numbers}
    least = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    yield chart.container["securityContext"], least
    yield chart.pod.keys() - set(_OF_THE_ADMINISTRATOR.split()), set(_OF_THE_POD.split())
    yield chart.container.keys(), set(_OF_THE_CONTAINER.split())


@promise
def images_are_named_by_their_digest_if_it_is_given(chart: Rendered) -> Comparisons:
    yield chart.container["image"], _image(chart.values["image"])
    yield chart.container["imagePullPolicy"], chart.values["image"]["pullPolicy"]


def _image(given: Object) -> str:
    return given["repository"] + (f"@{given['digest']}" if given["digest"] else f":{given['tag'] or VERSION}")


@promise
def a_profile_has_the_defaults_that_it_does_not_replace(chart: Rendered) -> Comparisons:
    """One with GPUs keeps to nodes that have them, if its volume is bound to a node."""
    given, wanted = chart.values["profiles"], {}
    for name, profile in given.items():
        wanted[name] = {"image": _image(chart.values["trainer"]["image"]), **given["default"], **profile}
        is_bound = wanted[name].get("workspace", {}).get("topology") != "shared"
        if wanted[name].get("gpuResource") == "nvidia.com/gpu" and is_bound:
            wanted[name].setdefault("nodeSelector", {"nvidia.com/gpu.present": "true"})
        wanted[name] = {field: value for field, value in wanted[name].items() if value is not None}
    yield {each["metadata"]["name"]: each["spec"] for each in chart.of(PROFILE_KIND)}, wanted


@promise
def nothing_but_its_own_deletion_deletes_a_profile(chart: Rendered) -> Comparisons:
    """Its status has the GPU hours of each namespace. Helm creates it first in a hook, and then takes it over."""
    first = {"helm.sh/hook": "post-install"}
    first |= {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE}
    for profile in chart.of(PROFILE_KIND):
        yield profile["metadata"]["annotations"], {"helm.sh/resource-policy": "keep", **first}


@promise
def the_operator_reads_its_settings_and_writes_only_to_a_small_folder(chart: Rendered) -> Comparisons:
    """The settings are in the pod's template, so that a change of them replaces the pod."""
    given = chart.values["settings"]
    election = given["leaderElection"] | {"leaseName": chart.name}
    ports = {"probePort": 8080, "metricsPort": 9090}
    same = {name: chart.values[name] for name in ("namespaces", "jobNetworkPolicies")}
    wanted = given | ports | {"leaderElection": election, **same}
    yield chart.settings, wanted
    item = {"path": "settings.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{SETTINGS}']"}}
    settings = {"name": "settings", "downwardAPI": {"items": [item]}}
    yield chart.pod["volumes"], [settings, {"name": "tmp", "emptyDir": {"sizeLimit": "16Mi"}}]
    yield chart.container["env"], [{"name": ENV_SETTINGS, "value": "/etc/qlora-operator/settings.yaml"}]
    mounts = {"settings": ("/etc/qlora-operator", True), "tmp": ("/tmp", False)}
    found = {each["name"]: (each["mountPath"], each.get("readOnly", False)) for each in chart.container["volumeMounts"]}
    yield found, mounts


@promise
def the_operator_listens_where_it_is_probed(chart: Rendered) -> Comparisons:
    settings = Settings.model_validate(chart.settings)
    ports = {"probes": settings.probe_port, "metrics": settings.metrics_port}
    yield chart.container["ports"], [{"name": name, "containerPort": port} for name, port in ports.items()]
    probed = [chart.container[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")]
    yield probed, [{"path": path, "port": "probes"} for path in ("/healthz", "/readyz")]


@promise
def two_operators_never_work_at_once(chart: Rendered) -> Comparisons:
    """With an election, the old one works until the new one is ready."""
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    is_elected = chart.values["settings"]["leaderElection"]["enabled"]
    yield chart.deployment["spec"].keys(), {"replicas", "strategy", "revisionHistoryLimit", "selector", "template"}
    yield chart.deployment["spec"]["strategy"], rolling if is_elected else {"type": "Recreate"}
    yield chart.deployment["spec"]["replicas"], chart.values["replicas"]


@promise
def a_drain_leaves_one_of_several_operators(chart: Rendered) -> Comparisons:
    """It would never end for a single one, or for one that is not ready."""
    selector = chart.deployment["spec"]["selector"]
    budget = {"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow", "selector": selector}
    found = [each["spec"] for each in chart.of("PodDisruptionBudget")]
    yield found, [budget] if chart.values["replicas"] > 1 else []
    terms = chart.pod.get("affinity", {}).get("podAntiAffinity", {}).values()
    selected = [each["podAffinityTerm"]["labelSelector"] for term in terms for each in term]
    yield selected, [selector] * 2 if chart.values["replicas"] > 1 else []


@promise
def the_operators_pod_reaches_the_api_server_only(chart: Rendered) -> Comparisons:
    labels = chart.deployment["spec"]["template"]["metadata"]["labels"]
    selected = {"app.kubernetes.io/name": "qlora-operator", "app.kubernetes.io/instance": RELEASE}
    yield chart.deployment["spec"]["selector"], {"matchLabels": selected}
    yield labels | selected, labels
    found = {place(each): each["spec"] for each in chart.of("NetworkPolicy")}
    own = {f"NetworkPolicy {NAMESPACE}/{chart.name}": _of_the_operator(chart)}
    yield found, own if chart.values["networkPolicy"]["enabled"] else {}


def _of_the_operator(chart: Rendered) -> Object:
    """To the API server, and from the peers that may read the metrics; any node probes."""
    given = chart.values["networkPolicy"]
    peers = {"from": given["metricsFrom"]} if given["metricsFrom"] else {}
    addresses = [{"ipBlock": {"cidr": cidr}} for cidr in given["apiServerCIDRs"]]
    server = {"ports": [{"port": port} for port in given["apiServerPorts"]]}
    return {
        "podSelector": chart.deployment["spec"]["selector"],
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"ports": [{"port": "probes"}]}, {"ports": [{"port": "metrics"}], **peers}],
        "egress": [server | ({"to": addresses} if addresses else {})],
    }
