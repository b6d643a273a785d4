"""The operator's process without rights in a namespace, and with definitions of another release.

No controllers and no node run here: the Jobs and the status show the operator's actions. No time is asserted; a wait
ends with its condition.
"""

import json

import yaml

from qlora_operator.kube.listing import VERSIONS_PER_PAGE
from tests.support.cluster.weather import ROOT, Site, Tenant, warnings
from tests.support.waiting import eventually


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
        about = ("explain", "qlorajob.status")
        eventually(lambda: "disruptions" not in site.plane.kubectl(*about), what="the older definition")
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
    del properties["status"]["properties"]["currentRevision"]
    with site.operator() as operator:
        operator.wait_until_ready()
        site.tenant.create("before")
        site.tenant.wait_for_phase("before", "Preparing")
        try:
            site.plane.kubectl("apply", "--filename=-", input_text=json.dumps(older))
            eventually(lambda: "currentRevision" not in site.tenant.status("before"), what="the older definition")
            site.tenant.create("during")
            eventually(lambda: operator.metric("qlora_operator_schema_outdated") == 1, seconds=60, every=0.2)
            status, text = operator.get("/readyz")
            assert (status, "qlora.dev/v1beta1) lacks status.currentRevision" in text) == (503, True)
            assert (operator.get("/healthz")[0], site.tenant.status("during").get("phase")) == (200, None)
            written = site.proxy.count("PATCH", "/status")
            site.tenant.suspend("before")
            site.tenant.create("later")
            # Lists at an interval of five seconds request all of them.
            pages = f"/pods?limit={VERSIONS_PER_PAGE}"
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
        assert warnings(operator, "lacks status.currentRevision") == 1
