"""Each user has the rights of that user, and no others; the door has none."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml
from openai import OpenAI

from devcluster.controlplane import ControlPlane
from tests.support.chart.rendered import NAMESPACE
from tests.support.door import ACCOUNT, AUDIENCE, LARGE, MODEL, ROWS, DoorProcess, Tenant, door_objects, upload

OWN = f"system:serviceaccount:{NAMESPACE}:{ACCOUNT}"


@pytest.fixture(params=["impersonate", "token"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def at(mode: str, request: pytest.FixtureRequest) -> DoorProcess:
    """The door in that mode."""
    name = "door" if mode == "impersonate" else "passing_door"
    found: DoorProcess = request.getfixturevalue(name)
    return found


def key_of(tenant: Tenant, mode: str) -> str:
    return tenant.key() if mode == "impersonate" else tenant.key("--duration=1h")


@pytest.fixture
def owner(at: DoorProcess, mode: str, alice: Tenant) -> OpenAI:
    return at.client(key_of(alice, mode))


@pytest.fixture
def intruder(at: DoorProcess, mode: str, bob: Tenant) -> OpenAI:
    """Another tenant, in the owner's project."""
    return at.client(key_of(bob, mode), project="team-a")


def test_a_tenant_reaches_nothing_of_another(owner: OpenAI, intruder: OpenAI) -> None:
    file = upload(owner)
    job = owner.fine_tuning.jobs.create(model=MODEL, training_file=file).id
    jobs = intruder.fine_tuning.jobs
    attempts: list[Callable[[], object]] = [
        lambda: upload(intruder),
        lambda: intruder.files.list(),
        lambda: intruder.files.retrieve(file),
        lambda: intruder.files.content(file),
        lambda: intruder.files.delete(file),
        lambda: jobs.create(model=MODEL, training_file=file),
        lambda: jobs.list(),
        lambda: jobs.retrieve(job),
        lambda: jobs.cancel(job),
        lambda: jobs.pause(job),
        lambda: jobs.resume(job),
        lambda: jobs.list_events(job),
        lambda: jobs.checkpoints.list(job),
        lambda: intruder.models.list(),
        lambda: intruder.models.delete(f"team-a/{job}@sha256:{'0' * 64}"),
    ]
    for attempt in attempts:
        with pytest.raises(openai.PermissionDeniedError):
            attempt()
    assert owner.fine_tuning.jobs.retrieve(job).status == "validating_files"


def test_the_own_namespace_has_nothing_of_another(at: DoorProcess, mode: str, owner: OpenAI, bob: Tenant) -> None:
    file = upload(owner)
    job = owner.fine_tuning.jobs.create(model=MODEL, training_file=file).id
    other = at.client(key_of(bob, mode))
    with pytest.raises(openai.BadRequestError, match="was not found"):
        other.fine_tuning.jobs.create(model=MODEL, training_file=file)
    with pytest.raises(openai.NotFoundError):
        other.fine_tuning.jobs.retrieve(job)


def test_a_user_who_may_only_read_deletes_nothing(door: DoorProcess, alice: Tenant, plane: ControlPlane) -> None:
    reader, owner = Tenant(plane, "team-a", "reader"), door.client(alice.key())
    plane.kubectl("create", "serviceaccount", "reader", "--namespace=team-a")
    rights = ("--verb=get,list", "--resource=configmaps,qlorajobs.qlora.dev", "--namespace=team-a")
    plane.kubectl("create", "role", "reader", *rights)
    plane.kubectl("create", "rolebinding", "reader", "--role=reader", "--serviceaccount=team-a:reader", rights[-1])
    for rows in (ROWS, LARGE):
        file = upload(owner, rows)
        with pytest.raises(openai.PermissionDeniedError, match="cannot delete"):
            door.client(reader.key()).files.delete(file)
        assert owner.files.content(file).read() == rows


@pytest.mark.parametrize("name", ["../../../secrets", "kube-root-ca.crt", "file-%2e%2e", "a/b", "x" * 300])
def test_an_id_is_no_path(owner: OpenAI, name: str) -> None:
    for path in (f"/files/{name}", f"/files/{name}/content", f"/fine_tuning/jobs/{name}", f"/models/{name}"):
        with pytest.raises(openai.NotFoundError):
            owner.get(path, cast_to=object)


def test_a_resource_of_another_origin_is_not_shown(owner: OpenAI, mode: str, plane: ControlPlane) -> None:
    job = owner.fine_tuning.jobs.create(model=MODEL, training_file=upload(owner)).id
    stored = plane.kubectl.get("qlorajob", job, "--namespace=team-a")
    copy = {"name": f"ftjob-by-hand-{mode}", "namespace": "team-a"}
    plane.kubectl.apply(json.dumps({**stored, "metadata": copy, "status": None}))
    with pytest.raises(openai.NotFoundError):
        owner.fine_tuning.jobs.retrieve(copy["name"])
    note = {"qlora.dev/openai": "{"}
    broken = {**copy, "name": f"ftjob-broken-{mode}", "labels": {"qlora.dev/openai": "true"}, "annotations": note}
    plane.kubectl.apply(json.dumps({**stored, "metadata": broken, "status": None}))
    with pytest.raises(openai.InternalServerError, match="cannot be read"):
        owner.fine_tuning.jobs.retrieve(f"ftjob-broken-{mode}")
    assert job in {each.id for each in owner.fine_tuning.jobs.list(limit=100)}


def test_a_key_is_a_token_of_the_audience(door: DoorProcess, alice: Tenant, plane: ControlPlane) -> None:
    for key in ("sk-nothing", alice.key("--duration=1h"), alice.key("--audience=another")):
        with pytest.raises(openai.AuthenticationError, match=AUDIENCE):
            door.client(key).models.list()
    # And no token of the API server.
    answer = httpx2.get(f"{plane.server}/api", headers={"Authorization": f"Bearer {alice.key()}"}, verify=False)
    assert answer.status_code == 401


@pytest.mark.parametrize("header", ["", "Basic YTpi", "Bearer", "Bearer a b", "Bearer \x80"])
def test_a_request_without_a_key_is_refused(door: DoorProcess, passing_door: DoorProcess, header: str) -> None:
    for each in (door, passing_door):
        answer = httpx2.get(f"{each.url}/models", headers={b"Authorization": header.encode("latin-1")})
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_deleted_account_has_no_key(at: DoorProcess, mode: str, plane: ControlPlane, alice: Tenant) -> None:
    plane.kubectl("create", "serviceaccount", "leaver", "--namespace=team-a")
    leaver = Tenant(plane, "team-a", "leaver")
    client = at.client(key_of(leaver, mode))
    with pytest.raises(openai.PermissionDeniedError):
        client.files.list()
    plane.kubectl("delete", "serviceaccount", "leaver", "--namespace=team-a")

    def is_refused() -> bool:
        try:
            client.files.list()
        except openai.AuthenticationError:
            return True
        except openai.PermissionDeniedError:
            return False
        return False

    # The API server remembers an authentication for some seconds.
    deadline = time.monotonic() + 60
    while not is_refused():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_forged_headers_of_impersonation_have_no_effect(at: DoorProcess, mode: str, alice: Tenant) -> None:
    forged = {"Impersonate-User": "admin", "Impersonate-Group": "system:masters", "X-Remote-User": "admin"}
    client = at.client(key_of(alice, mode), default_headers=forged, project="kube-system")
    with pytest.raises(openai.PermissionDeniedError, match="trainer"):
        client.files.list()


@pytest.mark.parametrize("project", ["Team-A", "a/b", "../x", "x" * 64])
def test_a_project_is_the_name_of_a_namespace(owner: OpenAI, project: str) -> None:
    with pytest.raises(openai.BadRequestError, match="project"):
        owner.with_options(default_headers={"OpenAI-Project": project}).files.list()


def test_a_quota_is_reported_and_not_tried_again(door: DoorProcess, bob: Tenant, plane: ControlPlane) -> None:
    client = door.client(bob.key())
    file = upload(client)
    limits = {"count/qlorajobs.qlora.dev": "0"}
    plane.kubectl("create", "quota", "none", "--namespace=team-b", "--hard=count/qlorajobs.qlora.dev=0")
    # As the controller of quotas would.
    status = json.dumps({"status": {"hard": limits, "used": limits}})
    plane.kubectl(
        "patch", "quota", "none", "--namespace=team-b", "--subresource=status", "--type=merge", f"-p={status}"
    )
    try:
        with pytest.raises(openai.RateLimitError, match="exceeded quota") as refused:
            client.fine_tuning.jobs.create(model=MODEL, training_file=file)
        assert refused.value.code == "insufficient_quota"
        assert refused.value.response.headers["x-should-retry"] == "false"
    finally:
        plane.kubectl("delete", "quota", "none", "--namespace=team-b")


@pytest.fixture(scope="module")
def own_kubectl(plane: ControlPlane, door: DoorProcess, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kubeconfig with the token of the door's account."""
    kubeconfig = yaml.safe_load(plane.kubeconfig.read_text())
    token = plane.kubectl("create", "token", ACCOUNT, f"--namespace={NAMESPACE}").strip()
    kubeconfig["users"][0]["user"] = {"token": token}
    path = tmp_path_factory.mktemp("own") / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig))
    return path


def denied(plane: ControlPlane, kubeconfig: Path, *arguments: str) -> str:
    """The message that denies a command to the door's account."""
    done = subprocess.run(
        [plane.kubectl.program, "--kubeconfig", kubeconfig, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


TENANT = "system:serviceaccount:team-a:trainer"


@pytest.mark.parametrize(
    "arguments",
    [
        ("get", "qlorajobs", "--namespace=team-a"),
        ("get", "configmaps", "--namespace=team-a"),
        ("get", "secrets", "--all-namespaces"),
        ("get", "secrets", "--namespace=team-a", f"--as={TENANT}"),
        ("delete", "configmaps", "--all", "--namespace=team-a", "--as=system:kube-controller-manager"),
        ("create", "token", "trainer", "--namespace=team-a", f"--as={TENANT}"),
        ("get", "qlorajobs", "--namespace=team-a", f"--as={TENANT}", "--as-group=system:masters"),
        ("get", "qlorajobs", "--namespace=team-a", "--as=admin", "--as-group=system:masters"),
        ("get", "qlorajobs", "--namespace=team-a", "--as=system:node:node"),
        ("get", "--raw=/apis/qlora.dev/v1beta1/namespaces/team-a/qlorajobs/a/status", f"--as={TENANT}"),
        ("get", "qloraprofiles", f"--as={TENANT}"),
        ("get", "pods", "--namespace=team-a", f"--as={TENANT}"),
    ],
    ids=" ".join,
)
def test_the_stolen_account_of_the_door_has_no_other_right(
    plane: ControlPlane, own_kubectl: Path, alice: Tenant, arguments: tuple[str, ...]
) -> None:
    assert "orbidden" in denied(plane, own_kubectl, *arguments)


def test_the_chart_grants_impersonation_only(plane: ControlPlane) -> None:
    models: dict[str, Any] = {MODEL: {"spec": {"model": {"source": "hf://a/b"}}}}
    (role,) = [each for each in door_objects({"models": models}) if each["kind"] == "ClusterRole"]
    own = [(rule["resources"], verb) for rule in role["rules"] for verb in rule["verbs"] if "impersonate" not in verb]
    assert own == [(["tokenreviews"], "create")]
    passing = door_objects({"models": models, "identity": "token"})
    assert not {"ClusterRole", "Role"} & {each["kind"] for each in passing}


def test_the_audit_log_names_user_and_door(door: DoorProcess, alice: Tenant, plane: ControlPlane) -> None:
    name = upload(door.client(alice.key()), ROWS)
    with plane.audit_log.open() as log:
        entries = [json.loads(line) for line in log if name in line]
    (created,) = [each for each in entries if each["verb"] == "create" and "dryRun" not in each["requestURI"]]
    assert created["user"]["username"] == OWN
    assert created["impersonatedUser"]["username"] == TENANT
