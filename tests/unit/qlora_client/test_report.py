"""The places of a report; a published one is the one that the status names."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from qlora_client.files import report as report_module
from qlora_client.files.published import DamagedError
from qlora_client.files.report import fetch_report, save
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError, MissingError

PAGE = b"<h1>published</h1>"
CLUSTER = Cluster.__new__(Cluster)


class Found:
    """A published folder, or the pod that reads a workspace."""

    def __init__(self, content: bytes | Exception) -> None:
        self.content = content

    def read(self, *_: object) -> bytes:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes | Exception]:
    """The published report, and the one in the workspace."""
    found: dict[str, bytes | Exception] = {"published": PAGE, "workspace": b"<h1>workspace</h1>"}

    @contextmanager
    def opened(place: str) -> Iterator[Found]:
        yield Found(found[place])

    monkeypatch.setattr(report_module, "open_folder", lambda *_: opened("published"))
    monkeypatch.setattr(report_module, "reading", lambda *_, **__: opened("workspace"))
    return found


def job(**status: Any) -> Job:
    default = {
        "phase": "Succeeded",
        "adapter": {"uri": "s3://team/a"},
        "workspace": {"claimName": "c", "path": "demo-u"},
        "report": {"uri": "s3://team/a/report.html", "sha256": sha256(PAGE).hexdigest()},
    }
    return Job({"metadata": {"name": "demo", "namespace": "team", "uid": "u"}, "spec": {}, "status": default | status})


@pytest.mark.usefixtures("places")
def test_the_published_report_is_preferred_over_the_workspaces() -> None:
    assert fetch_report(CLUSTER, job()) == PAGE
    assert fetch_report(CLUSTER, job(report=None)) == b"<h1>workspace</h1>"


def test_the_workspaces_report_replaces_an_unreadable_published_one(places: dict[str, bytes | Exception]) -> None:
    places["published"], said = ClusterError("set AWS_ACCESS_KEY_ID"), list[str]()
    assert fetch_report(CLUSTER, job(), said.append) == b"<h1>workspace</h1>"
    assert said == ["the published report cannot be read, so that of the workspace is: set AWS_ACCESS_KEY_ID"]


def test_a_published_report_that_was_changed_is_not_shown(places: dict[str, bytes | Exception]) -> None:
    places["published"] = b"<script>"
    with pytest.raises(DamagedError, match=r"s3://team/a/report.html has SHA-256 .*: it was changed after"):
        fetch_report(CLUSTER, job())


def test_a_job_without_a_report_names_the_time_it_is_written(places: dict[str, bytes | Exception]) -> None:
    places["workspace"] = MissingError("no file")
    with pytest.raises(MissingError, match="demo is Training and has no report: it is written when"):
        fetch_report(CLUSTER, job(report=None, phase="Training"))


def test_a_file_is_replaced_whole_and_an_invalid_folder_is_rejected(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    save(b"first", target)
    save(PAGE, target)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert target.read_bytes() == PAGE
    with pytest.raises(ClusterError, match="cannot be written"):
        save(PAGE, target / "inside")
