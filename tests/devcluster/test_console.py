"""Installers and builders are quiet: their output is in a log file, at hand when they fail or when it is asked for."""

import sys
from pathlib import Path

import pytest

from devcluster import addresses, console, controlplane, packages, toolchain
from devcluster.errors import ClusterError
from devcluster.layout import Layout

CHATTY = [sys.executable, "-c", "import sys; print('fetched 1 of 2'); print('fetched 2 of 2', file=sys.stderr)"]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.delenv(console.VERBOSE, raising=False)
    return Layout(tmp_path / "cache")


def test_what_an_installer_prints_is_in_the_log_file_only(layout: Layout, capfd: pytest.CaptureFixture[str]) -> None:
    console.run_noisy(layout, CHATTY)
    console.mention(layout, "half way")
    assert capfd.readouterr() == ("", "")
    command, *printed = layout.build_log.read_text().splitlines()
    assert command.endswith(" ".join(CHATTY))
    assert sorted(printed) == ["fetched 1 of 2", "fetched 2 of 2", "half way"]


def test_it_is_shown_where_verbose_is_set(
    layout: Layout, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(console.VERBOSE, "1")
    console.run_noisy(layout, CHATTY)
    console.mention(layout, "half way")
    shown = capfd.readouterr().err.splitlines()
    assert {"fetched 1 of 2", "fetched 2 of 2", "half way"} <= set(shown)
    assert not layout.build_log.exists()


def test_a_failure_shows_the_command_and_its_last_words(layout: Layout) -> None:
    with pytest.raises(ClusterError, match=r"(?s)exit 3: exit status 3; last lines of .*build.log:\n.*no room left"):
        console.run_noisy(layout, ["sh", "-c", "echo no room left; exit 3"])


def test_a_command_that_hangs_is_ended(layout: Layout) -> None:
    with pytest.raises(ClusterError, match="sleep 60: not done after 0 s"):
        console.run_noisy(layout, ["sleep", "60"], seconds=0.2)


def test_the_log_file_does_not_grow_without_end(layout: Layout) -> None:
    layout.build_log.parent.mkdir(parents=True)
    layout.build_log.write_bytes(b"x" * (console._LARGEST_LOG_BYTES + 1))
    console.mention(layout, "afresh")
    assert layout.build_log.read_text() == "afresh\n"


def test_a_stage_is_one_line_on_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    console.say("building")
    assert capfd.readouterr() == ("", "building\n")


def test_a_test_builds_nothing_and_says_what_to_run(layout: Layout) -> None:
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


def test_only_packages_without_their_program_are_missing() -> None:
    assert packages.missing({"bash": "bash", "nonsense": "no-such-program"}) == ["nonsense"]


def test_ports_differ_and_no_outgoing_connection_can_take_them() -> None:
    ports = list(vars(addresses.free_ports()).values())
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == len(ports)
    assert max(ports) < first
