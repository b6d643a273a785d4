"""Jobs on this machine: how one that cannot start ends, what is left of one that is deleted, and what others may do."""

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qlora_api.contract import ResultRecord, encode_record
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.spec.job import API_VERSION, KIND, QLoRAJobSpec
from qlora_api.spec.model import BaseModelSpec
from qlora_api.status import AdapterStatus
from qlora_client import LocalBackendConfig, QLoRAClient

SPEC = QLoRAJobSpec(model=BaseModelSpec(source="pvc://models/base"), dataset=DatasetSpec(source="pvc://data/a.jsonl"))
TIME = "2026-01-02T03:04:05Z"


def stored(runs: Path, name: str, printed: str = "", **spec: object) -> Path:
    """A job as the client has left it, and what its process has printed. Returns the folder of its records."""
    records = runs / name / "records"
    records.mkdir(parents=True)
    document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": {**SPEC.dump(), **spec}}
    (records / "manifest.json").write_text(json.dumps(document))
    (records / "run.jsonl").write_text(printed)
    return records


@contextmanager
def running(records: Path) -> Iterator[None]:
    """As long as the body runs, so does the job's process."""
    with (records / "run.jsonl").open("rb") as output:
        fcntl.flock(output, fcntl.LOCK_EX)
        yield


class Clock:
    """At each wait, an hour later."""

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, _seconds: float) -> None:
        self.now += 3600

    def monotonic(self) -> float:
        return self.now


def test_a_run_that_cannot_start_has_failed_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path / "runs", volumes={"data": tmp_path / "data"}))
    name = client.train(SPEC, name="lost")
    with pytest.raises(RuntimeError, match="give a folder for the claim with --volume models=DIR"):
        client.wait_for_job_status(name, timeout=60, polling_interval=0.1)
    lines = list(client.get_job_logs(name, follow=True))
    assert lines[-1].startswith("Error: spec.model.source is pvc://models/base")
    with pytest.raises(RuntimeError, match=r"lost is Failed and has published no adapter: Error: spec\.model\.source"):
        client.get_adapter(name, tmp_path / "adapter")
    assert client.compare(name).histories[name].training == {}


def test_a_name_is_taken_as_long_as_its_folder_is_there(tmp_path: Path) -> None:
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path))
    client.train(SPEC, name="taken")
    client.wait_for_job_status("taken", {"Failed"}, timeout=60, polling_interval=0.1)
    client.delete_job("taken")
    assert client.list_jobs() == []
    with pytest.raises(RuntimeError, match="taken exists already: choose another name, or remove the folder"):
        client.train(SPEC, name="taken")


def test_a_run_takes_no_module_from_the_folder_of_its_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    client = QLoRAClient(LocalBackendConfig())
    client.train(SPEC, name="own")
    failed = client.wait_for_job_status("own", {"Failed"}, timeout=60, polling_interval=0.1)
    assert "give a folder for the claim" in failed.message


@pytest.mark.parametrize("name", ["", ".", "..", "../outside", "inside/../../outside"])
def test_a_name_leads_to_no_other_folder(tmp_path: Path, name: str) -> None:
    for each in ("outside", "runs/inside"):
        stored(tmp_path, each)
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path / "runs"))
    with pytest.raises(RuntimeError, match="there is no job"):
        client.delete_job(name)
    assert (tmp_path / "outside" / "records" / "manifest.json").exists()


def test_what_a_killed_process_printed_last_is_read_though_its_line_has_no_end(tmp_path: Path) -> None:
    stored(tmp_path, "killed", "loading\nout of memory")
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path))
    assert list(client.get_job_logs("killed", follow=True)) == ["loading", "out of memory"]
    assert client.get_job("killed").message == "out of memory"


def test_a_manifest_of_a_newer_version_is_read_as_far_as_it_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, "newer", fromTheFuture=1)
    stored(tmp_path, "broken", lora={"rank": "many"})
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path))
    assert client.get_job("newer").spec == SPEC
    with pytest.raises(RuntimeError, match=r"broken/records/manifest\.json cannot be read"):
        client.get_job("broken")
    with caplog.at_level(logging.WARNING, "qlora_client"):
        assert [job.name for job in client.list_jobs()] == ["newer"]
    assert "broken/records/manifest.json cannot be read" in caplog.text


def test_logs_that_are_followed_end_when_another_process_deletes_the_job(tmp_path: Path) -> None:
    records = stored(tmp_path, "shared", "begins\n")
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path), sleep=lambda _: shutil.rmtree(records.parent))
    with running(records):
        lines = client.get_job_logs("shared", follow=True)
        assert next(lines) == "begins"
        with pytest.raises(RuntimeError, match="there is no job shared"):
            next(lines)


def test_a_job_is_not_forgotten_while_its_process_goes_on(tmp_path: Path) -> None:
    clock = Clock()
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path), sleep=clock.sleep, monotonic=clock.monotonic)
    # Its process has just begun: its number is not written yet.
    records = stored(tmp_path, "stubborn", workspace={"retain": False}, output={"destination": "pvc://data/adapter"})
    with running(records), pytest.raises(RuntimeError, match="stubborn does not stop"):
        client.delete_job("stubborn")
    assert client.get_job("stubborn").phase == "Failed"
    client.delete_job("stubborn")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_which_a_file_is_gone_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    weights = {"sha256": "a" * 64, "size": 1}
    adapter = AdapterStatus(
        uri=str(tmp_path / "published"),
        sha256="a" * 64,
        size_bytes=1,
        base_model="hf://org/model",
        base_revision="c0ffee",
        rank=8,
        quantization="nf4",
    )
    result = ResultRecord(
        job_uid="local",
        pod_uid="p",
        step="publish",
        time=TIME,
        outcome="succeeded",
        exit_code=0,
        reason="Published",
        message="done",
        adapter=adapter,
    )
    stored(tmp_path / "runs", "lost", encode_record(result) + "\n")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "manifest.json").write_text(json.dumps({"files": {"adapter_model.safetensors": weights}}))
    client = QLoRAClient(LocalBackendConfig(folder=tmp_path / "runs"))
    with pytest.raises(RuntimeError, match=r"adapter_model\.safetensors is missing, though the manifest lists it"):
        client.get_adapter("lost", tmp_path / "copy")
