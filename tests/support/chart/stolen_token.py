"""Requests with a stolen token of the operator: denied ones, and those that policies cannot bound."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_api.profile import Profile
from qlora_operator.decisions.manifests.network import JobNetworkPolicies, build_policies
from qlora_operator.decisions.manifests.objects import build_claim, build_job, build_peer_policy, build_peer_service
from tests.support.builders import NAME, PROFILE, UID, make_job, resolved, revision_body
from tests.support.cluster.shared_pods import OWNER
from tests.support.manifests import MINIMAL
from tests.support.tenancy.tenancy import OPERATOR_NAMESPACE, path_of

Object = dict[str, Any]
TEAM, MERGE, APPLY = "team", "application/merge-patch+json", "application/apply-patch+yaml"
OTHERS, CELL, KEPT = "payroll", "rates-07", "kept"
"""The name of each object that is neither the operator's nor a job's, of a cell, and of a job's claim."""


@dataclass(frozen=True)
class Attempt:
    """One request, and the words of its denial."""

    method: str
    path: str
    body: Any
    says: str
    kind: str = "application/json"


def train_job() -> Object:
    return build_job(make_job(), resolved(PROFILE), "train", 1)


def foreign(kind: str, **parts: Any) -> Object:
    version = {"Job": "batch/v1", "NetworkPolicy": "networking.k8s.io/v1"}.get(kind, "v1")
    return {"apiVersion": version, "kind": kind, "metadata": {"name": OTHERS}} | parts


def cell(**metadata: Any) -> Object:
    """A cell as its sweep creates it."""
    labels = {"qlora.dev/sweep": OWNER["name"], "qlora.dev/sweep-uid": OWNER["uid"]}
    return MINIMAL | {"metadata": {"name": CELL, "labels": labels, "ownerReferences": [OWNER]} | metadata}


Change = Callable[[Object], None]


def _job(says: str, change: Change, namespace: str = TEAM) -> Attempt:
    """The Job of a step, as the operator creates it, but for one thing."""
    body = copy.deepcopy(train_job())
    change(body)
    body["metadata"]["namespace"] = namespace
    return Attempt("POST", path_of(namespace, "jobs"), body, says)


def _pod(says: str, **parts: Any) -> Attempt:
    return _job(says, lambda body: body["spec"]["template"]["spec"].update(parts))


def _container(says: str, **parts: Any) -> Attempt:
    return _job(says, lambda body: body["spec"]["template"]["spec"]["containers"][0].update(parts))


def _secured(says: str, **parts: Any) -> Attempt:
    def change(body: Object) -> None:
        body["spec"]["template"]["spec"]["containers"][0]["securityContext"].update(parts)

    return _job(says, change)


def _of_pod(says: str, **parts: Any) -> Attempt:
    return _job(says, lambda body: body["spec"]["template"]["spec"]["securityContext"].update(parts))


def _variable(says: str, name: str, **parts: Any) -> Attempt:
    def change(body: Object) -> None:
        body["spec"]["template"]["spec"]["containers"][0]["env"].append({"name": name, **parts})

    return _job(says, change)


def _volume(says: str, **kind: Any) -> Attempt:
    return _job(says, lambda body: body["spec"]["template"]["spec"]["volumes"].append({"name": "stolen", **kind}))


def _mount(says: str, path: str) -> Attempt:
    def change(body: Object) -> None:
        mount = {"name": "workspace", "mountPath": path}
        body["spec"]["template"]["spec"]["containers"][0]["volumeMounts"].append(mount)

    return _job(says, change)


def _takes_pods(body: Object) -> None:
    body["spec"] |= {"manualSelector": True, "selector": {"matchLabels": {"app": "database"}}}
    body["spec"]["template"]["metadata"]["labels"]["app"] = "database"


def _labels(**labels: str) -> Attempt:
    return _job(_OWNER, lambda body: body["spec"]["template"].update(metadata={"labels": labels}))


def _owner(**owner: Any) -> Attempt:
    return _job(_OWNER, lambda body: body["metadata"].update(ownerReferences=[owner] if owner else []))


def _create(plural: str, body: Object, says: str, namespace: str = TEAM) -> Attempt:
    return Attempt("POST", path_of(namespace, plural), body, says)


def _merge(plural: str, name: str, body: Object, says: str, namespace: str = TEAM) -> Attempt:
    return Attempt("PATCH", path_of(namespace, plural, name), body, says, MERGE)


def _delete(plural: str, name: str, says: str) -> Attempt:
    return Attempt("DELETE", path_of(TEAM, plural, name), {}, says)


def _applied(body: Object, namespace: str = TEAM, says: str = "") -> Attempt:
    """A NetworkPolicy, as the operator applies it."""
    path = f"{path_of(namespace, 'networkpolicies', body['metadata']['name'])}?fieldManager=qlora-operator&force=true"
    body = body | {"metadata": body["metadata"] | {"namespace": namespace}}
    return Attempt("PATCH", path, body, says, APPLY)


_NAMESPACE = "writes nothing in its own namespace and in protected ones"
_OWNER = "creates Jobs only for a QLoRAJob or QLoRASweep"
_IMAGE = "with images of the profiles only"
_ONE = "with one container, which runs a step"
_VARIABLES = "only the environment variables that steps read"
_PRIVILEGES = "creates pods without privileges"
_NODE = "in no namespace of their node"
_VOLUMES = "with volumes of these kinds only"
_MOUNTS = "only where steps read and write"
_TOKEN = "creates pods without a token"
_SCHEDULER = "leaves the node to the scheduler"
_CELLS = "only QLoRAJobs that are cells of a QLoRASweep"
_SUSPEND = "changes only suspend and cleanupAfterSeconds"
_POLICIES = "only the NetworkPolicies of jobs"
_SERVICES = "only headless Services for the pods of one QLoRAJob"
_OF_JOB = "only ControllerRevisions of a QLoRAJob"
_RESTORED = "only the owner of a restored ControllerRevision"
_OWNERS = "changes only the owners of a claim"
_CLAIMS = "only claims of jobs and sweeps, and creates them for new and empty volumes"
_CONFIG_MAPS = "only ConfigMaps with the label"
_TEMPLATE = train_job()["spec"]["template"]["metadata"]["labels"]
_CONTROLLER: Object = train_job()["metadata"]["ownerReferences"][0]
CLAIM = build_claim(make_job(), resolved(PROFILE))
REVISION = revision_body()
ADOPTED = {field: REVISION["metadata"][field] for field in ("labels", "ownerReferences")}
_WITHOUT_OWNER = {"name": f"{NAME}-9-restored", "labels": REVISION["metadata"]["labels"]}
RESTORED = REVISION | {"metadata": _WITHOUT_OWNER}
ANOTHERS = REVISION | {"metadata": {"name": f"{NAME}-7-database"}}
STORED = REVISION | {"metadata": REVISION["metadata"] | {"name": f"{NAME}-8-stored", "namespace": TEAM}}
_LABELED: Object = {"metadata": {"labels": {"a": "b"}}}
_STATEFUL_SET = _CONTROLLER | {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "database"}
_SERVICE = build_peer_service(make_job(resources={"nodes": 2}))
_JOBS, _SERVERS = build_policies(JobNetworkPolicies(), [PROFILE])
_OURS = {"qlora.dev/announcements": "true"}
_EVERY_POD: Object = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]}
_SHELL = {"name": "shell", "image": PROFILE.image, "command": ["sh"]}


def _with(body: Object, part: str, **changes: Any) -> Object:
    return body | {part: body[part] | changes}


def _revision(**metadata: Any) -> Attempt:
    body = _with(REVISION, "metadata", **metadata)
    return _create("controllerrevisions", body, _OF_JOB)


DENIED: dict[str, Attempt] = {
    "a pod in the system's namespace": _job(_NAMESPACE, lambda _: None, "kube-system"),
    "a pod in another protected namespace": _job(_NAMESPACE, lambda _: None, "kube-public"),
    "a pod in the operator's namespace": _job(_NAMESPACE, lambda _: None, OPERATOR_NAMESPACE),
    "a Job without an owner": _owner(),
    "a Job of a Deployment": _owner(**_CONTROLLER | {"apiVersion": "apps/v1", "kind": "Deployment"}),
    "a Job of a group that begins as ours": _owner(**_CONTROLLER | {"apiVersion": "qlora.dev.evil.example/v1"}),
    "a Job whose owner does not control it": _owner(**_CONTROLLER | {"controller": False}),
    "a Job of another owner than its label": _owner(**_CONTROLLER | {"uid": "00000000-0000-4000-8000-000000000000"}),
    "a Job that takes the pods of others": _job(_OWNER, _takes_pods),
    "a pod without the labels": _labels(),
    "a pod that no NetworkPolicy selects": _labels(**{k: v for k, v in _TEMPLATE.items() if k != "qlora.dev/job"}),
    "a pod of no step": _labels(**_TEMPLATE | {"qlora.dev/step": "shell"}),
    "train with the network of publish": _job(
        _ONE, lambda body: body["spec"]["template"]["metadata"]["labels"].update({"qlora.dev/step": "publish"})
    ),
    "a foreign image": _container(_IMAGE, image="evil.example/shell:1"),
    "an image whose name begins as ours": _container(_IMAGE, image="example.org/qlora-trainer-evil:1"),
    "an image of a registry that begins as ours": _container(_IMAGE, image="example.org/qlora-trainer:5000/evil:1"),
    "an image below ours": _container(_IMAGE, image="example.org/qlora-trainer/evil:1"),
    "another container": _job(_ONE, lambda body: body["spec"]["template"]["spec"]["containers"].append(_SHELL)),
    "a container before it": _pod(_ONE, initContainers=[_SHELL]),
    "a command": _container(_ONE, command=["python3", "-c", "print()"]),
    "arguments of no step": _container(_ONE, args=["shell"]),
    "a command after the start": _container(_ONE, lifecycle={"postStart": {"exec": {"command": ["sh"]}}}),
    "a command as a probe": _container(_ONE, livenessProbe={"exec": {"command": ["sh"]}}),
    "a port of the node": _container(_ONE, ports=[{"containerPort": 80, "hostPort": 80}]),
    "a library of the workspace": _variable(_VARIABLES, "LD_PRELOAD", value="/workspace/evil.so"),
    "modules of the workspace": _variable(_VARIABLES, "PYTHONPATH", value="/workspace"),
    "a Secret as a variable": _variable(
        _VARIABLES, "QLORA_IMAGE", valueFrom={"secretKeyRef": {"name": OTHERS, "key": "password"}}
    ),
    "a Secret as variables": _container(_ONE, envFrom=[{"secretRef": {"name": OTHERS}}]),
    "a privileged container": _secured(_PRIVILEGES, privileged=True, allowPrivilegeEscalation=True),
    "more privileges later": _secured(_PRIVILEGES, allowPrivilegeEscalation=True),
    "a capability": _secured(_PRIVILEGES, capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}),
    "the usual capabilities": _secured(_PRIVILEGES, capabilities={}),
    "a root file system to write to": _secured(_PRIVILEGES, readOnlyRootFilesystem=False),
    "root in the container": _secured(_PRIVILEGES, runAsUser=0),
    "root in the pod": _of_pod(_PRIVILEGES, runAsUser=0),
    "root by the image": _of_pod(_PRIVILEGES, runAsNonRoot=False),
    "every system call": _of_pod(_PRIVILEGES, seccompProfile={"type": "Unconfined"}),
    "a kernel setting": _of_pod(_PRIVILEGES, sysctls=[{"name": "net.ipv4.ip_forward", "value": "1"}]),
    "the network of the node": _pod(_NODE, hostNetwork=True),
    "the processes of the node": _pod(_NODE, hostPID=True),
    "the memory of the node": _pod(_NODE, hostIPC=True),
    "another address of a server": _pod(_NODE, hostAliases=[{"ip": "192.0.2.1", "hostnames": ["huggingface.co"]}]),
    "another DNS": _pod(_NODE, dnsPolicy="None", dnsConfig={"nameservers": ["192.0.2.1"]}),
    "the files of the node": _volume(_VOLUMES, hostPath={"path": "/"}),
    "a share of a server": _volume(_VOLUMES, nfs={"server": "192.0.2.1", "path": "/"}),
    "a driver of the node": _volume(_VOLUMES, csi={"driver": "secrets-store.csi.k8s.io"}),
    "a token as a volume": _volume(
        _VOLUMES, projected={"sources": [{"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}}]}
    ),
    "files in place of the trainer's": _mount(_MOUNTS, "/opt/qlora/lib"),
    "files in place of the system's": _mount(_MOUNTS, "/workspace/../etc"),
    "a token": _pod(_TOKEN, automountServiceAccountToken=True),
    "the account of another": _pod(_TOKEN, serviceAccountName=OTHERS),
    "the account of another, by the earlier field": _pod(_TOKEN, serviceAccount=OTHERS),
    "a node of its choice": _pod(_SCHEDULER, nodeName="control-plane"),
    "a place before all others": _pod(_SCHEDULER, priorityClassName="system-node-critical"),
    "the deletion of another's Job": Attempt(
        "DELETE", path_of(TEAM, "jobs", OTHERS), {}, "deletes only Jobs of a QLoRAJob or QLoRASweep"
    ),
    "a QLoRAJob of no sweep": _create("qlorajobs", cell(name="new", ownerReferences=[]), _CELLS),
    "a QLoRAJob of another sweep": _create("qlorajobs", cell(name="new", labels={"qlora.dev/sweep-uid": UID}), _CELLS),
    "a QLoRAJob in the system's namespace": _create("qlorajobs", cell(), _NAMESPACE, "kube-system"),
    "a user's QLoRAJob is suspended": _merge("qlorajobs", OTHERS, {"spec": {"suspend": True}}, _CELLS),
    "a user's QLoRAJob becomes a cell": _merge(
        "qlorajobs", OTHERS, {"metadata": {k: cell()["metadata"][k] for k in ("labels", "ownerReferences")}}, _CELLS
    ),
    "a cell is taken from its sweep": _merge("qlorajobs", CELL, {"metadata": {"ownerReferences": []}}, _CELLS),
    "a cell gets another queue": _merge(
        "qlorajobs", CELL, {"metadata": {"labels": {"kueue.x-k8s.io/queue-name": "others"}}}, _CELLS
    ),
    "a cell loses its gate": _merge("qlorajobs", CELL, {"spec": {"gate": None}}, _SUSPEND),
    "a cell gets more hours": _merge("qlorajobs", CELL, {"spec": {"budget": {"gpuHours": 1000}}}, _SUSPEND),
    "a cell is canceled": _merge("qlorajobs", CELL, {"spec": {"cancel": True}}, _SUSPEND),
    "a policy that opens every pod": _applied(foreign("NetworkPolicy", spec=_EVERY_POD), says=_POLICIES),
    "a policy of the operator's name that opens every pod": _applied(
        _with(_JOBS, "spec", **_EVERY_POD), says=_POLICIES
    ),
    "a policy in the system's namespace": _applied(_SERVERS, "kube-system", _NAMESPACE),
    "a policy of another job": _applied(
        _with(build_peer_policy(make_job(), JobNetworkPolicies().dns), "metadata", name="qlora-0"), says=_POLICIES
    ),
    "another's policy is opened": _merge("networkpolicies", OTHERS, {"spec": _EVERY_POD}, _POLICIES),
    "a revision of a StatefulSet": _revision(ownerReferences=[_STATEFUL_SET]),
    "a revision of another name": _revision(name="database-1"),
    "a revision of another job than its label": _revision(labels={"qlora.dev/job-uid": OTHERS}),
    "another's revision becomes one of a job": _merge(
        "controllerrevisions", ANOTHERS["metadata"]["name"], {"metadata": ADOPTED}, _RESTORED
    ),
    "a revision of a job gets a label": _merge("controllerrevisions", STORED["metadata"]["name"], _LABELED, _RESTORED),
    "a restored revision gets no owner": _merge("controllerrevisions", RESTORED["metadata"]["name"], _LABELED, _OF_JOB),
    "a revision in the system's namespace": _create(
        "controllerrevisions", _with(REVISION, "metadata", namespace="kube-system"), _NAMESPACE, "kube-system"
    ),
    "a Service for the pods of others": _create(
        "services", _with(_SERVICE, "spec", selector={"app": "database"}), _SERVICES
    ),
    "a Service that takes an address": _create(
        "services", _with(_SERVICE, "spec", externalIPs=["192.0.2.1"]), _SERVICES
    ),
    "a Service with an address": _create("services", _with(_SERVICE, "spec", clusterIP=""), _SERVICES),
    "a Service of another name": _create("services", _with(_SERVICE, "metadata", name="api"), _SERVICES),
    "a claim of others": _create("persistentvolumeclaims", _with(CLAIM, "metadata", labels={}), _CLAIMS),
    "a copy of another's claim": _create(
        "persistentvolumeclaims",
        _with(CLAIM, "spec", dataSource={"kind": "PersistentVolumeClaim", "name": OTHERS}),
        _CLAIMS,
    ),
    "a volume of its choice": _create("persistentvolumeclaims", _with(CLAIM, "spec", volumeName="backup"), _CLAIMS),
    "another's claim is deleted": _delete("persistentvolumeclaims", OTHERS, "deletes only claims of jobs and sweeps"),
    "another's claim gets the labels": _merge(
        "persistentvolumeclaims", OTHERS, {"metadata": {"labels": CLAIM["metadata"]["labels"]}}, _OWNERS
    ),
    "a claim of a job gets another label": _merge(
        "persistentvolumeclaims", KEPT, {"metadata": {"labels": {"a": "b"}}}, _OWNERS
    ),
    "a job that runs is deleted": _delete("qlorajobs", OTHERS, "deletes only QLoRAJobs that have ended"),
    "a sweep that runs is deleted": _delete(
        "qlorasweeps", str(OWNER["name"]), "deletes only QLoRASweeps that have ended"
    ),
    "a ConfigMap without the label": _create(
        "configmaps", foreign("ConfigMap", metadata={"name": "new"}), _CONFIG_MAPS
    ),
    "another's ConfigMap is changed": _merge("configmaps", OTHERS, {"data": {"Corefile": "."}}, _CONFIG_MAPS),
    "another's ConfigMap gets the label": _merge("configmaps", OTHERS, {"metadata": {"labels": _OURS}}, _CONFIG_MAPS),
    "a ConfigMap loses the label": _merge("configmaps", "adapters", {"metadata": {"labels": None}}, _CONFIG_MAPS),
}

_RBAC = "cannot"
FORBIDDEN: dict[str, Attempt] = {
    "a running Job gets other labels": _merge("jobs", NAME, {"metadata": {"labels": {"a": "b"}}}, _RBAC),
    "a suspended Job is resumed": _merge("jobs", NAME, {"spec": {"suspend": False}}, _RBAC),
    "all Jobs are deleted": Attempt("DELETE", path_of(TEAM, "jobs"), {}, _RBAC),
    "a pod": _create("pods", foreign("Pod"), _RBAC),
    "a Secret": Attempt("GET", path_of(TEAM, "secrets", OTHERS), None, _RBAC),
    "a token of an account": _create("serviceaccounts/default/token", {}, _RBAC),
    "a policy of admission is removed": Attempt(
        "DELETE",
        "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/qlora-operator-jobs",
        {},
        _RBAC,
    ),
}

LEFT: dict[str, Attempt] = {
    # SECURITY.md lists these.
    "a Secret of the namespace as a volume": _volume("", secret={"secretName": OTHERS}),
    "another server than the profile's": _variable("", "HF_ENDPOINT", value="https://evil.example"),
    "a claim of the namespace": _volume("", persistentVolumeClaim={"claimName": OTHERS}),
    "a Job of an owner that does not exist": _job("", lambda _: None),
}

NETWORKED = Profile.model_validate(
    PROFILE.dump()
    | {
        "caConfigMap": {"name": "company-ca"},
        "httpsProxy": "http://proxy.example.org:3128",
        "proxySecretName": "proxy-login",
        "imagePullSecrets": ["pull"],
        "serviceAccountName": "research",
        "cloudIdentity": {"provider": "google", "serviceAccountName": "qlora-data"},
        "googleStorage": {"endpoint": "https://gcs.example.org"},
        "azureStorage": {"account": "team", "endpoint": "https://blob.example.org"},
        "objectStore": {"endpoint": "https://s3.example.org", "region": "eu-central-1"},
        "hubEndpoint": "https://hub.example.org",
        "registries": ["registry.example.org"],
        "tracking": {"mlflow": {"url": "https://mlflow.example.org"}, "wandb": {"url": "https://api.wandb.ai"}},
        "signingKey": {"name": "signing"},
        "modelCache": {"claimName": "models"},
        "nccl": {"NCCL_DEBUG": "WARN"},
        "gpuHourPrice": "2.50",
        "currency": "EUR",
        "runtimeClassName": "nvidia",
        "runAs": {},
    }
)
"""A profile that sets everything that a pod may get."""
