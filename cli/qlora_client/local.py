"""Runs the Python client's jobs on this machine, each by a `qlora run` in the background."""

import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from qlora_api.contract import Record, ResultRecord, WorkspaceLayout, decode_any_record
from qlora_api.profile import DNS_LABEL
from qlora_api.sources import VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec
from qlora_api.status import StepName
from qlora_client.backends import BackendConfig
from qlora_client.files.adapter import fetch_adapter
from qlora_client.files.published import Folder, OnBytes, PublishedFile
from qlora_client.history import METRICS, LossHistory, of_metrics
from qlora_client.jobs.events import Event
from qlora_client.jobs.job import Job
from qlora_client.kube.errors import ClusterError, MissingError, RejectedError
from qlora_client.local_status import local_status

_LOGGER = logging.getLogger("qlora_client")
_MANIFEST, _OUTPUT, _PROCESS = "manifest.json", "run.jsonl", "run.pid"
_BLOCK_BYTES = 2**16
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_STOP = 60.0


class LocalBackendConfig(BackendConfig):
    """This machine, with the extras `cli` and `trainer` installed.

    Attributes:
        folder: Folder of the runs; each job has its workspace by its name in it.
        volumes: Folder to use for `pvc://CLAIM/…`, by the claim's name.
        config_maps: Folder to use for `configMap://NAME/…`, by its name.
        device: What to train on; `cuda` if not set and there is a driver.
    """

    folder: Path | str = "runs"
    volumes: Mapping[str, Path | str] = {}
    config_maps: Mapping[str, Path | str] = {}
    device: Literal["cuda", "cpu"] | None = None


@dataclass(frozen=True)
class _LocalFolder:
    path: Path

    def read(self, name: str, most: int) -> bytes:
        return (self.path / name).read_bytes()[:most]

    def fetch(self, files: Mapping[str, PublishedFile], into: Path, on_bytes: OnBytes) -> None:
        for name in files:
            # One that is missing is found when what has arrived is compared with the manifest.
            with suppress(FileNotFoundError):
                shutil.copyfile(self.path / name, into / name)


@dataclass(frozen=True)
class LocalBackend:
    """The runs of a folder. Other processes may have started them."""

    config: LocalBackendConfig
    sleep: Callable[[float], None] = time.sleep
    monotonic: Callable[[], float] = time.monotonic
    _started: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    """Kept until they have ended, as Python warns of one that is forgotten before."""

    def create(self, body: dict[str, Any]) -> None:
        """Start the job. Raises RejectedError if its folder exists already."""
        name = body["metadata"]["name"]
        workspace, records = self._workspace(name), self._records(name)
        try:
            workspace.mkdir(parents=True)
        except FileExistsError:
            raise RejectedError(f"{workspace} exists already: choose another name, or remove the folder") from None
        records.mkdir()
        # Without the working directory in the path of modules: a user may have a click.py there.
        command = [sys.executable, "-P", "-m", "qlora_cli", "run", str(records / _MANIFEST), "--output=json"]
        command += [f"--workspace={workspace}", *([f"--device={self.config.device}"] if self.config.device else [])]
        command += [f"--volume={claim}={folder}" for claim, folder in self.config.volumes.items()]
        command += [f"--config-map={each}={folder}" for each, folder in self.config.config_maps.items()]
        with (records / _OUTPUT).open("wb") as output:
            # The lock goes with the process: while it runs nobody else gets one, in whatever process they are.
            fcntl.flock(output, fcntl.LOCK_EX)
            # After the output, which is looked for where there is a manifest; and whole, as others may look now.
            partial = records / f"{_MANIFEST}.partial"
            partial.write_text(json.dumps(body))
            partial.rename(records / _MANIFEST)
            # A session of its own: to interrupt a notebook's cell must not stop the run.
            started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        (records / _PROCESS).write_text(str(started.pid))
        self._started[:] = [each for each in (*self._started, started) if each.poll() is None]

    def get(self, name: str) -> Job:
        """As the protocol says."""
        if not re.fullmatch(DNS_LABEL, name):
            raise self._missing(name)
        written = self._records(name) / _MANIFEST
        try:
            document = QLoRAJobDocument.model_validate_json(written.read_bytes(), extra="ignore")
            created = written.stat()
            # Asked first: what a process prints before it ends must not be missed.
            runs = self._runs(name)
            found, rest = _parsed(self._lines(name))
        except FileNotFoundError:
            raise self._missing(name) from None
        except ValueError as error:
            raise ClusterError(f"{written} cannot be read: {error}") from None
        started = f"{datetime.fromtimestamp(created.st_mtime, UTC):%Y-%m-%dT%H:%M:%SZ}"
        status = local_status(found, started, runs=runs, error=rest[-1] if rest else "")
        metadata = {"name": name, "namespace": "local", "uid": str(created.st_mtime_ns), "creationTimestamp": started}
        return Job({**document.dump(), "metadata": metadata, "status": status.dump()})

    def find(self) -> list[Job]:
        """As the protocol says; one whose manifest cannot be read is logged and left out."""
        found = []
        for path in sorted(Path(self.config.folder).glob(f"*/records/{_MANIFEST}")):
            try:
                found.append(self.get(path.parent.parent.name))
            except MissingError:
                pass  # another process has deleted it meanwhile
            except ClusterError as error:
                _LOGGER.warning("%s", error)
        return found

    def logs(self, name: str, steps: Collection[StepName], *, follow: bool) -> Iterator[str]:
        """As the protocol says; with `follow` until the job has ended."""
        self.get(name)
        rest = b""
        with (self._records(name) / _OUTPUT).open("rb") as output:
            while True:
                # Asked first: what a process prints before it ends must not be missed.
                runs = self._runs(name)
                while block := output.read(_BLOCK_BYTES):
                    *lines, rest = (rest + block).split(b"\n")
                    yield from (line for each in lines if _is_of(line := each.decode(errors="replace"), steps))
                if not (follow and runs):
                    # The last words of a process may have no end.
                    if rest and _is_of(last := rest.decode(errors="replace"), steps):
                        yield last
                    return
                self.sleep(_SECONDS_BETWEEN_LOOKS)

    def events(self, job: Job) -> list[Event]:
        """The results of its steps."""
        results = [each for each in _parsed(self._lines(job.name))[0] if isinstance(each, ResultRecord)]
        kinds = {"succeeded": "Normal"}
        return [
            Event(datetime.fromisoformat(each.time), kinds.get(each.outcome, "Warning"), each.reason, each.message)
            for each in results
        ]

    def delete(self, job: Job) -> None:
        """Stop the job and forget it; its folder stays if spec.workspace.retain is true."""
        # The second signal stops a step that does not save in time.
        for _ in range(2):
            deadline = self.monotonic() + _SECONDS_TO_STOP
            self._stop(job.name)
            while self._runs(job.name) and self.monotonic() < deadline:
                self.sleep(_SECONDS_BETWEEN_LOOKS)
        if self._runs(job.name):
            raise ClusterError(f"{job.name} does not stop: end its process, then delete it again")
        if job.retains_workspace:
            (self._records(job.name) / _MANIFEST).unlink()
        else:
            shutil.rmtree(self._workspace(job.name))

    def download(self, job: Job, target: Path) -> None:
        """As the protocol says."""
        fetch_adapter(job, target, self._open)

    def histories(self, jobs: Sequence[Job]) -> Mapping[str, LossHistory]:
        """Every step that the jobs have done."""
        found = {}
        for job in jobs:
            metrics = WorkspaceLayout(self._workspace(job.name)).report / METRICS
            # Without the last line while it is being written.
            content = metrics.read_bytes().rpartition(b"\n")[0] if metrics.exists() else b""
            try:
                found[job.name] = of_metrics(content)
            except ValueError as error:
                raise ClusterError(f"the metrics of {job.name} cannot be read: {error}") from None
        return found

    def model_config(self, spec: QLoRAJobSpec) -> Path | None:
        """In the folder that stands for the model's claim."""
        source = parse_source(spec.model.source)
        if isinstance(source, VolumeSource) and source.claim in self.config.volumes:
            return Path(self.config.volumes[source.claim]) / source.path / "config.json"
        return None

    def _stop(self, name: str) -> None:
        # It has ended meanwhile, or its number is not written yet.
        with suppress(ProcessLookupError, FileNotFoundError, ValueError):
            # Only while it runs: afterwards another process may have its number.
            if self._runs(name):
                os.kill(int((self._records(name) / _PROCESS).read_text()), signal.SIGTERM)

    def _open(self, address: str) -> AbstractContextManager[Folder]:
        if address.startswith("/"):
            return nullcontext(_LocalFolder(Path(address)))
        source = parse_source(address)
        if isinstance(source, VolumeSource):
            if source.claim not in self.config.volumes:
                raise ClusterError(f"the adapter is at {address}: give a folder for {source.claim} with volumes")
            return nullcontext(_LocalFolder(Path(self.config.volumes[source.claim]) / source.path))
        from qlora_client.files.stores import open_store

        return open_store(source, {})

    def _workspace(self, name: str) -> Path:
        return Path(self.config.folder).absolute() / name

    def _records(self, name: str) -> Path:
        return WorkspaceLayout(self._workspace(name)).records

    def _lines(self, name: str) -> list[str]:
        """The lines of the run's output."""
        return (self._records(name) / _OUTPUT).read_text(errors="replace").split("\n")

    def _runs(self, name: str) -> bool:
        try:
            with (self._records(name) / _OUTPUT).open("rb") as output:
                fcntl.flock(output, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            raise self._missing(name) from None
        return False

    def _missing(self, name: str) -> MissingError:
        return MissingError(f"there is no job {name} in {self.config.folder}")


def _is_of(line: str, steps: Collection[StepName]) -> bool:
    """Whether the line may be of one of the steps; one that is no record does not say."""
    record = decode_any_record(line)
    return record is None or record.step in steps


def _parsed(lines: Sequence[str]) -> tuple[list[Record], list[str]]:
    """The records in the lines, and the other lines that say something."""
    decoded = [(line, decode_any_record(line)) for line in lines]
    rest = [line.strip() for line, record in decoded if record is None and line.strip()]
    return [record for _, record in decoded if record is not None], rest
