"""A running cluster is kept, and one that lacks a program is not."""

import os
from pathlib import Path

import pytest

from devcluster import cluster
from devcluster.layout import Layout

STARTED = {
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "containerd",
    "docker-registry",
    "kubelet",
    "kube-proxy",
    "local-path-provisioner",
}


@pytest.fixture
def running(tmp_path: Path) -> Layout:
    """What `up` leaves on disk: this process plays each program."""
    layout = Layout(tmp_path)
    layout.records.mkdir(parents=True)
    stat = Path(f"/proc/{os.getpid()}/stat").read_text()
    for name in STARTED:
        (layout.records / name).write_text(Path("/proc/sys/kernel/random/boot_id").read_text() + stat)
    layout.ready.touch()
    return layout


def test_a_cluster_needs_no_program_that_it_does_not_start(running: Layout) -> None:
    assert cluster.broken(running) == []


@pytest.mark.parametrize("name", sorted(STARTED))
def test_a_cluster_that_lacks_a_program_is_broken(running: Layout, name: str) -> None:
    (running.records / name).unlink()
    assert cluster.broken(running) == [f"{name} is not running; its log is {running.log(name)}"]
