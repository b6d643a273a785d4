"""Publishes the job's chat template, with an adapter and in a merged model."""

import json
from pathlib import Path

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.completion import EndOfTurn, PrepareRecord
from qlora_trainer.core.failures import unsafe_artifact
from qlora_trainer.core.filesystem import file_sha256
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.data.render.template_source import PROCESSOR_TEMPLATE, TEMPLATE_FILE
from qlora_trainer.model.source.files import GENERATION_CONFIG


def job_template_file(prepared: PrepareRecord, workspace: WorkspaceLayout) -> Path | None:
    """The file of the chat template that the rows were written with, or None for the model's.

    Raises StepFailure UNSAFE_ARTIFACT if it is not what prepare has written.
    """
    if prepared.template_sha256 is None:
        return None
    path = workspace.root / prepared.data_path / TEMPLATE_FILE
    if path.is_symlink() or not path.is_file() or file_sha256(path) != prepared.template_sha256:
        raise unsafe_artifact(
            f"{path} is not the chat template that the rows were prepared with (SHA-256 {prepared.template_sha256}): "
            "it was changed or removed afterwards and nothing is published; create the job again"
        )
    return path


def give_template(folder: Path, template: Path, end: EndOfTurn | None) -> None:
    """Replace the chat template in a model's folder, and make servers stop at its end."""
    (folder / TEMPLATE_FILE).write_bytes(template.read_bytes())
    (folder / PROCESSOR_TEMPLATE).unlink(missing_ok=True)
    if end is None or end.token is None:
        return
    path = folder / GENERATION_CONFIG
    settings: JsonObject = json.loads(path.read_bytes()) if path.is_file() else {}
    settings["eos_token_id"] = [*end.known, end.token]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
