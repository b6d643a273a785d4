"""The step `clean`: deletes all but the adapter, the report and the records."""

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.completion import PublishRecord, read_completion
from qlora_trainer.core.filesystem import remove, remove_partials


def clean(workspace: WorkspaceLayout) -> None:
    """Delete what only the steps needed in one job's folder, and all `*.partial`.

    Once the adapter has been published, `trained/` goes too. Until then it holds its only copy, and a job whose
    publication failed can be resumed with it. The base is then made again, to the same bytes.

    A symbolic link is deleted and its target is not. May be called again. Raises OSError if a file cannot be deleted.
    """
    published = read_completion(workspace.completion("publish"), PublishRecord) is not None
    only_copy = (workspace.trained,) if published else ()
    inputs = (workspace.models, workspace.base, workspace.data, workspace.initial_adapter)
    for folder in (*inputs, workspace.checkpoints, workspace.best, *only_copy):
        remove(folder)
    for folder in (workspace.root, workspace.records, workspace.report):
        # A link's target is outside. The root itself may be reached by one.
        if folder == workspace.root or not folder.is_symlink():
            remove_partials(folder)
