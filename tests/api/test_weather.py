"""The operator's process in bad weather: a real API server behind a proxy that rejects, freezes, cuts and goes away.

No controllers and no node run here: the Jobs and the status show the operator's actions. No time is asserted; a wait
ends with its condition.
"""

import contextlib
import itertools
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from devcluster.certificates import Authority
from devcluster.controlplane import ControlPlane
from devcluster.errors import ClusterError
from qlora_operator.kube.listing import OBJECTS_PER_PAGE
from tests.support.api_proxy import ApiProxy, Reply, Weather, fair, serve_api
from tests.support.operator_process import OperatorProcess, running_operator
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]
OWN = "weather-system"
"""The namespace of the operators' account and of their Lease."""
QUICK = {"resyncSeconds": 5, "watchSilenceSeconds": 5, "progress": {"enabled": False}}
RULES = [
    {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs", "qlorasweeps"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": ["qlora.dev"], "resources": ["qlorajobs/status", "qlorasweeps/status"], "verbs": ["patch"]},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch", "create", "delete"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["persistentvolumeclaims"], "verbs": ["get", "create"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
]
LEASES = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "create", "update"]}]

Object = dict[str, Any]


def election(name: str) -> Object:
    return {"enabled": True, "namespace": OWN, "leaseName": name, "leaseDurationSeconds": 3}


@dataclass(frozen=True)
class Tenant:
    """A namespace, as its user and the administrator see it: never through the proxy."""

    plane: ControlPlane
    namespace: str

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.plane.kubectl(*arguments, f"--namespace={self.namespace}", **options)

    def create(self, name: str, **spec: Any) -> None:
        self.apply(
            {
                "apiVersion": "qlora.dev/v1alpha1",
                "kind": "QLoRAJob",
                "metadata": {"name": name},
                "spec": {"model": {"source": "hf://org/model"}, "dataset": {"source": "hf://org/rows"}, **spec},
            }
        )

    def apply(self, manifest: Mapping[str, Any]) -> None:
        self.kubectl("apply", "--filename=-", input_text=json.dumps(manifest))

    def suspend(self, name: str) -> None:
        self.kubectl("patch", "qlorajob", name, "--type=merge", '--patch={"spec": {"suspend": true}}')

    def status(self, name: str) -> Object:
        job = self.plane.kubectl.get("qlorajob", name, f"--namespace={self.namespace}")
        return dict(job.get("status") or {})

    def wait_for_phase(self, name: str, phase: str, seconds: float = 60) -> None:
        eventually(
            lambda: self.status(name).get("phase") == phase, seconds=seconds, every=0.2, what=f"{name} to be {phase}"
        )

    def jobs(self, name: str) -> list[str]:
        """UIDs of the Jobs of a QLoRAJob."""
        listed = self.plane.kubectl.get("jobs", f"--namespace={self.namespace}", f"--selector=qlora.dev/job={name}")
        return [item["metadata"]["uid"] for item in listed["items"]]

    def grant(self, *, rules: list[Object] = RULES) -> None:
        """Give the operators' account these rights in this namespace."""
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": "operator"}}
        subject = {"kind": "ServiceAccount", "name": "operator", "namespace": OWN}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"}
        self.apply(role | {"kind": "Role", "rules": rules})
        self.apply(role | {"kind": "RoleBinding", "roleRef": reference, "subjects": [subject]})

    def deny(self) -> None:
        """Take the rights away, and wait until the API server denies them."""
        self.kubectl("delete", "rolebinding", "operator")
        eventually(self._is_denied, seconds=60, every=0.2, what="the denial")

    def _is_denied(self) -> bool:
        account = f"--as=system:serviceaccount:{OWN}:operator"
        try:
            self.kubectl("auth", "can-i", "list", "qlorajobs.qlora.dev", account)
        except ClusterError:
            return True
        return False


@pytest.fixture(scope="module")
def account(plane: ControlPlane) -> str:
    """The token of an account that may write Leases in its namespace, and nothing else yet."""
    plane.kubectl("create", "namespace", OWN)
    plane.kubectl("create", "serviceaccount", "operator", f"--namespace={OWN}")
    Tenant(plane, OWN).grant(rules=LEASES)
    return plane.kubectl("create", "token", "operator", f"--namespace={OWN}", "--duration=1h").strip()


@dataclass(frozen=True)
class Site:
    """Resources of one test: a namespace, a proxy, and a folder."""

    plane: ControlPlane
    tenant: Tenant
    proxy: ApiProxy
    folder: Path
    token: str

    def kubeconfig(self, proxy: ApiProxy, **cluster: str) -> Path:
        path = self.folder / f"kubeconfig-{proxy.port}"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": proxy.url} | cluster}],
            "users": [{"name": "operator", "user": {"token": self.token}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "operator"}}],
            "current-context": "proxy",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    @contextlib.contextmanager
    def operator(
        self,
        name: str = "operator",
        *,
        proxy: ApiProxy | None = None,
        kubeconfig: Path | None = None,
        **settings: Any,
    ) -> Iterator[OperatorProcess]:
        """An operator of this namespace. In the end it is alive, and its log is JSON, line by line."""
        chosen = {"namespaces": [self.tenant.namespace], **QUICK, **settings}
        path = kubeconfig or self.kubeconfig(proxy or self.proxy)
        with running_operator(self.folder / name, path, chosen) as operator:
            yield operator
            if operator.alive:
                assert operator.stop() == 0
            operator.entries()


_numbers = itertools.count(1)


@pytest.fixture
def site(plane: ControlPlane, account: str, tmp_path: Path) -> Iterator[Site]:
    namespace = f"weather-{next(_numbers)}"
    plane.kubectl("create", "namespace", namespace)
    tenant = Tenant(plane, namespace)
    tenant.grant()
    with serve_api(proxy_of(plane)) as proxy:
        yield Site(plane, tenant, proxy, tmp_path, account)


def proxy_of(plane: ControlPlane, **options: Any) -> ApiProxy:
    authority = plane.directory / "certificates" / "ca.crt"
    return ApiProxy(plane.server.removeprefix("https://"), authority, **options)


def of_statuses(*statuses: int) -> Weather:
    """Every request is answered with the next of these statuses."""
    turn = itertools.cycle(statuses)
    return lambda _request: Reply(next(turn))


def login_page() -> Weather:
    """A proxy's answer to an unauthenticated client: a redirect to its page, or the page itself."""
    html = {"Content-Type": "text/html"}
    page = Reply(200, b"<html>Log in to go on.</html>", html)
    turn = itertools.cycle([Reply(302, b"<html>Moved.</html>", html | {"Location": "/login"}), page])
    return lambda request: page if request.path == "/login" else next(turn)


def storm(site: Site, kind: str) -> None:
    match kind:
        case "login page":
            site.proxy.weather = login_page()
            site.proxy.cut()
        case "errors":
            site.proxy.weather = of_statuses(503, 500, 429, 410, 401, 404)
            site.proxy.cut()
        case "refused":
            site.proxy.fall()
        case "silence":
            site.proxy.freeze()
            site.proxy.silent.set()


def calm(site: Site) -> None:
    """The API server answers again; not on connections that have fallen silent."""
    site.proxy.weather = fair
    site.proxy.silent.clear()
    if not site.proxy.up:
        site.proxy.rise()


def live_through(site: Site, operator: OperatorProcess, kind: str, until: Callable[[], bool], seconds: float) -> None:
    """A job runs, the API server is away, a user acts: the change is applied once, after the outage."""
    operator.wait_until_ready()
    site.tenant.create("before")
    site.tenant.wait_for_phase("before", "Preparing")
    storm(site, kind)
    site.tenant.suspend("before")
    site.tenant.create("during")
    eventually(until, seconds=seconds, every=0.2, what="the end of the storm")
    assert operator.alive
    assert site.tenant.status("before")["phase"] == "Preparing"
    calm(site)
    site.tenant.wait_for_phase("before", "Suspended", seconds=75)
    site.tenant.wait_for_phase("during", "Preparing", seconds=75)
    operator.wait_until_ready()
    site.tenant.create("after")
    site.tenant.wait_for_phase("after", "Preparing")
    assert [len(site.tenant.jobs(name)) for name in ("before", "during", "after")] == [0, 1, 1]


def problems(operator: OperatorProcess) -> list[str]:
    """The warnings in the log. Raises AssertionError for a traceback."""
    entries = operator.entries()
    assert not [entry for entry in entries if "exception" in entry]
    return [entry["message"] for entry in entries if entry["level"] in ("warning", "error", "critical")]


def warnings(operator: OperatorProcess, part: str) -> int:
    """The number of warnings with this part."""
    return sum(part in line for line in problems(operator))


OUTAGES = [("errors", False), ("refused", True)]
"""Each with an operator that works alone, or that has to be elected and loses its Lease meanwhile."""


def settings_of(site: Site, elected: bool) -> Object:
    return {"leaderElection": election(site.tenant.namespace)} if elected else {}


@pytest.mark.parametrize(("kind", "elected"), [*OUTAGES, ("login page", False), ("login page", True)])
def test_an_outage_ends_nothing_and_loses_nothing(site: Site, kind: str, elected: bool) -> None:
    with site.operator(**settings_of(site, elected)) as operator:
        noticed = "leads no longer" if elected else "cannot be listed"
        live_through(site, operator, kind, lambda: operator.says(noticed), seconds=60)
        assert operator.says("leads no longer") is elected
        said = problems(operator)
        # At most one for the lists and, as the errors name them too, one for the rights.
        assert sum("cannot be listed" in line for line in said) <= 2, said
        assert sum("Request attempt" in line for line in said) <= 6, said


def test_a_stream_that_ends_breaks_or_falls_silent_is_opened_again(site: Site) -> None:
    def breaks(body: bytes) -> None:
        """The next watches get this instead of events, until each of the three kinds had it."""
        since = len(site.proxy.seen)
        site.proxy.weather = lambda request: Reply(200, body) if request.watches else None
        site.proxy.cut()
        kinds = ("/qlorajobs", "/jobs", "/pods")
        eventually(
            lambda: all(any(kind in r.path and r.watches for r in tuple(site.proxy.seen)[since:]) for kind in kinds),
            seconds=60,
            every=0.1,
        )
        site.proxy.weather = fair

    failure = {"kind": "Status", "code": 500, "message": "etcdserver: request timed out"}
    troubles: dict[str, Callable[[], None]] = {
        "cut": site.proxy.cut,
        "expired": lambda: breaks(b'{"type": "ERROR", "object": {"kind": "Status", "code": 410}}\n'),
        "failed": lambda: breaks(json.dumps({"type": "ERROR", "object": failure}).encode() + b"\n"),
        "half-a-line": lambda: breaks(b'{"type": "MODIF'),
        "frozen": site.proxy.freeze,
    }
    # Without help from the lists.
    with site.operator(resyncSeconds=600) as operator:
        operator.wait_until_ready()
        for name, trouble in troubles.items():
            trouble()
            site.tenant.create(name)
            site.tenant.wait_for_phase(name, "Preparing")
            assert len(site.tenant.jobs(name)) == 1
        problems(operator)


def test_an_authority_that_is_replaced_is_trusted_without_a_restart(site: Site) -> None:
    """First the server has a certificate of the new one, then the file that the operator reads."""
    first, second = (Authority(datetime.now(UTC)) for _ in range(2))
    trusted = site.folder / "trusted.crt"
    trusted.write_bytes(first.certificate)

    def identity(authority: Authority) -> tuple[Path, Path]:
        return authority.issue("kube-apiserver", serves=["127.0.0.1"]).write(site.folder, "server")

    with serve_api(proxy_of(site.plane, identity=identity(first))) as proxy:
        kubeconfig = site.kubeconfig(proxy, **{"certificate-authority": str(trusted)})
        with site.operator(kubeconfig=kubeconfig) as operator:
            operator.wait_until_ready()
            site.tenant.create("before")
            site.tenant.wait_for_phase("before", "Preparing")
            proxy.fall()
            proxy.identity = identity(second)
            proxy.rise()
            site.tenant.create("during")
            eventually(lambda: operator.says("certificate verify failed"), seconds=60, every=0.2)
            assert "phase" not in site.tenant.status("during")
            trusted.write_bytes(second.certificate)
            site.tenant.wait_for_phase("during", "Preparing", seconds=90)
            watches = proxy.count("GET", "watch=true")
            eventually(lambda: proxy.count("GET", "watch=true") >= watches + 3, seconds=90, every=0.2)
            operator.wait_until_ready()
            site.tenant.suspend("before")
            site.tenant.wait_for_phase("before", "Suspended")
            assert operator.alive


def test_it_starts_while_the_api_server_is_away(site: Site) -> None:
    site.proxy.fall()
    with site.operator() as operator:
        eventually(lambda: operator.get("/readyz")[0] == 503, seconds=60, every=0.1)
        assert operator.get("/healthz")[0] == 200
        eventually(lambda: operator.says("cannot be read"), seconds=60, every=0.1)
        site.proxy.rise()
        operator.wait_until_ready()
        site.tenant.create("a")
        site.tenant.wait_for_phase("a", "Preparing")
        assert len(problems(operator)) == 1


@pytest.fixture
def neighbor(site: Site) -> Tenant:
    """Another namespace that the same operator serves."""
    name = f"{site.tenant.namespace}-neighbor"
    site.plane.kubectl("create", "namespace", name)
    tenant = Tenant(site.plane, name)
    tenant.grant()
    return tenant


def test_a_namespace_that_is_lost_stops_only_itself(site: Site, neighbor: Tenant) -> None:
    series = f'qlora_operator_namespace_denied{{namespace="{neighbor.namespace}"}}'
    with site.operator(namespaces=[site.tenant.namespace, neighbor.namespace]) as operator:
        operator.wait_until_ready()
        assert operator.metric(series) == 0
        # All that a deleted namespace leaves of the operator's rights in it.
        neighbor.deny()
        eventually(lambda: operator.metric(series) == 1, seconds=60, every=0.2)
        # Its streams are open until they end.
        site.proxy.cut()
        neighbor.create("waits")
        site.tenant.create("works")
        site.tenant.wait_for_phase("works", "Preparing")
        status, text = operator.get("/readyz")
        assert (status, neighbor.namespace in text) == (200, True)
        assert neighbor.status("waits").get("phase") is None
        # Sweeps are listed at a different interval.
        eventually(lambda: warnings(operator, "the sweeps cannot be listed"), seconds=60, every=0.2)
        neighbor.grant()
        neighbor.wait_for_phase("waits", "Preparing")
        eventually(lambda: operator.metric(series) == 0, seconds=60, every=0.2)
        assert [warnings(operator, of) for of in ("its jobs wait", "the sweeps cannot be listed")] == [1, 1]


def test_an_operator_without_rights_is_alive_not_ready_and_recovers(site: Site) -> None:
    site.tenant.deny()
    with site.operator() as operator:
        eventually(lambda: operator.says("cannot be listed"), seconds=60, every=0.2)
        status, text = operator.get("/readyz")
        assert (status, operator.get("/healthz")[0]) == (503, 200)
        assert "denies" in text or "not been listed" in text
        site.tenant.grant()
        operator.wait_until_ready()
        site.tenant.deny()
        eventually(lambda: "denies" in operator.get("/readyz")[1], seconds=90, every=0.2)
        assert operator.get("/healthz")[0] == 200
        site.tenant.grant()
        operator.wait_until_ready()
        site.tenant.create("a")
        site.tenant.wait_for_phase("a", "Preparing")


def test_it_waits_for_the_definition_of_its_release(site: Site) -> None:
    path = ROOT / "crds" / "qlorajobs.qlora.dev.yaml"
    older = yaml.safe_load(path.read_text())
    properties = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    del properties["status"]["properties"]["disruptions"]
    try:
        site.plane.kubectl("apply", "--filename=-", input_text=json.dumps(older))
        with site.operator() as operator:
            eventually(lambda: "status.disruptions" in operator.get("/readyz")[1], seconds=60, every=0.2)
            assert operator.get("/readyz")[0] == 503
            site.tenant.create("a")
            site.plane.kubectl("apply", f"--filename={path}")
            operator.wait_until_ready(seconds=90)
            site.tenant.wait_for_phase("a", "Preparing")
            assert warnings(operator, "status.disruptions") == 1
    finally:
        site.plane.kubectl("apply", f"--filename={path}")


def test_an_older_definition_stops_status_writes_until_the_right_one_is_back(site: Site) -> None:
    path = ROOT / "crds" / "qlorajobs.qlora.dev.yaml"
    older = yaml.safe_load(path.read_text())
    properties = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    del properties["status"]["properties"]["resolved"]
    with site.operator() as operator:
        operator.wait_until_ready()
        site.tenant.create("before")
        site.tenant.wait_for_phase("before", "Preparing")
        try:
            site.plane.kubectl("apply", "--filename=-", input_text=json.dumps(older))
            site.tenant.create("during")
            eventually(lambda: operator.metric("qlora_operator_schema_outdated") == 1, seconds=60, every=0.2)
            status, text = operator.get("/readyz")
            assert (status, "qlora.dev/v1alpha1) lacks status.resolved" in text) == (503, True)
            assert (operator.get("/healthz")[0], site.tenant.status("during").get("phase")) == (200, None)
            written = site.proxy.count("PATCH", "/status")
            site.tenant.suspend("before")
            site.tenant.create("later")
            # Lists at an interval of five seconds request all of them.
            pages = f"/pods?limit={OBJECTS_PER_PAGE}"
            lists = site.proxy.count("GET", pages)
            eventually(lambda: site.proxy.count("GET", pages) > lists + 1, seconds=60, every=0.2)
            assert site.proxy.count("PATCH", "/status") == written, "it goes on writing what is rejected"
        finally:
            site.plane.kubectl("apply", f"--filename={path}")
        site.tenant.wait_for_phase("before", "Suspended", seconds=60)
        for name in ("during", "later"):
            site.tenant.wait_for_phase(name, "Preparing")
            assert len(site.tenant.jobs(name)) == 1
        operator.wait_until_ready()
        assert operator.metric("qlora_operator_schema_outdated") == 0
        assert warnings(operator, "lacks status.resolved") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_probes_metrics_and_the_api_server_are_reached_over_both_families(site: Site, host: str) -> None:
    with serve_api(proxy_of(site.plane, host=host)) as proxy, site.operator(proxy=proxy) as operator:
        operator.wait_until_ready()
        for address in ("127.0.0.1", "::1"):
            assert operator.get("/healthz", host=address)[0] == 200
            assert "qlora_jobs" in operator.get("/metrics", port=operator.metrics_port, host=address)[1]
        site.tenant.create("a")
        site.tenant.wait_for_phase("a", "Preparing")
        assert proxy.count("GET", "watch=true") >= 3


def leads(operator: OperatorProcess) -> bool:
    return operator.metric("qlora_operator_leads") == 1


def test_one_of_two_operators_works_and_the_standby_takes_over(site: Site) -> None:
    """Killed, cut off, frozen for a while, and terminated."""
    settings: Object = {"leaderElection": election(site.tenant.namespace)}

    def starts(name: str) -> None:
        site.tenant.create(name)
        site.tenant.wait_for_phase(name, "Preparing")
        assert len(site.tenant.jobs(name)) == 1

    with serve_api(proxy_of(site.plane)) as road, contextlib.ExitStack() as running:
        first = running.enter_context(site.operator("first", **settings))
        first.wait_until_ready()
        eventually(lambda: leads(first), seconds=60, every=0.1)
        second = running.enter_context(site.operator("second", proxy=road, **settings))
        second.wait_until_ready()
        starts("both")
        assert (leads(first), leads(second)) == (True, False)
        assert road.count("POST", "/jobs") == 0

        first.send(signal.SIGKILL)
        first.process.wait()
        eventually(lambda: leads(second), seconds=20, every=0.1, what="the second to take over from a killed one")
        starts("killed")

        third = running.enter_context(site.operator("third", **settings))
        third.wait_until_ready()
        road.fall()
        eventually(lambda: leads(third), seconds=20, every=0.1, what="the third to take over from one that is cut off")
        assert second.alive
        assert not leads(second)
        starts("cut-off")
        road.rise()
        second.wait_until_ready()
        assert (leads(second), leads(third)) == (False, True)

        third.send(signal.SIGSTOP)
        eventually(lambda: leads(second), seconds=20, every=0.1, what="the second to take over from a frozen one")
        starts("frozen")
        third.send(signal.SIGCONT)
        eventually(lambda: not leads(third), seconds=20, every=0.1, what="the frozen one to notice")
        starts("awake")

        assert second.stop() == 0
        eventually(lambda: leads(third), seconds=20, every=0.1, what="the third to take over from one that has ended")
        starts("ended")
        assert third.get("/healthz")[0] == 200


def test_two_active_operators_create_no_object_twice(site: Site) -> None:
    with site.operator("first") as first, site.operator("second") as second:
        first.wait_until_ready()
        second.wait_until_ready()
        names = [f"job-{number}" for number in range(8)]
        for name in names:
            site.tenant.create(name)
        for name in names:
            site.tenant.wait_for_phase(name, "Preparing")
        assert [len(site.tenant.jobs(name)) for name in names] == [1] * len(names)
        site.tenant.suspend(names[0])
        site.tenant.wait_for_phase(names[0], "Suspended")
        assert site.tenant.jobs(names[0]) == []
