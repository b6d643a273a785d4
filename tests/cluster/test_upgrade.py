"""A real previous release and this one, with jobs in every phase: `helm upgrade`, then `helm rollback`.

The fast siblings are tests/unit/qlora_operator/test_previous_release.py and tests/api/operator/test_upgrade.py.
"""

from collections.abc import Iterator

import pytest
import yaml

from devcluster import layout, previous, product
from tests.cluster.environment import LONG, Object, Tenant, tiny_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def release(tenant: Tenant) -> Iterator[previous.Release]:
    """The previous release, loaded; at the end this checkout's is installed again."""
    where = layout.from_environment()
    found = previous.built(where)
    product.load_images(where, found.images)
    yield found
    product.install(where, where.kubeconfig, tenant.cluster.images)


def install(release: previous.Release) -> None:
    """Install the previous release, without values that its chart does not have."""
    where = layout.from_environment()
    known = yaml.safe_load((release.chart / "values.yaml").read_text())
    values = {name: value for name, value in product.SMALL_MACHINE.items() if name in known}
    product.install(where, where.kubeconfig, release.images, values, chart=release.chart)


def apply_one_of_each_phase(tenant: Tenant, prefix: str) -> dict[str, str]:
    """Jobs that end well, by the phase that they reach; one has failed."""
    jobs = {
        "Succeeded": tenant.apply(tiny_job(f"{prefix}-succeeded")),
        "Failed": tenant.apply(tiny_job(f"{prefix}-failed", dataset={"source": "pvc://inputs/model/config.json"})),
    }
    tenant.succeed(jobs["Succeeded"])
    tenant.wait_for_phase(jobs["Failed"], "Failed")
    jobs["Suspended"] = tenant.apply(tiny_job(f"{prefix}-suspended", steps=LONG))
    tenant.held_until_asked(jobs["Suspended"], lambda _: tenant.patch(jobs["Suspended"], suspend=True))
    tenant.wait_for_phase(jobs["Suspended"], "Suspended")
    jobs["Training"] = tenant.apply(tiny_job(f"{prefix}-training", steps=LONG))
    jobs["Publishing"] = tenant.apply(tiny_job(f"{prefix}-publishing"))
    tenant.wait_for_phase(jobs["Training"], "Training")
    tenant.wait_for_phase(jobs["Publishing"], "Publishing", "Succeeded")
    # Two jobs hold the two GPUs, or are about to.
    jobs["Queued"] = tenant.apply(tiny_job(f"{prefix}-queued"))
    jobs["Pending"] = tenant.apply(tiny_job(f"{prefix}-pending"))
    return jobs


def require_undisturbed(tenant: Tenant, jobs: dict[str, str]) -> dict[str, Object]:
    """Every job but the failed one succeeds, and none has lost a pod or an attempt."""
    assert tenant.status(jobs["Suspended"])["phase"] == "Suspended"
    tenant.patch(jobs["Suspended"], suspend=False)
    ended = {phase: tenant.succeed(name) for phase, name in jobs.items() if phase != "Failed"}
    for phase, status in ended.items():
        assert (status.get("failures", 0), status.get("disruptions", 0)) == (0, 0), phase
    assert tenant.status(jobs["Failed"])["phase"] == "Failed"
    for phase in ("Training", "Queued", "Pending", "Publishing"):
        names = sorted(job["metadata"]["name"] for job in tenant.children(jobs[phase]))
        assert names == [f"{jobs[phase]}-{step}-1" for step in ("prepare", "publish", "train")]
    return ended


def test_no_job_notices_an_upgrade_or_a_rollback(tenant: Tenant, release: previous.Release) -> None:
    where = layout.from_environment()
    install(release)
    begun_before = apply_one_of_each_phase(tenant, "before")

    product.install(where, where.kubeconfig, tenant.cluster.images)
    ended = require_undisturbed(tenant, begun_before)
    # The image that a job has begun with stays.
    assert ended["Training"]["image"] == release.images.trainer
    tenant.patch(begun_before["Failed"], retry={"request": "a"})
    tenant.wait(begun_before["Failed"], lambda status: status.get("retryRequest") == "a")
    tenant.wait_for_end(begun_before["Failed"])
    assert tenant.status(begun_before["Failed"])["phase"] == "Failed"

    begun_after = apply_one_of_each_phase(tenant, "after")
    product.roll_back(where, where.kubeconfig)
    ended = require_undisturbed(tenant, begun_after)
    assert ended["Training"]["image"] == tenant.cluster.images.trainer
    # The same work gives the same adapter, whichever operator has led it.
    sums = {tenant.adapter_sum(status) for phase, status in ended.items() if phase in ("Succeeded", "Pending")}
    assert len(sums) == 1
