"""Runs the three steps of a job on this machine, one process after the other, and displays their records."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Protocol, Self, get_args

from qlora_api import contract
from qlora_api.contract import ExitCode, ProgressRecord, ResultRecord, WorkspaceLayout, decode_record
from qlora_api.sources import ConfigMapSource, RegistrySource, VolumeSource, parse_source
from qlora_api.spec.job import QLoRAJobDocument, QLoRAJobSpec
from qlora_api.status import StepName
from qlora_trainer.core.context import Device
from qlora_trainer.core.cpu import preloaded_allocator
from qlora_trainer.core.filesystem import write_atomically

STEPS: tuple[StepName, ...] = ("prepare", "train", "publish")
# The job's UID in records, for a manifest that no API server has given one.
LOCAL_UID = "local"
# Files in the workspace's records/ folder, for `--resume`.
_JOB_FILE = "job.json"
_LOCATIONS_FILE = "run.json"


class Display(Protocol):
    """Shows the run, called by the main thread, `stopping` also by signal handlers."""

    def begin(self, step: StepName) -> None:
        """Called when the step's process starts."""

    def progress(self, record: ProgressRecord) -> None:
        """Called for each progress record of the step."""

    def end(self, step: StepName, result: ResultRecord | None, exit_code: int) -> None:
        """Report the end of the step's process, with None as `result` without a record."""

    def not_trained(self, log: Path) -> None:
        """Report that the shared process has ended without this job. See `log`."""

    def stopping(self, *, again: bool) -> None:
        """Report a stop: the step saves a checkpoint, or is killed with `again`."""


@dataclass(frozen=True)
class LocalRun:
    """A job, and the folders on this machine in place of its claims and ConfigMaps."""

    document: QLoRAJobDocument
    workspace: Path
    claims: Mapping[str, Path]
    config_maps: Mapping[str, Path]
    device: Device
    continues: Path | None = None
    """Workspace of the job that spec.continues names."""
    model_cache: Path | None = None
    """Shared folder of downloaded base models; None for that of the environment."""
    benchmarks: Path | None = None
    """Folder of the tasks of spec.gate.benchmarks."""
    sweep: Path | None = None
    """The folder that the cells of a sweep share, for their rows and their page; None if it is no cell."""

    @property
    def layout(self) -> WorkspaceLayout:
        """The workspace's folders."""
        return WorkspaceLayout(self.workspace.absolute())

    @property
    def is_started(self) -> bool:
        """Whether the workspace holds a run."""
        return (self.layout.records / _JOB_FILE).exists()

    def remember(self) -> Path:
        """Store the run for `recall`, return the job's file. Raises OSError."""
        locations = {
            "device": self.device,
            "claims": {name: str(folder.absolute()) for name, folder in self.claims.items()},
            "configMaps": {name: str(folder.absolute()) for name, folder in self.config_maps.items()},
            **({} if self.continues is None else {"continues": str(self.continues.absolute())}),
            **({} if self.model_cache is None else {"modelCache": str(self.model_cache.absolute())}),
            **({} if self.benchmarks is None else {"benchmarks": str(self.benchmarks.absolute())}),
        }
        write_atomically(self.layout.records / _LOCATIONS_FILE, json.dumps(locations, indent=2).encode() + b"\n")
        job = self.layout.records / _JOB_FILE
        write_atomically(job, json.dumps(self.document.dump(), indent=2).encode() + b"\n")
        return job

    def resuming(self, earlier: "LocalRun | None" = None) -> "LocalRun":
        """This run, with the earlier one's folders as defaults."""
        if earlier is None:
            return self
        return replace(
            self,
            claims={**earlier.claims, **self.claims},
            config_maps={**earlier.config_maps, **self.config_maps},
            continues=self.continues or earlier.continues,
            model_cache=self.model_cache or earlier.model_cache,
            benchmarks=self.benchmarks or earlier.benchmarks,
        )

    @classmethod
    def recall(cls, workspace: Path) -> "LocalRun":
        """Return the run started in the workspace. Raises ValueError without one."""
        records = WorkspaceLayout(workspace.absolute()).records
        try:
            document = QLoRAJobDocument.model_validate_json((records / _JOB_FILE).read_bytes())
            locations = json.loads((records / _LOCATIONS_FILE).read_bytes())
            claims, config_maps = (
                {name: Path(folder) for name, folder in locations[key].items()} for key in ("claims", "configMaps")
            )
            continues, cache, benchmarks = (
                Path(locations[key]) if key in locations else None for key in ("continues", "modelCache", "benchmarks")
            )
            device = _device(locations["device"])
            return cls(document, workspace, claims, config_maps, device, continues, cache, benchmarks)
        except FileNotFoundError as missing:
            raise ValueError(f"{workspace} holds no run to resume: {missing.filename} does not exist") from missing
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{records} holds no readable run: {error}; give FILE instead of --resume") from error


@dataclass(frozen=True)
class Ended:
    """The end of a run."""

    step_exit_code: int
    """Of the last step that ran; 128 + the signal, as in a shell, if a signal has killed it."""
    stopped_by: int | None
    """The first signal that asked the run to stop, if one did."""
    results: Mapping[StepName, ResultRecord]

    @property
    def exit_code(self) -> int:
        """Return the failed step's exit code, or 128 + the signal of the user's stop."""
        stopped = self.step_exit_code in (ExitCode.DONE, ExitCode.INTERRUPTED, 128 + signal.SIGKILL)
        return 128 + self.stopped_by if self.stopped_by is not None and stopped else self.step_exit_code


def _device(name: object) -> Device:
    """The device of that name. Raises ValueError for any other."""
    for device in get_args(Device):
        if name == device:
            return device  # type: ignore[no-any-return]
    raise ValueError(f"device in {_LOCATIONS_FILE} is {str(name)[:80]!r}: must be one of {', '.join(get_args(Device))}")


def missing_sources(
    spec: QLoRAJobSpec, claims: Mapping[str, Path], config_maps: Mapping[str, Path], continues: Path | None
) -> list[str]:
    """Return a sentence for each claim, ConfigMap or other job without a folder."""
    initial = spec.lora.initial_adapter
    addresses = {
        "spec.model.source": spec.model.source,
        **({} if initial is None else {"spec.lora.from.source": initial.source}),
        **_data_addresses(spec),
        **{f"spec.output.{field}": address for field, address in spec.output.destinations.items()},
    }
    problems = _missing(addresses, claims, config_maps)
    if spec.continues is not None and continues is None:
        problems.append(f"spec.continues is {spec.continues}: give the workspace of that run with --continues DIR")
    if spec.continues is None and continues is not None:
        problems.append("--continues is for a job that names another one in spec.continues: set that in FILE")
    return problems


def missing_data(spec: QLoRAJobSpec, claims: Mapping[str, Path], config_maps: Mapping[str, Path]) -> list[str]:
    """The same for the tokenizer and the data."""
    return _missing(_data_addresses(spec), claims, config_maps)


def _data_addresses(spec: QLoRAJobSpec) -> dict[str, str]:
    template = spec.dataset.template_address
    return {**spec.data_addresses, **({} if template is None else {"spec.dataset.chatTemplate": template})}


def _missing(addresses: Mapping[str, str], claims: Mapping[str, Path], config_maps: Mapping[str, Path]) -> list[str]:
    problems = []
    for field, address in addresses.items():
        source = parse_source(address)
        if isinstance(source, VolumeSource) and source.claim not in claims:
            problems.append(f"{field} is {address}: give a folder for the claim with --volume {source.claim}=DIR")
        if isinstance(source, ConfigMapSource) and source.name not in config_maps:
            problems.append(
                f"{field} is {address}: give a folder that has its keys as files with --config-map {source.name}=DIR"
            )
    return problems


def has_gpu() -> bool:
    """Whether a CUDA driver is installed, without the seconds that PyTorch takes."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def run_steps(run: LocalRun, display: Display) -> Ended:
    """Run the steps until one fails or the user stops the run. Each skips what an earlier run has finished.

    Raises OSError if the workspace cannot be written.
    """
    shown = ShownRun.of(run, display)
    with Stop(display) as stop:
        return go_through(STEPS, shown, stop)


@dataclass(frozen=True)
class ShownRun:
    """A run whose steps are started and shown."""

    run: LocalRun
    job_file: Path
    """The job's document, JSON."""
    job_uid: str
    """The UID in that document, which the records of its steps have."""
    display: Display

    @classmethod
    def of(cls, run: LocalRun, display: Display) -> Self:
        """The run, stored in its workspace. Raises OSError."""
        return cls(run, run.remember(), run.document.metadata.uid or LOCAL_UID, display)


def go_through(steps: Sequence[StepName], shown: ShownRun, stop: "Stop") -> Ended:
    """Run the steps until one fails or the user stops the run."""
    results: dict[StepName, ResultRecord] = {}
    for step in steps:
        shown.display.begin(step)
        exit_code, result = run_step(step, [shown], stop)
        shown.display.end(step, result, exit_code)
        if result is not None:
            results[step] = result
        if exit_code != 0 or stop.signal is not None:
            return Ended(exit_code, stop.signal, results)
    return Ended(0, None, results)


class Stop:
    """Passes Ctrl-C and SIGTERM on to the step, as SIGTERM first, then as SIGKILL."""

    def __init__(self, display: Display) -> None:
        self.signal: int | None = None
        self._display = display
        self._process: subprocess.Popen[str] | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def of(self, process: subprocess.Popen[str]) -> Iterator[None]:
        """Send signals to this process from now on, also one that came before."""
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


@dataclass(frozen=True)
class _Step:
    """The process of a step that runs."""

    process: subprocess.Popen[str]
    output: IO[str]
    pod_uid: str
    errors: list[str]
    """Lines of standard error; complete once `drain` has ended."""
    drain: threading.Thread


def run_step(step: StepName, jobs: Sequence[ShownRun], stop: Stop) -> tuple[int, ResultRecord | None]:
    """Run a step of the first job; the train step trains the others together with it, and shows the progress of all.

    Returns the exit code, as a shell has it, and the first job's result if the step left one.
    """
    running = _start(step, jobs)
    with stop.of(running.process):
        result = _follow(running, jobs)
        exit_code = running.process.wait()
    running.drain.join()
    sys.stderr.writelines(running.errors)
    return (exit_code if exit_code >= 0 else 128 - exit_code), result


def _start(step: StepName, jobs: Sequence[ShownRun]) -> _Step:
    pod_uid = str(uuid.uuid4())
    process = subprocess.Popen(
        _command(step, jobs),
        env=_environment(jobs[0].run, step, pod_uid),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A new session: Ctrl-C reaches only `qlora run`, which passes it on.
        start_new_session=True,
    )
    if process.stdout is None or process.stderr is None:
        raise AssertionError("both are pipes")
    errors: list[str] = []
    # On another thread: a step that fills the pipe of its errors would wait for a reader.
    drain = threading.Thread(target=errors.extend, args=(process.stderr,))
    drain.start()
    return _Step(process, process.stdout, pod_uid, errors, drain)


def _environment(run: LocalRun, step: StepName, pod_uid: str) -> dict[str, str]:
    environment = {**os.environ, contract.ENV_POD_UID: pod_uid, contract.ENV_DEVICE: run.device}
    # On this machine the user is the administrator: the registries that the job names are allowed.
    environment.setdefault(contract.ENV_REGISTRIES, " ".join(_registries(run.document.spec)))
    if run.benchmarks is not None:
        environment[contract.ENV_BENCHMARKS] = str(run.benchmarks.absolute())
    if run.sweep is not None:
        environment[contract.ENV_SWEEP_FOLDER] = str(run.sweep.absolute())
    if step == "train" and run.device == "cpu":
        environment |= preloaded_allocator(environment)
    # As in the image: no module is imported from the working directory, which may hold downloaded files.
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def _follow(step: _Step, jobs: Sequence[ShownRun]) -> ResultRecord | None:
    """Show progress until the step closes its output, return its result."""
    result: ResultRecord | None = None
    try:
        for line in step.output:
            for job in jobs:
                record = decode_record(line.rstrip("\n"), job_uid=job.job_uid, pod_uid=step.pod_uid)
                if isinstance(record, ProgressRecord):
                    job.display.progress(record)
                elif record is not None:
                    result = record
    except BaseException:
        # The display is gone, as when a pipe's reader ends. Read on: the step cannot save while its output is blocked.
        step.process.terminate()
        deque(step.output, maxlen=0)
        step.process.wait()
        raise
    return result


def _registries(spec: QLoRAJobSpec) -> list[str]:
    """Return the job's registries as a profile lists them, local ones without TLS."""
    initial = [spec.lora.initial_adapter.source] if spec.lora.initial_adapter else []
    return list(allowed_registries([spec.model.source, *initial, *spec.output.destinations.values()]))


def allowed_registries(addresses: Sequence[str]) -> tuple[str, ...]:
    """Return the addresses' registries as a profile lists them, local without TLS."""
    sources = map(parse_source, addresses)
    hosts = sorted({source.registry for source in sources if isinstance(source, RegistrySource)})
    return tuple(f"http://{host}" if host.partition(":")[0] in ("localhost", "127.0.0.1") else host for host in hosts)


def _command(step: StepName, jobs: Sequence[ShownRun]) -> list[str]:
    run = jobs[0].run
    command = [sys.executable, "-m", "qlora_trainer", step]
    command += ["--job", str(jobs[0].job_file), "--workspace", str(run.layout.root)]
    for other in jobs[1:]:
        command += ["--with", str(other.job_file), str(other.run.layout.root)]
    # `qlora run` may itself run in a pod, whose termination message is not the step's to write.
    command += ["--termination-log", os.devnull, "--claim", ""]
    for name, folder in run.claims.items():
        command += ["--volume", f"{name}={folder.absolute()}"]
    for name, folder in run.config_maps.items():
        command += ["--config-map", f"{name}={folder.absolute()}"]
    if run.continues is not None:
        command += ["--continues", str(run.continues.absolute())]
    if run.model_cache is not None:
        command += ["--model-cache", str(run.model_cache.absolute())]
    return command
