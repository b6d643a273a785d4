"""Whatever the schema admits, the API server accepts as Jobs: no step fails for a name that was admitted."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from devcluster.controlplane import ControlPlane
from qlora_api.naming import sweep_pod_name
from qlora_api.spec.job import MAX_NAME_LENGTH
from qlora_api.sweep.spec import MAX_SWEEP_NAME_LENGTH, QLoRASweepSpec
from qlora_api.sweep.status import QLoRASweepStatus
from qlora_operator.decisions.manifests.objects import build_claim, build_job
from qlora_operator.decisions.observed.objects import QLoRAJob
from qlora_operator.decisions.observed.stored_job import parse_job
from qlora_operator.decisions.plan import CreateJob
from qlora_operator.decisions.revision import build_revision
from qlora_operator.decisions.sweeps.pods import build_pod_job
from qlora_operator.decisions.sweeps.sweep import QLoRASweep, build_cell
from tests.support.admitted import specs
from tests.support.builders import PROFILE, UID, follow
from tests.support.cluster.played import NAMESPACE, STEPS, connected, prepared

Manifest = dict[str, Any]
Accept = Callable[[Manifest], None]
_OF_TEMPLATES = ("model", "dataset", "workspace", "scheduling", "retry", "activeDeadlineSeconds")
"""Parts that a sweep with several cells in a pod takes as they are."""
_LONGEST_NAME, _ATTEMPT = "a" * MAX_NAME_LENGTH, 12_345
_PROFILE = PROFILE.model_copy(update={"registries": ("example.org",), "allow_job_scheduling": True})
_PLURALS = {
    "ControllerRevision": "controllerrevisions",
    "QLoRAJob": "qlorajobs",
    "Job": "jobs",
    "PersistentVolumeClaim": "persistentvolumeclaims",
}


@pytest.fixture(scope="module")
def accept(plane: ControlPlane) -> Iterator[Accept]:
    """Create an object in a dry run."""
    with asyncio.Runner() as runner:
        connection = connected(prepared(plane))
        api = runner.run(connection.__aenter__())

        def create(manifest: Manifest) -> None:
            version, plural = manifest["apiVersion"], _PLURALS[manifest["kind"]]
            prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
            runner.run(api.create(f"{prefix}/namespaces/{NAMESPACE}/{plural}?dryRun=All", manifest))

        yield create
        runner.run(connection.__aexit__(None, None, None))


def test_the_jobs_of_whatever_the_schema_admits_are_accepted(accept: Accept) -> None:
    _prove(accept, 25)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_the_jobs_of_hundreds_of_admitted_specs_are_accepted(accept: Accept) -> None:
    _prove(accept, 500)


def _prove(accept: Accept, count: int) -> None:
    reached = list[bool]()

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(spec=specs())
    def check(spec: Manifest) -> None:
        manifests = (*_of_job(spec), *_of_sweep(spec))
        for manifest in manifests:
            accept(manifest)
        reached.append(any(manifest["kind"] == "Job" for manifest in manifests))

    check()
    assert sum(reached) > len(reached) / 2, "most specs have Jobs"


def _of_job(spec: Manifest) -> Iterator[Manifest]:
    """The job, and all that is created for it."""
    body = {"apiVersion": "qlora.dev/v1beta1", "kind": "QLoRAJob", "metadata": {"name": _LONGEST_NAME}, "spec": spec}
    yield body
    if (job := _started(body)) is not None and (resolved := job.status.resolved) is not None:
        yield from (build_job(job, resolved, step, _ATTEMPT) for step in STEPS)
        yield build_claim(job, resolved)
        yield build_revision(job, str(job.status.current_revision), resolved)


def _of_sweep(spec: Manifest) -> Iterator[Manifest]:
    """Two cells that one pod trains, and its Job."""
    template = {part: value for part, value in spec.items() if part in _OF_TEMPLATES}
    content = {"template": {"spec": template}, "grid": {"rank": [8, 16]}, "cellsPerPod": 2, "select": "all"}
    try:
        parsed = QLoRASweepSpec.model_validate(content)
        name = "a" * MAX_SWEEP_NAME_LENGTH
        sweep = QLoRASweep(NAMESPACE, name, UID, 1, "7", False, parsed, QLoRASweepStatus(), {})
        cells = [build_cell(sweep, cell, 2) for cell in sweep.cells()]
    except ValueError:
        return  # a sweep has rules of its own
    yield from cells
    jobs = [job for cell in cells if (job := _started(cell)) is not None]
    if len(jobs) == len(cells):
        yield build_pod_job(sweep, sweep_pod_name(name, 63), CreateJob("train", _ATTEMPT), jobs)


def _started(body: Manifest) -> QLoRAJob | None:
    """The job as it starts, or None if its status has the reason why not."""
    metadata = {"uid": UID, "namespace": NAMESPACE, "generation": 1}
    job = parse_job(body | {"metadata": body["metadata"] | metadata})
    status = follow(job, profiles={job.spec.scheduling.profile_name: _PROFILE})
    return replace(job, status=status) if status.resolved is not None else None
