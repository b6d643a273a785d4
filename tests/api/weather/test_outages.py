"""The operator's process while the API server is away, cut off or slow, with and without a standby.

No controllers and no node run here: the Jobs and the status show the operator's actions. No time is asserted; a wait
ends with its condition.
"""

import contextlib
import itertools
import json
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from devcluster.certificates import Authority
from tests.support.cluster.operator_process import OperatorProcess
from tests.support.cluster.weather import Object, Site, election, problems, proxy_of
from tests.support.services.api_proxy import Reply, Weather, fair, serve_api
from tests.support.waiting import eventually


def of_statuses(*statuses: int) -> Weather:
    """Every request is answered with the next of these statuses."""
    turn = itertools.cycle(statuses)
    return lambda _request: Reply(next(turn))


def login_page() -> Weather:
    """Answer a client without a login by a redirect to a page, or by the page itself."""
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
    """Check that a change made during an outage is applied once, after the outage."""
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
        """Answer watches with this body until each of the three kinds has received it."""
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
    """The server's certificate changes first, then the file that the operator reads."""
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
        # It has the five watches, and so the jobs, before it is elected.
        eventually(lambda: road.count("GET", "watch=true") >= 5, seconds=20, every=0.1, what="watches of the standby")
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
