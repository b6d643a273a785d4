"""Discards the run in a workspace of this machine, so that `qlora run` starts over."""

from collections.abc import Sequence
from pathlib import Path

from qlora_cli.local.run import LOCAL_UID, LocalRun
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.filesystem import remove
from qlora_trainer.stores.destinations.volume import VolumeFolder
from qlora_trainer.training.checkpoints.attempts import ATTEMPTS_FILE, only_attempt


def discard_runs(runs: Sequence[LocalRun]) -> list[Path]:
    """Delete checkpoints, adapter and report of the jobs' runs in their workspaces; model and data stay.

    Returns what was deleted: nothing in a workspace without a run. Raises StepFailure if a process trains in one, or,
    before anything is deleted, if one is that of another job; ValueError if a run cannot be read; OSError.
    """
    started = [run for run in runs if run.is_started]
    for run in started:
        _require_own(run)
    return [path for run in started for path in _discard(run)]


def _require_own(run: LocalRun) -> None:
    name, earlier = run.document.metadata.name, LocalRun.recall(run.workspace).document.metadata.name
    if earlier != name:
        raise bad_configuration(
            f"{run.workspace} holds the run of the job {earlier}, and FILE has the job {name}: name another --workspace"
        )


def _discard(run: LocalRun) -> list[Path]:
    layout = run.layout
    own = [folder for folder in (layout.adapter, layout.merged) if _is_of(folder, run)]
    records = [layout.completion(step) for step in ("train", "publish")]
    found = [
        path
        for path in (layout.checkpoints, layout.best, layout.trained, layout.report, *own, *records)
        if path.exists()
    ]
    with only_attempt(layout.records):
        for path in (*found, layout.records / ATTEMPTS_FILE):
            remove(path)
    return [path for path in found if path not in records]


def _is_of(folder: Path, run: LocalRun) -> bool:
    """Whether the job itself has published to the folder, and not another one."""
    manifest = VolumeFolder(folder, str(folder), owner=LOCAL_UID).read_manifest()
    metadata = run.document.metadata
    return manifest is not None and (manifest.job_uid, manifest.job_name) == (metadata.uid or LOCAL_UID, metadata.name)
