"""Runs the three steps of a job on this machine, one process after the other, and passes on what they report."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

from qlora_api import contract
from qlora_api.contract import ExitCode, ProgressRecord, ResultRecord, WorkspaceLayout, decode_record
from qlora_api.sources import ConfigMapSource, RegistrySource, VolumeSource, parse_source
from qlora_api.status import StepName
from qlora_api.v1alpha1 import QLoRAJobDocument, QLoRAJobSpec
from qlora_trainer.core.context import Device
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.process import preloaded_allocator

STEPS: tuple[StepName, ...] = ("prepare", "train", "publish")
# What a process reports that has no UID from an API server.
_LOCAL_UID = "local"


_JOB_FILE = "job.json"
_PLACES_FILE = "run.json"


class Display(Protocol):
    """What shows a run to the person who waits for it."""

    def begin(self, step: StepName) -> None:
        """The step's process starts."""

    def progress(self, record: ProgressRecord) -> None:
        """The step has reported progress."""

    def end(self, step: StepName, result: ResultRecord | None, exit_code: int) -> None:
        """The step's process has ended; without a result if it was killed."""

    def stopping(self, *, again: bool) -> None:
        """The user wants to stop: the step saves first, or, asked again, is killed."""


@dataclass(frozen=True)
class LocalRun:
    """A job and where its sources lie on this machine."""

    document: QLoRAJobDocument
    workspace: Path
    claims: Mapping[str, Path]
    config_maps: Mapping[str, Path]
    device: Device

    @property
    def layout(self) -> WorkspaceLayout:
        """The workspace's folders."""
        return WorkspaceLayout(self.workspace.absolute())

    def remember(self) -> Path:
        """Write down in the workspace what `recall` needs; returns the job's file. Raises OSError."""
        places = {
            "device": self.device,
            "claims": {name: str(folder.absolute()) for name, folder in self.claims.items()},
            "configMaps": {name: str(folder.absolute()) for name, folder in self.config_maps.items()},
        }
        write_atomically(self.layout.records / _PLACES_FILE, json.dumps(places, indent=2).encode() + b"\n")
        job = self.layout.records / _JOB_FILE
        write_atomically(job, json.dumps(self.document.dump(), indent=2).encode() + b"\n")
        return job

    @classmethod
    def recall(cls, workspace: Path) -> "LocalRun":
        """The run whose workspace this is. Raises ValueError if no run has been started in it."""
        records = WorkspaceLayout(workspace.absolute()).records
        try:
            document = QLoRAJobDocument.model_validate_json((records / _JOB_FILE).read_bytes())
            places = json.loads((records / _PLACES_FILE).read_bytes())
            claims, config_maps = (
                {name: Path(folder) for name, folder in places[key].items()} for key in ("claims", "configMaps")
            )
            return cls(document, workspace, claims, config_maps, _device(places["device"]))
        except FileNotFoundError as missing:
            raise ValueError(f"{workspace} holds no run to go on with: {missing.filename} does not exist") from missing
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{records} holds no readable run: {error}; name the manifest's file instead") from error


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    step_exit_code: int
    """Of the last step that ran; that of a shell if a signal has killed it."""
    stopped_by: int | None
    """The signal that asked to stop, if one did."""
    results: Mapping[StepName, ResultRecord]

    @property
    def exit_code(self) -> int:
        """That of the step that failed, or 128 + the signal, as a shell has it, if the user stopped the run."""
        stopped = self.step_exit_code in (ExitCode.DONE, ExitCode.INTERRUPTED, 128 + signal.SIGKILL)
        return 128 + self.stopped_by if self.stopped_by is not None and stopped else self.step_exit_code


def _device(name: object) -> Device:
    """The device of that name. Raises ValueError if there is none."""
    for device in get_args(Device):
        if name == device:
            return device  # type: ignore[no-any-return]
    raise ValueError(f"{_PLACES_FILE} has device {str(name)[:80]!r}")


def missing_sources(spec: QLoRAJobSpec, claims: Mapping[str, Path], config_maps: Mapping[str, Path]) -> list[str]:
    """One sentence for each claim or ConfigMap that the job names and the command line does not."""
    addresses = {
        "spec.model.source": spec.model.source,
        "spec.dataset.source": spec.dataset.source,
        "spec.dataset.eval.source": spec.dataset.eval.source if spec.dataset.eval else None,
        "spec.output.destination": spec.output.destination,
        "spec.output.merged.destination": spec.output.merged.destination if spec.output.merged else None,
    }
    problems = []
    for field, address in addresses.items():
        source = parse_source(address) if address else None
        if isinstance(source, VolumeSource) and source.claim not in claims:
            problems.append(f"{field} is {address}: say where the claim lies with --volume {source.claim}=DIR")
        if isinstance(source, ConfigMapSource) and source.name not in config_maps:
            problems.append(
                f"{field} is {address}: say where its keys lie as files with --config-map {source.name}=DIR"
            )
    return problems


def has_gpu() -> bool:
    """Whether a CUDA driver is installed. Costs nothing, where asking PyTorch costs seconds."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def run_steps(run: LocalRun, display: Display) -> Ended:
    """Run the steps until one fails or the user stops it. What an earlier run has finished is not done again."""
    job = run.remember()
    results: dict[StepName, ResultRecord] = {}
    with _Stop(display) as stop:
        for step in STEPS:
            display.begin(step)
            exit_code, result = _run_step(run, step, job, display, stop)
            display.end(step, result, exit_code)
            if result is not None:
                results[step] = result
            if exit_code != 0 or stop.signal is not None:
                return Ended(exit_code, stop.signal, results)
    return Ended(0, None, results)


class _Stop:
    """Passes Ctrl-C and SIGTERM on to the step that runs, as a pod's SIGTERM: first politely, then not."""

    def __init__(self, display: Display) -> None:
        self.signal: int | None = None
        self._display = display
        self._process: subprocess.Popen[str] | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def of(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Signals are for this process now."""
        self._process = process
        if self.signal is not None:
            process.terminate()
        try:
            yield
        finally:
            self._process = None

    def _handle(self, number: int, _frame: object) -> None:
        again = self.signal is not None
        self.signal = self.signal or number
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL if again else signal.SIGTERM)
        self._display.stopping(again=again)


def _run_step(
    run: LocalRun, step: StepName, job: Path, display: Display, stop: _Stop
) -> tuple[int, ResultRecord | None]:
    pod_uid = str(uuid.uuid4())
    environment = {**os.environ, contract.ENV_POD_UID: pod_uid, contract.ENV_DEVICE: run.device}
    # Who runs a job here is the administrator here: the registries that it names are allowed.
    environment.setdefault(contract.ENV_REGISTRIES, " ".join(_registries(run.document.spec)))
    if step == "train" and run.device == "cpu":
        environment |= preloaded_allocator(environment)
    # As in the image: what lies where the user happens to be, perhaps among downloaded data, is not imported.
    environment["PYTHONSAFEPATH"] = "1"
    # A session of its own: Ctrl-C reaches this process only, which knows what to do with it.
    process = subprocess.Popen(
        _command(run, step, job),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if process.stdout is None or process.stderr is None:
        raise AssertionError("both are pipes")
    errors: list[str] = []
    drain = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,))
    drain.start()
    result: ResultRecord | None = None
    with stop.of(process):
        try:
            for line in process.stdout:
                record = decode_record(line.rstrip("\n"), job_uid=_job_uid(run.document), pod_uid=pod_uid)
                if isinstance(record, ProgressRecord):
                    display.progress(record)
                elif record is not None:
                    result = record
        except BaseException:
            # The display is gone, as at the end of a pipe. Read on: the step could not save into a closed pipe.
            process.terminate()
            deque(process.stdout, maxlen=0)
            process.wait()
            raise
        exit_code = process.wait()
    drain.join()
    sys.stderr.writelines(errors)
    return (exit_code if exit_code >= 0 else 128 - exit_code), result


def _registries(spec: QLoRAJobSpec) -> list[str]:
    """The registries that the job names, as a profile lists them; one on this machine speaks without TLS."""
    merged = spec.output.merged.destination if spec.output.merged else None
    addresses = (parse_source(uri) for uri in (spec.model.source, spec.output.destination, merged) if uri)
    hosts = sorted({source.registry for source in addresses if isinstance(source, RegistrySource)})
    return [f"http://{host}" if host.partition(":")[0] in ("localhost", "127.0.0.1") else host for host in hosts]


def _job_uid(document: QLoRAJobDocument) -> str:
    return document.metadata.uid or _LOCAL_UID


def _command(run: LocalRun, step: StepName, job: Path) -> list[str]:
    command = [sys.executable, "-m", "qlora_trainer", step, "--job", str(job), "--workspace", str(run.layout.root)]
    # In a pod of its own, `qlora run` must not write the pod's termination message.
    command += ["--termination-log", os.devnull, "--claim", ""]
    for name, folder in run.claims.items():
        command += ["--volume", f"{name}={folder.absolute()}"]
    for name, folder in run.config_maps.items():
        command += ["--config-map", f"{name}={folder.absolute()}"]
    return command
