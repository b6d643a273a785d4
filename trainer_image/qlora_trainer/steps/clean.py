"""Deletes what the steps needed only for themselves, after the job's end; adapter, report and records stay."""

import shutil

from qlora_api.contract import WorkspaceLayout


def clean(workspace: WorkspaceLayout) -> None:
    """Delete `model/`, `data/`, `checkpoints/`, `trained/` and `quantized/` of one job's folder, and `*.partial`.

    Those are what a step that was killed has left of an adapter, a merged model or the 4-bit weights. May be called
    again.

    Of a symbolic link the link goes and what it leads to stays: nothing outside the folder is touched. Raises OSError
    if something cannot be deleted.
    """
    scratch = (workspace.models, workspace.data, workspace.checkpoints, workspace.trained, workspace.quantized)
    for folder in (*scratch, *workspace.root.glob("*.partial")):
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
