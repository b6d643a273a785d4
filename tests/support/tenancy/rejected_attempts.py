"""Attempts of a tenant that the API server rejects: one request each, with its answer."""

import json
from dataclasses import dataclass
from typing import Any

from tests.support.manifests import MINIMAL, with_value
from tests.support.sweeps import SWEEP
from tests.support.tenancy.tenancy import CAPPED, OPERATOR_NAMESPACE, TENANT, VICTIM, path_of

RBAC = "/apis/rbac.authorization.k8s.io/v1"
MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class Rejected:
    """One request of the tenant, and how the API server answers it."""

    method: str
    path: str
    body: Any
    status: int
    says: str
    kind: str = "application/json"


def job(name: str = "attempt", **metadata: Any) -> dict[str, Any]:
    """A job that nothing is wrong with."""
    return MINIMAL | {"metadata": {"name": name, **metadata}}


def manifest(path: str, value: Any, says: str, *, status: int = 422) -> Rejected:
    """A QLoRAJob with one changed field."""
    return Rejected("POST", path_of(TENANT, "qlorajobs"), with_value(job(), path, value), status, says)


def forbidden(method: str, path: str, body: Any = None, says: str = 'User "mallory" cannot') -> Rejected:
    """A request that the tenant has no right to."""
    return Rejected(method, path, body, 403, says, MERGE if method == "PATCH" else "application/json")


def unknown(path: str, value: Any) -> Rejected:
    """A field that no QLoRAJob has."""
    return manifest(path, value, f'unknown field "{path}"', status=400)


def pod(**spec: Any) -> dict[str, Any]:
    """A pod that the level `restricted` admits, apart from the given fields."""
    security = {
        "allowPrivilegeEscalation": False,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    # The host has no listener, so that a node asks no server for it.
    container = {"name": "trainer", "image": "localhost:9/attack", "securityContext": security}
    metadata = {"name": "attempt"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": [container], **spec}}


def _pod(**spec: Any) -> Rejected:
    return Rejected("POST", path_of(TENANT, "pods"), pod(**spec), 403, 'violates PodSecurity "restricted')


def _role(kind: str, namespace: str = "", **more: Any) -> Rejected:
    where = f"/namespaces/{namespace}" if namespace else ""
    body = {"apiVersion": RBAC.removeprefix("/apis/"), "kind": kind, "metadata": {"name": "attempt"}, **more}
    return forbidden("POST", f"{RBAC}{where}/{kind.lower()}s", body)


_TO_MYSELF = [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "mallory"}]
_OPERATORS_ROLE = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "qlora-operator"}
_SECRETS = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]
_ADDRESS = "must be hf://ORG/NAME, pvc://CLAIM/PATH"
_TOO_LONG = "Too long"
_EVENT = {
    "apiVersion": "v1",
    "kind": "Event",
    "metadata": {"name": "tune.attempt"},
    "reason": "Succeeded",
    "message": "the adapter is at s3://mallory/adapter",
    "source": {"component": "qlora-operator"},
    "involvedObject": {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "namespace": VICTIM, "name": "tune"},
}

MANIFESTS = {
    "another namespace in a reference to a token": unknown("spec.model.tokenSecretRef.namespace", VICTIM),
    "another namespace in a reference to credentials": unknown("spec.output.secretRef.namespace", VICTIM),
    "another namespace for the pods": unknown("spec.scheduling.namespace", VICTIM),
    "an image": unknown("spec.scheduling.image", "example.org/attack"),
    "a command": unknown("spec.training.command", ["sh"]),
    "an environment variable": unknown("spec.training.env", [{"name": "LD_PRELOAD", "value": "/workspace/a.so"}]),
    "a variable from a Secret": unknown("spec.envFrom", [{"secretRef": {"name": "any"}}]),
    "a volume of the node": unknown("spec.workspace.volumes", [{"hostPath": {"path": "/"}}]),
    "a pod template": unknown("spec.podTemplate", {"spec": {"hostPID": True}}),
    "a privileged container": unknown("spec.resources.securityContext", {"privileged": True}),
    "the network of the node": unknown("spec.scheduling.hostNetwork", True),
    "a service account": unknown("spec.scheduling.serviceAccountName", "admin"),
    "a cloud identity": unknown("spec.scheduling.cloudIdentity", {"provider": "aws", "serviceAccountName": "admin"}),
    "a proxy": unknown("spec.scheduling.httpsProxy", "http://evil.example:3128"),
    "an authority": unknown("spec.scheduling.caConfigMap", {"name": "mine"}),
    "a storage account": unknown("spec.output.account", "evil"),
    "a runtime class": unknown("spec.scheduling.runtimeClassName", "none"),
    "remote code": unknown("spec.model.trustRemoteCode", True),
    "a server of its own": unknown("spec.model.endpoint", "https://attack.example.org"),
    "a path out of a claim": manifest("spec.dataset.source", "pvc://data/../../etc/passwd", _ADDRESS),
    "a path out of a claim, encoded": manifest("spec.dataset.source", "pvc://data/%2e%2e/etc/passwd", _ADDRESS),
    "a path out of a claim, for Windows": manifest("spec.dataset.source", "pvc://data/..\\..\\etc", _ADDRESS),
    "a path out of a claim, at the model": manifest("spec.model.source", "pvc://data/models/..", _ADDRESS),
    "a path out of a claim, at the destination": manifest("spec.output.destination", "pvc://a/../b", "must be pvc://"),
    "a path of the root": manifest("spec.dataset.source", "pvc:///etc/passwd", _ADDRESS),
    "a hidden file": manifest("spec.dataset.source", "pvc://data/.ssh/id_rsa", _ADDRESS),
    "a path out of a bucket": manifest("spec.dataset.source", "s3://bucket/../other/rows.jsonl", _ADDRESS),
    "a path out of a repository": manifest("spec.model.source", "hf://org/../../other", _ADDRESS),
    "a path out of a ConfigMap": manifest("spec.dataset.source", "configMap://rows/../secret", _ADDRESS),
    "a path out of a registry": manifest("spec.model.source", "oci://registry.example.org/../v2/_catalog:v1", _ADDRESS),
    "a file of the pod": manifest("spec.dataset.source", "file:///var/run/secrets/token", _ADDRESS),
    "the metadata server": manifest("spec.dataset.source", "http://169.254.169.254/latest/meta-data", _ADDRESS),
    "the metadata server, in IPv6": manifest("spec.model.source", "oci://[fd00:ec2::254]:80/a:v1", _ADDRESS),
    "the metadata server, as a number": manifest("spec.model.source", "oci://2852039166/a:v1", _ADDRESS),
    "a server in the cluster": manifest("spec.dataset.source", "https://kubernetes.default.svc/api", _ADDRESS),
    "credentials in an address": manifest("spec.model.source", "oci://user:word@registry.example.org/a:v1", _ADDRESS),
    "credentials in the address of a bucket": manifest("spec.dataset.source", "s3://KEY:WORD@bucket/rows", _ADDRESS),
    "another scheme": manifest("spec.dataset.source", "gopher://attack.example.org/rows", _ADDRESS),
    "a scheme in capitals": manifest("spec.dataset.source", "FILE:///etc/passwd", _ADDRESS),
    "an address in an address": manifest("spec.model.source", "hf://https://attack.example.org/model", _ADDRESS),
    "a variable in an address": manifest("spec.dataset.source", "pvc://$(HOSTNAME)/rows", _ADDRESS),
    "a query in an address": manifest("spec.dataset.source", "s3://bucket/rows?acl", _ADDRESS),
    "a line break in an address": manifest("spec.dataset.source", "pvc://data/rows\nhttp://attack", _ADDRESS),
    "a line break after an address": manifest("spec.dataset.source", "pvc://data/rows.jsonl\n", _ADDRESS),
    "a zero byte in an address": manifest("spec.dataset.source", "pvc://data/rows\x00.jsonl", _ADDRESS),
    "a text direction in an address": manifest("spec.dataset.source", "pvc://data/\u202elnosj.swor", _ADDRESS),
    "a letter that looks like another": manifest("spec.dataset.source", "pvc://d\u0430ta/rows.jsonl", _ADDRESS),
    "an address that is too long": manifest("spec.dataset.source", "pvc://data/" + "a" * 502, _TOO_LONG),
    "an option for a revision": manifest("spec.model.revision", "--upload-pack=sh", "spec.model.revision"),
    "a path for the key of a Secret": manifest("spec.model.tokenSecretRef", {"name": "a", "key": "../a"}, "key"),
    "a path for a claim": manifest("spec.workspace.claimName", "../../victim", "spec.workspace.claimName"),
    "a path for a profile": manifest("spec.scheduling.profileName", "../default", "spec.scheduling.profileName"),
    "a path for a queue": manifest("spec.scheduling.queueName", "victim/queue", "spec.scheduling.queueName"),
    "a priority of the cluster": manifest(
        "spec.scheduling.priorityClassName", "system-node-critical", "reserved for the cluster"
    ),
    "a label key with a path": manifest("spec.scheduling.nodeSelector", {"../a/b": "c"}, "a label key is NAME"),
    "too many labels": manifest("spec.scheduling.nodeSelector", {f"a{n}": "" for n in range(17)}, "at most 16"),
    "too many tolerations": manifest("spec.scheduling.tolerations", [{"operator": "Exists"}] * 17, "at most 16"),
    "too many layers": manifest("spec.lora.targetModules", [f"m{n}" for n in range(33)], "at most 32"),
    "too many GPUs": manifest("spec.resources.gpus", 10**9, "less than or equal to 16"),
    "a negative number of GPUs": manifest("spec.resources.gpus", -1, "greater than or equal to 1"),
    "a rank that fills any memory": manifest("spec.lora.rank", 2**31 - 1, "less than or equal to 1024"),
    "a number beyond any": manifest("spec.training.learningRate", 1e308, "less than or equal to 1"),
    "retries without end": manifest("spec.retry.maxFailures", 10**6, "less than or equal to 20"),
    "a workspace of nothing": manifest("spec.workspace.size", "-1Gi", "spec.workspace.size"),
    "a workspace of everything": manifest("spec.workspace.size", "1e18", "spec.workspace.size"),
    "a quantity of many digits": manifest("spec.resources.memory", "9" * 33, _TOO_LONG),
    "a name that is too long": Rejected("POST", path_of(TENANT, "qlorajobs"), job("a" * 46), 422, "at most 45"),
    "a path for a name": Rejected("POST", path_of(TENANT, "qlorajobs"), job("../../victim"), 422, "metadata.name"),
    "control characters in a name": Rejected(
        "POST", path_of(TENANT, "qlorajobs"), job("a\x1b[2Jb"), 422, "metadata.name"
    ),
    "a path for a label of the operator": Rejected(
        "POST", path_of(TENANT, "qlorajobs"), job(labels={"qlora.dev/job": "../victim"}), 422, "metadata.labels"
    ),
    "annotations beyond any size": Rejected(
        "POST", path_of(TENANT, "qlorajobs"), job(annotations={"a": "x" * 300_000}), 422, _TOO_LONG
    ),
    "a manifest beyond any size": Rejected(
        "POST",
        path_of(TENANT, "qlorajobs"),
        (json.dumps(job())[:-1] + " " * 4_000_000 + "}").encode(),
        413,
        "too large",
    ),
    "the namespace of another tenant in a manifest": Rejected(
        "POST", path_of(TENANT, "qlorajobs"), job(namespace=VICTIM), 400, "does not match"
    ),
}
SWEEPS = {
    "another model in a cell": Rejected(
        "POST",
        path_of(TENANT, "qlorasweeps"),
        with_value(SWEEP | {"metadata": {"name": "attempt"}}, "spec.grid.model", ["pvc://victim/model"]),
        400,
        'unknown field "spec.grid.model"',
    ),
    "cells beyond any number": Rejected(
        "POST",
        path_of(TENANT, "qlorasweeps"),
        with_value(
            SWEEP | {"metadata": {"name": "attempt"}},
            "spec.grid",
            {"rank": list(range(1, 65)), "alpha": list(range(1, 65))},
        ),
        422,
        "more than 64 cells",
    ),
    "a path out of a claim in a template": Rejected(
        "POST",
        path_of(TENANT, "qlorasweeps"),
        with_value(
            SWEEP | {"metadata": {"name": "attempt"}}, "spec.template.spec.dataset.source", "pvc://data/../../etc"
        ),
        422,
        _ADDRESS,
    ),
    "a sweep for another": forbidden("POST", path_of(VICTIM, "qlorasweeps"), SWEEP),
    "the sweeps of another": forbidden("GET", path_of(VICTIM, "qlorasweeps")),
    "the status of a sweep": forbidden(
        "PATCH", path_of(TENANT, "qlorasweeps", "any", "status"), {"status": {"phase": "Succeeded"}}
    ),
}
_SECRET = path_of(VICTIM, "secrets", "hub")
_JOB = path_of(VICTIM, "qlorajobs", "tune")
RIGHTS = {
    "read a Secret of another": forbidden("GET", _SECRET),
    "list the Secrets of another": forbidden("GET", path_of(VICTIM, "secrets")),
    "list the Secrets of all": forbidden("GET", "/api/v1/secrets"),
    "read the data of another": forbidden("GET", path_of(VICTIM, "configmaps", "rows")),
    "read the job of another": forbidden("GET", _JOB),
    "list the jobs of all": forbidden("GET", "/apis/qlora.dev/v1beta1/qlorajobs"),
    "watch the jobs of all": forbidden("GET", "/apis/qlora.dev/v1beta1/qlorajobs?watch=true"),
    "change the job of another": forbidden("PATCH", _JOB, {"spec": {"suspend": True}}),
    "delete the job of another": forbidden("DELETE", _JOB),
    "delete all jobs of another": forbidden("DELETE", path_of(VICTIM, "qlorajobs")),
    "create a job for another": forbidden("POST", path_of(VICTIM, "qlorajobs"), job()),
    "create a pod for another": forbidden("POST", path_of(VICTIM, "pods"), pod()),
    "delete the claim of another": forbidden("DELETE", path_of(VICTIM, "persistentvolumeclaims", "data")),
    "read the log of another": forbidden("GET", path_of(VICTIM, "pods", "any", "log")),
    "a shell in a pod of another": forbidden("POST", path_of(VICTIM, "pods", "any", "exec?command=sh")),
    "post an Event to another": forbidden("POST", path_of(VICTIM, "events"), _EVENT),
    "an Event about the job of another": Rejected(
        "POST", path_of(TENANT, "events"), _EVENT, 422, "does not match event.namespace"
    ),
    "write the status of a job": forbidden(
        "PATCH", path_of(TENANT, "qlorajobs", "any", "status"), {"status": {"phase": "Succeeded"}}
    ),
    "replace the status of a job": forbidden("PUT", path_of(TENANT, "qlorajobs", "any", "status"), job("any")),
    "write the status of a pod": forbidden(
        "PATCH", path_of(TENANT, "pods", "any", "status"), {"status": {"phase": "Succeeded"}}
    ),
    "a debugging container in a pod": forbidden(
        "PATCH", path_of(TENANT, "pods", "any", "ephemeralcontainers"), {"spec": {"ephemeralContainers": []}}
    ),
    "bind a pod to a node": forbidden(
        "POST",
        path_of(TENANT, "pods", "any", "binding"),
        {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "any"}, "target": {"kind": "Node", "name": "a"}},
    ),
    "a role that reads Secrets": _role("Role", TENANT, rules=_SECRETS),
    "a role in the cluster": _role("ClusterRole", rules=_SECRETS),
    "the operator's rights in its namespace": _role(
        "RoleBinding", TENANT, roleRef=_OPERATORS_ROLE, subjects=_TO_MYSELF
    ),
    "the operator's rights in the cluster": _role("ClusterRoleBinding", roleRef=_OPERATORS_ROLE, subjects=_TO_MYSELF),
    "more rights for the chart's role": forbidden(
        "PATCH", f"{RBAC}/clusterroles/qlora-operator-edit", {"rules": _SECRETS}
    ),
    "a token of the operator": forbidden(
        "POST",
        path_of(OPERATOR_NAMESPACE, "serviceaccounts", "qlora-operator", "token"),
        {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}},
    ),
    "read the operator's settings": forbidden(
        "GET", f"/apis/apps/v1/namespaces/{OPERATOR_NAMESPACE}/deployments/qlora-operator"
    ),
    "read the operator's settings on its pod": forbidden("GET", path_of(OPERATOR_NAMESPACE, "pods")),
    "read the operator's log": forbidden("GET", path_of(OPERATOR_NAMESPACE, "pods", "any", "log")),
    "change the rules of the resource": forbidden(
        "PATCH",
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev",
        {"spec": {"scope": "Cluster"}},
    ),
    "delete the resource with all jobs": forbidden(
        "DELETE", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/qlorajobs.qlora.dev"
    ),
    "a webhook that sees every job": forbidden(
        "POST",
        "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "attempt"},
        },
    ),
    "a priority above all": forbidden(
        "POST",
        "/apis/scheduling.k8s.io/v1/priorityclasses",
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": "attempt"},
            "value": 10**9,
        },
    ),
    "a lower Pod Security level": forbidden(
        "PATCH",
        f"/api/v1/namespaces/{TENANT}",
        {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}},
    ),
    "a higher quota": forbidden(
        "PATCH", path_of(CAPPED, "resourcequotas", "quota"), {"spec": {"hard": {"pods": "99"}}}
    ),
    "no quota": forbidden("DELETE", path_of(CAPPED, "resourcequotas", "quota")),
}
PODS = {
    "a privileged pod": _pod(hostPID=True),
    "a pod with the root of the node": _pod(volumes=[{"name": "root", "hostPath": {"path": "/"}}]),
    "a pod in the network of the node": _pod(hostNetwork=True),
    "a pod as root": _pod(securityContext={"runAsUser": 0}),
    "a pod with the claim of another, by namespace": Rejected(
        "POST",
        path_of(TENANT, "pods"),
        pod(volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "data", "namespace": VICTIM}}]),
        400,
        "unknown field",
    ),
}
REJECTED = MANIFESTS | SWEEPS | RIGHTS | PODS
