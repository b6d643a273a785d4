"""A stolen token of the operator, at a real API server: the requests that the chart's admission policies deny.

Each attempt is made twice: without the policies it succeeds, so that only they deny it.
"""

import base64
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import yaml

from devcluster.controlplane import ControlPlane, running
from devcluster.errors import ClusterError
from devcluster.kubectl import Kubectl
from qlora_api.profile import Profile
from qlora_operator.decisions.manifests.network import JobNetworkPolicies, build_policies
from qlora_operator.decisions.manifests.objects import build_claim, build_job, build_peer_policy, build_peer_service
from qlora_operator.decisions.plan import CreateJob
from qlora_operator.decisions.sweeps.pods import build_pod_job
from qlora_operator.decisions.sweeps.sweep import build_cell, build_sweep_claim, cleanup, stop, suspension
from tests.support.builders import NAME, PROFILE, make_job, resolved
from tests.support.chart.rendered import NAMESPACE, Helm, Object
from tests.support.chart.stolen_token import (
    ADOPTED,
    ANOTHERS,
    APPLY,
    CELL,
    CLAIM,
    DENIED,
    FORBIDDEN,
    KEPT,
    LEFT,
    MERGE,
    NETWORKED,
    OTHERS,
    RESTORED,
    REVISION,
    STORED,
    TEAM,
    Attempt,
    cell,
    foreign,
    train_job,
)
from tests.support.cluster.nodeless import apply_definitions
from tests.support.cluster.shared_pods import NAMES, OWNER, POD, Pod
from tests.support.job_manifests import EVERYTHING, STEPS
from tests.support.manifests import MINIMAL
from tests.support.sweeps import SWEEP
from tests.support.tenancy.tenancy import Client, path_of
from tests.support.waiting import eventually

ENDED = "ended"
_REPOSITORY = PROFILE.image.partition("@")[0]
VALUES: Object = {
    "announce": {"enabled": True},
    "admission": {"images": [_REPOSITORY], "serviceAccounts": ["research"]},
    "profiles": {
        "other": {
            "image": "registry.example.org:5000/team/trainer:1@sha256:" + "1" * 64,
            "cloudIdentity": {"provider": "google", "serviceAccountName": "qlora-data"},
        }
    },
}


@dataclass(frozen=True)
class Stolen:
    """The token's holder, and the answers to its attempts before the policies existed."""

    client: Client
    kubectl: Kubectl
    before: dict[str, tuple[int, str]]

    def tries(self, attempt: Attempt) -> tuple[int, str]:
        """Status and message of the answer to the request, which changes nothing."""
        path = attempt.path + ("&" if "?" in attempt.path else "?") + "dryRun=All"
        # The options of a deletion are in its body.
        body = attempt.body | {"dryRun": ["All"]} if attempt.method == "DELETE" else attempt.body
        status, answer = self.client.send(attempt.method, path, body, kind=attempt.kind)
        return status, str(answer.get("message", ""))

    def is_denied(self, attempt: Attempt) -> bool:
        return self.tries(attempt)[0] >= 400


@pytest.fixture(scope="module")
def stolen(helm: Helm) -> Iterator[Stolen]:
    """Objects of users and of jobs, the chart's roles and policies, and the token of its ServiceAccount."""
    with running() as plane:
        apply_definitions(plane)
        for name in (NAMESPACE, TEAM):
            plane.kubectl("create", "namespace", name)
        objects = helm.template(VALUES | {"crds": {"install": False}})
        roles = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")
        plane.kubectl.apply(yaml.safe_dump_all([each for each in objects if each["kind"] in roles]))
        plane.kubectl("create", "--filename=-", f"--namespace={TEAM}", input_text=json.dumps(_existing()))
        writes = ("--verb=create", "--resource=controllerrevisions.apps")
        plane.kubectl("create", "role", "tenant", *writes, f"--namespace={TEAM}")
        plane.kubectl("create", "rolebinding", "tenant", "--role=tenant", "--user=tenant", f"--namespace={TEAM}")
        ended = '{"status": {"completionTime": "2026-01-02T03:04:05Z"}}'
        where = (ENDED, f"--namespace={TEAM}", "--subresource=status", "--type=merge")
        plane.kubectl("patch", "qlorajob", *where, f"--patch={ended}")
        client = _client(plane)
        found = Stolen(client, plane.kubectl, {})
        found.before.update({name: found.tries(each) for name, each in DENIED.items()})
        admission = [each for each in objects if each["kind"].startswith("ValidatingAdmission")]
        plane.kubectl.apply(yaml.safe_dump_all(admission))
        # The API server loads the policies one after the other.
        one_of_each = {attempt.path.rpartition("/")[0] + attempt.says: attempt for attempt in DENIED.values()}
        for attempt in one_of_each.values():
            eventually(partial(found.is_denied, attempt), seconds=60, every=0.2, what=attempt.says)
        yield found


def _existing() -> Object:
    user = MINIMAL | {"metadata": {"name": OTHERS}}
    pods = {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a"}]}
    policy = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    claim = CLAIM["spec"] | {"resources": {"requests": {"storage": "1Gi"}}}
    adapters = foreign("ConfigMap") | {"metadata": {"name": "adapters", "labels": {"qlora.dev/announcements": "true"}}}
    gate = {"maxEvalLoss": 2.0}
    held_out = MINIMAL["spec"]["dataset"] | {"eval": {"fraction": 0.1}}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            user,
            cell() | {"spec": MINIMAL["spec"] | {"gate": gate, "dataset": held_out}},
            train_job() | {"metadata": train_job()["metadata"] | {"name": NAME}},
            foreign("Job", spec={"template": {"spec": pods}}),
            MINIMAL | {"metadata": {"name": ENDED}},
            SWEEP | {"metadata": {"name": OWNER["name"]}},
            foreign("PersistentVolumeClaim", spec=claim),
            CLAIM | {"metadata": {"name": KEPT, "labels": CLAIM["metadata"]["labels"]}},
            foreign("NetworkPolicy", spec=policy),
            STORED,
            RESTORED,
            ANOTHERS,
            foreign("ConfigMap", data={"a": "b"}),
            adapters,
        ],
    }


def _client(plane: ControlPlane) -> Client:
    token = plane.kubectl("create", "token", "qlora-operator", f"--namespace={NAMESPACE}").strip()
    cluster = yaml.safe_load(plane.kubeconfig.read_text())["clusters"][0]["cluster"]
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    return Client(plane.server, context, {"Authorization": f"Bearer {token}"})


@pytest.mark.parametrize("name", DENIED)
def test_a_stolen_token_is_denied(stolen: Stolen, name: str) -> None:
    attempt = DENIED[name]
    status, message = stolen.tries(attempt)
    assert (status, attempt.says in message) == (422, True), (status, message)
    assert "ValidatingAdmissionPolicy 'qlora-operator-" in message
    assert stolen.before[name][0] < 300, f"denied without the policies: {stolen.before[name]}"


@pytest.mark.parametrize("revision", [REVISION, RESTORED], ids=["of a job", "restored"])
def test_a_backup_tool_writes_revisions_of_jobs_and_no_tenant_does(stolen: Stolen, revision: Object) -> None:
    """The pods of a job without status are made from it."""
    body = json.dumps(revision | {"metadata": revision["metadata"] | {"name": f"{NAME}-6-new", "namespace": TEAM}})

    def answer(*user: str) -> str:
        try:
            return stolen.kubectl(
                "create", "--dry-run=server", "--validate=false", "--filename=-", *user, input_text=body
            )
        except ClusterError as error:
            return str(error)

    eventually(lambda: "are written by the operator" in answer("--as=tenant"), seconds=60, every=0.2)
    assert "created" in answer(), "with the right to write the status of jobs"


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_stolen_token_has_no_right(stolen: Stolen, name: str) -> None:
    status, message = stolen.tries(FORBIDDEN[name])
    assert (status, FORBIDDEN[name].says in message) == (403, True), (status, message)


@pytest.mark.parametrize("name", LEFT)
def test_the_policies_cannot_tell_from_a_job(stolen: Stolen, name: str) -> None:
    """SECURITY.md lists these."""
    assert stolen.tries(LEFT[name])[0] == 201


def own_writes() -> Iterator[tuple[str, Attempt]]:
    """The operator's own requests."""
    jobs: dict[str, Object] = {}
    for number, profile in enumerate((PROFILE, NETWORKED)):
        several = make_job(**EVERYTHING, resources={"gpus": 2, "nodes": 2})
        for step in STEPS:
            jobs[f"{step} {number}"] = build_job(several, resolved(profile), step, 1)
    on_cpu = Profile.model_validate(PROFILE.dump() | {"device": "cpu", "gpuResource": None})
    jobs["on the CPU"] = build_job(make_job(), resolved(on_cpu), "train", 2)
    shared = Pod()
    cells = [shared.cell(name) for name in NAMES]
    jobs["of a sweep"] = build_pod_job(shared.sweep(), POD, CreateJob("train", 1), cells)
    for repository in (
        "localhost/qlora-trainer:0.1.0-rc.1",
        "registry.example.org:5000/team/trainer@sha256:" + "2" * 64,
    ):
        image = PROFILE.model_copy(update={"image": repository})
        jobs[f"of {repository}"] = build_job(make_job(), resolved(image), "prepare", 1)
    for name, body in jobs.items():
        yield f"a Job: {name}", Attempt("POST", path_of(TEAM, "jobs"), body, "")
    yield "a deletion", Attempt("DELETE", path_of(TEAM, "jobs", NAME), {"propagationPolicy": "Background"}, "")
    two, sweep = make_job(resources={"nodes": 2}), shared.sweep()
    for body in (build_claim(two, resolved(PROFILE)), build_sweep_claim(sweep, PROFILE)):
        path = path_of(TEAM, "persistentvolumeclaims")
        yield f"a claim {body['metadata']['name']}", Attempt("POST", path, body, "")
    path = path_of(TEAM, "persistentvolumeclaims", KEPT)
    owners = {"metadata": {"ownerReferences": [{**OWNER, "kind": "QLoRAJob", "controller": False}]}}
    yield "a claim's owner", Attempt("PATCH", path, owners, "", MERGE)
    yield "a deletion of a claim", Attempt("DELETE", path, {}, "")
    yield "a deletion of a job", Attempt("DELETE", path_of(TEAM, "qlorajobs", ENDED), {}, "")
    yield "a Service", Attempt("POST", path_of(TEAM, "services"), build_peer_service(two), "")
    network = JobNetworkPolicies()
    for policy in (*build_policies(network, [NETWORKED]), build_peer_policy(two, network.dns)):
        name = policy["metadata"]["name"]
        path = path_of(TEAM, "networkpolicies", f"{name}?fieldManager=qlora-operator&force=true")
        yield f"a NetworkPolicy {name}", Attempt("PATCH", path, policy, "", APPLY)
    yield "a revision", Attempt("POST", path_of(TEAM, "controllerrevisions"), REVISION, "")
    path = path_of(TEAM, "controllerrevisions", RESTORED["metadata"]["name"])
    yield "an adopted revision", Attempt("PATCH", path, {"metadata": ADOPTED}, "", MERGE)
    yield "a cell", Attempt("POST", path_of(TEAM, "qlorajobs"), build_cell(sweep, sweep.cells()[0]), "")
    labelled = {"metadata": {"name": "new", "labels": {"qlora.dev/announcements": "true"}}}
    yield "an announcement", Attempt("POST", path_of(TEAM, "configmaps"), foreign("ConfigMap") | labelled, "")
    more = {"data": {"a.json": "{}"}}
    yield "another announcement", Attempt("PATCH", path_of(TEAM, "configmaps", "adapters"), more, "", MERGE)
    one = shared.jobs()[NAMES[0]]
    changes: dict[str, Any] = {
        "suspended": suspension(one, True),
        "stopped": stop(one, "x"),
        "cleaned": cleanup(one, 3600),
    }
    for name, change in changes.items():
        # The stored cell is another one of the same name.
        kept = {key: value for key, value in change["metadata"].items() if key not in ("uid", "resourceVersion")}
        body = change | {"metadata": kept}
        yield f"a cell is {name}", Attempt("PATCH", path_of(TEAM, "qlorajobs", CELL), body, "", MERGE)


OWN_WRITES = dict(own_writes())


@pytest.mark.parametrize("name", OWN_WRITES)
def test_the_operators_own_requests_are_admitted(stolen: Stolen, name: str) -> None:
    status, message = stolen.tries(OWN_WRITES[name])
    assert status < 300, message
