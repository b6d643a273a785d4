"""A door in front of a real API server, and a thread that ends jobs, as the operator would."""

import threading
from collections.abc import Iterator

import pytest

from devcluster.controlplane import ControlPlane, running
from qlora_api.status import QLoRAJobStatus
from tests.support.cluster.nodeless import DEFAULT_PROFILE, apply_definitions
from tests.support.door import MODEL, TEMPLATE, DoorProcess, Tenant, add_tenant, end_well, running_door, write_status


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with running() as plane:
        apply_definitions(plane, default=DEFAULT_PROFILE)
        yield plane


@pytest.fixture(scope="session")
def door(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DoorProcess]:
    with running_door(tmp_path_factory.mktemp("door"), plane, {"models": {MODEL: {"spec": TEMPLATE}}}) as door:
        yield door


@pytest.fixture(scope="session")
def tenant(plane: ControlPlane) -> Iterator[Tenant]:
    """A tenant whose jobs end within seconds, unless they are suspended."""
    tenant, stop = add_tenant(plane, "team-a"), threading.Event()

    def end_jobs() -> None:
        while not stop.wait(0.5):
            for job in plane.kubectl.get("qlorajobs", "--namespace=team-a")["items"]:
                name, spec, phase = job["metadata"]["name"], job["spec"], job.get("status", {}).get("phase")
                if spec.get("cancel") and phase != "Failed":
                    write_status(plane, "team-a", name, QLoRAJobStatus(phase="Failed"))
                elif not spec.get("suspend") and phase is None:
                    end_well(plane, "team-a", name)

    thread = threading.Thread(target=end_jobs)
    thread.start()
    yield tenant
    stop.set()
    thread.join()
