"""Runs a sweep's cells on this machine, and publishes the best on request.

The cells of a pod share one process.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qlora_api.contract import ENV_MODEL_CACHE
from qlora_api.schema import replace
from qlora_api.spec.job import ObjectMeta, QLoRAJobDocument
from qlora_api.sweep.cells import FoundRun, best_job, repeated_cell
from qlora_api.sweep.spec import Cell, QLoRASweepDocument, cells, pods
from qlora_cli.local.run import STEPS, Display, Ended, LocalRun, ShownRun, Stop, go_through, run_step
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.filesystem import write_atomically

# In the folder of the sweep, for `--resume`.
_SWEEP_FILE = "sweep.json"
_MODELS_FOLDER = "models"
_SHARED_FOLDER = "shared"
# In a workspace's records/ folder: the job with another UID.
_JOB_FILE = "job-together.json"
# No claim is mounted here; each cell has the folder of its name.
_CLAIM = "workspace"


@dataclass(frozen=True)
class LocalSweep:
    """A sweep with a run for each of its cells."""

    document: QLoRASweepDocument
    root: Path
    cells: tuple[Cell, ...]
    runs: tuple[LocalRun, ...]
    """Of the cells, in their order."""

    @classmethod
    def of(cls, document: QLoRASweepDocument, earlier: Sequence[LocalRun], options: LocalRun) -> "LocalSweep":
        """Build the sweep with these options in the folder `options.workspace`.

        A cell has the folder of its name there. `earlier`: runs of its cells, to be resumed. Raises StepFailure
        (BAD_CONFIGURATION) if a cell does not fit the template, or is the same as another, or if the sweep stops cells.
        """
        spec = document.spec
        if spec.halving is not None:
            raise bad_configuration("spec.halving stops cells in a cluster only: remove it from FILE")
        try:
            found = cells(document.metadata.name, spec, spec.template.spec.workspace.claim_name or _CLAIM)
        except ValueError as error:
            raise bad_configuration(str(error)) from error
        if (repeated := repeated_cell(spec, found)) is not None:
            raise bad_configuration(repeated)
        # The cells share their downloads, unless the environment names a place for them.
        models = None if os.environ.get(ENV_MODEL_CACHE) else options.workspace / _MODELS_FOLDER
        before = {run.document.metadata.name: run for run in earlier}
        runs = [
            dataclasses.replace(
                options,
                document=as_job(cell),
                workspace=options.workspace / cell.name,
                model_cache=models,
                sweep=options.workspace / _SHARED_FOLDER,
            ).resuming(before.get(cell.name))
            for cell in found
        ]
        return cls(document, options.workspace, found, tuple(runs))

    @property
    def shared(self) -> Path:
        """The folder that the cells share: their rows, and the page that compares them."""
        return self.root / _SHARED_FOLDER

    @property
    def every_run(self) -> tuple[LocalRun, ...]:
        """The cells' runs, and that of the job that publishes the best, if there is one."""
        best = [self.best_run(0)] if self.document.spec.publish == "best" else []
        return (*self.runs, *best)

    def best_run(self, number: int) -> LocalRun:
        """The run that publishes the adapter of that cell, from the end of its run."""
        run, cell = self.runs[number], self.cells[number]
        best = best_job(self.document.metadata.name, self.document.spec, cell, cell.spec.dump(), FoundRun())
        return dataclasses.replace(
            run, document=as_job(best), workspace=self.root / best.name, continues=run.workspace, sweep=None
        )


def as_job(cell: Cell) -> QLoRAJobDocument:
    """The QLoRAJob of the cell."""
    metadata = ObjectMeta(name=cell.name)
    return QLoRAJobDocument(api_version="qlora.dev/v1beta1", kind="QLoRAJob", metadata=metadata, spec=cell.spec)


def earlier_sweep(root: Path) -> tuple[QLoRASweepDocument, list[LocalRun]] | None:
    """Read the sweep that was started in this folder, and the runs of its cells.

    Returns None if there was none. Raises ValueError if one of them cannot be read.
    """
    file = root / _SWEEP_FILE
    try:
        document = QLoRASweepDocument.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ValueError(f"{file} cannot be read: {error}; give FILE instead of --resume") from error
    names = (f"{document.metadata.name}-{number:02}" for number in range(len(document.spec.overrides())))
    return document, [LocalRun.recall(root / name) for name in names]


def run_sweep(sweep: LocalSweep, show: Callable[[LocalRun], Display]) -> dict[str, Ended]:
    """Run the cells, and return how each job has ended, by its name.

    Each step skips the finished work of an earlier run. A cell that fails stops no other. Raises OSError if a workspace
    cannot be written.
    """
    write_atomically(sweep.root / _SWEEP_FILE, json.dumps(sweep.document.dump()).encode() + b"\n")
    # Before the first of them runs: all are resumed from here.
    jobs = [ShownRun.of(run, show(run)) for run in sweep.runs]
    ended: dict[str, Ended] = {}
    with Stop(jobs[0].display) as stop:
        for pod in pods(sweep.document.spec, jobs):
            for job, end in zip(pod, _run_pod(pod, stop), strict=True):
                ended[job.run.document.metadata.name] = end
            if stop.signal is not None:
                return ended
        number = best_cell(sweep, ended)
        if sweep.document.spec.publish == "best" and number is not None:
            run = sweep.best_run(number)
            ended[run.document.metadata.name] = go_through(STEPS, ShownRun.of(run, show(run)), stop)
    return ended


def best_cell(sweep: LocalSweep, ended: Mapping[str, Ended]) -> int | None:
    """Return the number of the best cell, or None without a success or a comparison."""

    def key(number: int) -> tuple[float, float]:
        results = ended[sweep.cells[number].name].results
        gate, loss = results["publish"].gate, results["train"].eval_loss
        score = gate.score if gate is not None and gate.score is not None else 0.0
        of_loss = math.inf if loss is None else loss
        return (-score, of_loss) if sweep.document.spec.best == "score" else (of_loss, 0.0)

    numbers = range(len(sweep.cells))
    done = [number for number in numbers if (found := ended.get(sweep.cells[number].name)) and _is_published(found)]
    return min(done, key=key, default=None) if sweep.document.spec.select == "best" else None


def _is_published(ended: Ended) -> bool:
    return ended.exit_code == 0 and {"train", "publish"} <= ended.results.keys()


def _run_pod(jobs: Sequence[ShownRun], stop: Stop) -> list[Ended]:
    """Run the cells of a pod: those that can be prepared are trained in one process."""
    if len(jobs) == 1:
        return [go_through(STEPS, jobs[0], stop)]
    prepared = [go_through(("prepare",), job, stop) for job in jobs]
    ready = [job for job, end in zip(jobs, prepared, strict=True) if end.exit_code == 0]
    if stop.signal is not None or not ready:
        return prepared
    trained = iter(_train(ready, stop))
    return [next(trained) if end.exit_code == 0 else end for end in prepared]


def _train(jobs: Sequence[ShownRun], stop: Stop) -> list[Ended]:
    """Train the jobs in one process, then publish each."""
    if len(jobs) == 1:
        return [go_through(("train", "publish"), jobs[0], stop)]
    for job in jobs:
        job.display.begin("train")
    exit_code, result = run_step("train", [_with_own_uid(job) for job in jobs], stop)
    jobs[0].display.end("train", result, exit_code)
    first = Ended(exit_code, stop.signal, {} if result is None else {"train": result})
    log = jobs[0].run.layout.records / "train.log"
    return [_publish_first(jobs[0], first, stop), *(_finish(job, first, stop, log) for job in jobs[1:])]


def _with_own_uid(job: ShownRun) -> ShownRun:
    """Return the job with a unique UID.

    It distinguishes the job's records from those of the others in the same process.
    """
    document = job.run.document
    uid = document.metadata.name
    named = replace(document, metadata=replace(document.metadata, uid=uid))
    file = job.run.layout.records / _JOB_FILE
    write_atomically(file, json.dumps(named.dump(), indent=2).encode() + b"\n")
    return dataclasses.replace(job, job_file=file, job_uid=uid)


def _publish_first(job: ShownRun, trained: Ended, stop: Stop) -> Ended:
    """Publish the job whose result the process has left that has trained all."""
    if trained.exit_code != 0:
        return trained
    published = go_through(("publish",), job, stop)
    return dataclasses.replace(published, results={**trained.results, **published.results})


def _finish(job: ShownRun, first: Ended, stop: Stop, log: Path) -> Ended:
    """Finish another job of the process: return its train step's end, and publish.

    `first`: how the process has ended. `log` is that of the process. If that failed, for its first job or for all, only
    a job that it has trained to the end continues.
    """
    trained = first.step_exit_code == 0 or job.run.layout.completion("train").exists()
    if stop.signal is None and not trained:
        job.display.not_trained(log)
    if stop.signal is not None or not trained:
        return Ended(first.step_exit_code, stop.signal, {})
    return go_through(("train", "publish"), job, stop)
