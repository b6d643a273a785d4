"""Runs jobs on this machine that are trained together: prepares each, trains all in one process, publishes each."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlora_api.contract import ENV_MODEL_CACHE
from qlora_api.spec.job import QLoRAJobDocument
from qlora_cli.local.plan_together import require_joinable
from qlora_cli.local.run import Display, Ended, LocalRun, ShownRun, Stop, go_through, run_step
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.filesystem import write_atomically

# In the folder that the runs share, for `--resume`: the names of the jobs, which are those of their workspaces.
_JOBS_FILE = "jobs.json"
_MODELS_FOLDER = "models"
# In a workspace's records/ folder: the job with another UID.
_JOB_FILE = "job-together.json"


def joint_runs(documents: Sequence[QLoRAJobDocument], earlier: Sequence[LocalRun], options: LocalRun) -> list[LocalRun]:
    """A run for each document with these options, in a folder by its name below their workspace.

    `earlier`: runs in these folders, to be resumed. Raises StepFailure (BAD_CONFIGURATION) if the manifests keep the
    jobs from being trained together.
    """
    require_joinable(documents)
    names = [document.metadata.name for document in documents]
    twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
    if twice is not None:
        raise bad_configuration(f"metadata.name is {twice} in two files: each job has its workspace by its name")
    _reject_shared_destinations(documents)
    continued = {document.spec.continues for document in documents} - {None}
    if options.continues is not None and len(continued) != 1:
        raise bad_configuration(
            f"--continues is the workspace of one job, and {len(continued)} are named in spec.continues: "
            "run together what continues the same one"
        )
    # What the jobs download they share, unless the environment names a place for it.
    models = None if os.environ.get(ENV_MODEL_CACHE) else options.workspace / _MODELS_FOLDER
    before = {run.document.metadata.name: run for run in earlier}
    return [
        replace(
            options,
            document=document,
            workspace=options.workspace / document.metadata.name,
            continues=options.continues if document.spec.continues else None,
            model_cache=models,
        ).resuming(before.get(document.metadata.name))
        for document in documents
    ]


def _reject_shared_destinations(documents: Sequence[QLoRAJobDocument]) -> None:
    """Raise StepFailure for two jobs that publish to one place, where the second would be refused after training."""
    owners: dict[str, str] = {}
    for document in documents:
        for field, address in document.spec.output.destinations.items():
            # The base is the same for all.
            if field == "base.destination":
                continue
            name = document.metadata.name
            owner = owners.setdefault(address.rstrip("/"), name)
            if owner != name:
                raise bad_configuration(
                    f"spec.output.{field} of {name} is {address}, where {owner} publishes: give each job its own"
                )


def holds_joint_run(root: Path) -> bool:
    """Whether runs were started together in this folder."""
    return (root / _JOBS_FILE).exists()


def earlier_runs(root: Path) -> list[LocalRun] | None:
    """The runs that were started together in this folder; None if there were none.

    Raises ValueError if one of them cannot be read.
    """
    file = root / _JOBS_FILE
    try:
        folders = [root / name for name in _names(file)]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}; give the FILEs instead of --resume") from error
    return [LocalRun.recall(folder) for folder in folders]


def _names(file: Path) -> list[str]:
    return [str(name) for name in json.loads(file.read_bytes())]


def _names_with_earlier(file: Path, runs: Sequence[LocalRun]) -> list[str]:
    """The names of the runs, after those of earlier ones in the folder, which are resumed with them."""
    names = [run.document.metadata.name for run in runs]
    try:
        return list(dict.fromkeys((*_names(file), *names)))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        # There were none, or none that could be resumed.
        return names


def run_jobs_together(root: Path, runs: Sequence[LocalRun], displays: Sequence[Display]) -> list[Ended]:
    """Run the jobs, and say how each has ended. Each step skips what an earlier run has finished.

    None is trained unless all are prepared. One that fails in training or afterwards does not stop the others.
    Raises OSError if a workspace cannot be written.
    """
    file = root / _JOBS_FILE
    write_atomically(file, json.dumps(_names_with_earlier(file, runs)).encode() + b"\n")
    jobs = [ShownRun.of(run, display) for run, display in zip(runs, displays, strict=True)]
    with Stop(displays[0]) as stop:
        prepared: list[Ended] = []
        for job in jobs:
            prepared.append(go_through(("prepare",), job, stop))
            if prepared[-1].exit_code != 0:
                return prepared
        for job in jobs:
            job.display.begin("train")
        exit_code, result = run_step("train", [_with_own_uid(job) for job in jobs], stop)
        jobs[0].display.end("train", result, exit_code)
        first = Ended(exit_code, stop.signal, {} if result is None else {"train": result})
        log = runs[0].layout.records / "train.log"
        return [_publish_first(jobs[0], first, stop), *(_finish(job, first, stop, log) for job in jobs[1:])]


def _with_own_uid(job: ShownRun) -> ShownRun:
    """The job with a UID that tells its records from those of the others in the same process."""
    document = job.run.document
    uid = document.metadata.name
    named = document.model_copy(update={"metadata": document.metadata.model_copy(update={"uid": uid})})
    file = job.run.layout.records / _JOB_FILE
    write_atomically(file, json.dumps(named.dump(), indent=2).encode() + b"\n")
    return replace(job, job_file=file, job_uid=uid)


def _publish_first(job: ShownRun, trained: Ended, stop: Stop) -> Ended:
    """Publish the job whose result the process has left that has trained all."""
    if trained.exit_code != 0:
        return trained
    published = go_through(("publish",), job, stop)
    return replace(published, results={**trained.results, **published.results})


def _finish(job: ShownRun, first: Ended, stop: Stop, log: Path) -> Ended:
    """The train step of another job, which says how it ended, and publish. `first`: how the process has ended.

    `log` is that of the process. If that failed, for its first job or for all, only a job that it has trained to the
    end goes on.
    """
    trained = first.step_exit_code == 0 or job.run.layout.completion("train").exists()
    if stop.signal is None and not trained:
        job.display.not_trained(log)
    if stop.signal is not None or not trained:
        return Ended(first.step_exit_code, stop.signal, {})
    return go_through(("train", "publish"), job, stop)
