"""Only objects of this project are removed from the machine."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from devcluster import cleanup, cluster, layout, machine, node
from devcluster.__main__ import main
from devcluster.errors import ClusterError

FOREIGN = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -i eth0 -m comment --comment "not KUBE-FORWARD at all" -j DROP
COMMIT
"""
MIXED = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER-USER - [0:0]
:KUBE-FORWARD - [0:0]
:QLORA-FORWARD - [0:0]
-A FORWARD -j QLORA-FORWARD
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -i eth0 -m comment --comment "not KUBE-FORWARD at all" -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A QLORA-FORWARD -i qlora0 -j KUBE-FORWARD
COMMIT
"""


def in_network_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """A new namespace, so the machine's rules are neither read nor changed."""
    command = ["unshare", "--map-root-user", "--net", "sh", "-euc", script]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_removal_leaves_exactly_the_rules_of_others(tmp_path: Path) -> None:
    if in_network_namespace("iptables-save").returncode != 0:
        pytest.skip("needs iptables and the right to make a network namespace")
    (tmp_path / "mixed").write_text(MIXED)
    (tmp_path / "removal").write_text(machine.rule_removal(MIXED))
    done = in_network_namespace(
        f"iptables-restore < {tmp_path}/mixed; iptables-restore --noflush < {tmp_path}/removal; iptables-save"
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line[0] != "#"] == FOREIGN.splitlines()


def test_removal_leaves_no_rule_of_network_policies(tmp_path: Path) -> None:
    if in_network_namespace("iptables-save").returncode != 0:
        pytest.skip("needs iptables and the right to make a network namespace")
    (tmp_path / "rules").write_text(node.policy_rules())
    added = in_network_namespace(f"iptables-restore < {tmp_path}/rules; iptables-save")
    assert added.returncode == 0, added.stderr
    assert len(machine.our_rules(added.stdout)) == 6
    (tmp_path / "removal").write_text(machine.rule_removal(added.stdout))
    done = in_network_namespace(
        f"iptables-restore < {tmp_path}/rules; iptables-restore --noflush < {tmp_path}/removal; iptables-save"
    )
    assert done.returncode == 0, done.stderr
    assert machine.our_rules(done.stdout) == []


def test_foreign_rules_give_nothing_to_remove() -> None:
    assert machine.rule_removal(FOREIGN) == ""
    assert machine.our_rules(FOREIGN) == []


def test_a_snapshot_survives_being_written(tmp_path: Path) -> None:
    before = machine.Machine({"vm/overcommit_memory": "0"}, ["eth0"], [], ["/run/netns"], ["/"])
    before.save(tmp_path / "before.json")
    assert machine.load(tmp_path / "before.json") == before
    assert machine.load(tmp_path / "none.json") is None


def test_a_cache_folder_too_deep_for_sockets_is_rejected() -> None:
    with pytest.raises(ClusterError, match="at most 60: set QLORA_CACHE to a shorter path"):
        layout.from_environment({"QLORA_CACHE": "/" + "x" * 60})


@pytest.mark.parametrize(
    ("started_by_tests", "reason"), [(False, "may hold your work"), (True, "tests have started the embedded cluster")]
)
def test_users_and_tests_reject_each_others_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started_by_tests: bool, reason: str
) -> None:
    # Should it be accepted, a user who is not root starts none.
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    where = layout.Layout(tmp_path)
    work = where.volumes / "adapter"
    work.mkdir(parents=True)
    if started_by_tests:
        where.for_tests.touch()
    # It is broken too: no program runs. Only its owner may remove it.
    with pytest.raises(ClusterError, match=f"{reason}.*`make cluster-down`"):
        cluster.up(where, for_tests=not started_by_tests)
    assert work.exists()


def test_tests_stop_only_their_own_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stopped: list[layout.Layout] = []
    monkeypatch.setattr(cleanup, "down", stopped.append)
    # Sockets need a short path.
    with tempfile.TemporaryDirectory() as cache:
        monkeypatch.setenv("QLORA_CACHE", cache)
        where = layout.Layout(Path(cache))
        where.cluster.mkdir()
        assert main(["down", "--for-tests"]) == 1
        assert "`make cluster-down` stops it" in capsys.readouterr().err
        where.for_tests.touch()
        with cluster.used_by_tests(where):
            assert main(["down", "--for-tests"]) == 1
        assert "other tests use" in capsys.readouterr().err
        assert (main(["down", "--for-tests"]), stopped) == (0, [where])
