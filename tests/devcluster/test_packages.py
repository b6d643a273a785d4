"""What is said where packages cannot be fetched."""

import os
from pathlib import Path

import pytest

from devcluster import packages
from devcluster.errors import ClusterError
from devcluster.layout import Layout


def test_without_root_it_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To install Prometheus does not: its files are looked for in the cache only."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match=r"Debian's prometheus: run `python -m devcluster packages` as root") as told:
        packages.unpack(Layout(tmp_path))
    assert str(tmp_path / "packages") in str(told.value)
    with pytest.raises(ClusterError, match=r"missing: no-package .* install them"):
        packages.ensure(Layout(tmp_path), {"no-package": "no-such-program"})
