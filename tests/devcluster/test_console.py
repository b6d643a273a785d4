"""Installers and builders are quiet: their output is in a log file, shown on failure or on request."""

from pathlib import Path

import pytest

from devcluster import console, controlplane, toolchain
from devcluster.errors import ClusterError
from devcluster.layout import Layout


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.delenv(console.VERBOSE, raising=False)
    return Layout(tmp_path / "cache")


def test_a_failure_shows_the_command_and_its_last_lines(layout: Layout) -> None:
    with pytest.raises(ClusterError, match=r"(?s)exit 3: exit status 3; last lines of .*build.log:\n.*no room left"):
        console.run_noisy(layout, ["sh", "-c", "echo no room left; exit 3"])


def test_a_command_that_hangs_is_ended(layout: Layout) -> None:
    with pytest.raises(ClusterError, match="sleep 60: not done after 0 s"):
        console.run_noisy(layout, ["sleep", "60"], seconds=0.2)


def test_a_test_builds_nothing_and_names_the_command_to_run(layout: Layout) -> None:
    with pytest.raises(ClusterError, match="not built: etcd; run `python -m devcluster build etcd`"):
        toolchain.built(layout, ["etcd"])
    with (
        pytest.raises(ClusterError, match="run `python -m devcluster build etcd kubectl kube-apiserver`"),
        controlplane.running(layout=layout),
    ):
        pass
    assert not layout.cache.exists()
    etcd = toolchain.binary(layout, "etcd")
    etcd.parent.mkdir(parents=True)
    etcd.touch()
    assert toolchain.built(layout, ["etcd"]) == {"etcd": etcd}
