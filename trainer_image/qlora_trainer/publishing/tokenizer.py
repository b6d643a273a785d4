"""The tokenizer that is published with an adapter, as AutoTokenizer loads it."""

from pathlib import Path
from typing import cast

from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.failures import unsafe_artifact
from qlora_trainer.core.paths import some_names
from qlora_trainer.data.render.template_source import (
    PROCESSOR_TEMPLATE,
    TEMPLATE_FILE,
    has_tokenizer_template,
    processor_template,
)
from qlora_trainer.model.source.files import tokenizer_digests
from qlora_trainer.publishing.merged_model import job_template_file
from qlora_trainer.stores.contents import Contents


def tokenizer_files(prepared: PrepareRecord, workspace: WorkspaceLayout) -> Contents:
    """The model's tokenizer, with the chat template that the rows were written with.

    Raises StepFailure UNSAFE_ARTIFACT if a file is not what prepare has read.
    """
    folder = workspace.root / prepared.model_path
    found = tokenizer_digests(folder)
    known = cast("dict[str, str]", (prepared.data_content or {}).get("tokenizer", found))
    if found != known:
        changed = some_names(name for name in {**found, **known} if found.get(name) != known.get(name))
        raise unsafe_artifact(
            f"{folder} has another tokenizer than the rows were prepared with (different: {changed}): it was changed "
            "afterwards and nothing is published; create the job again"
        )
    files: dict[str, Path | bytes] = {name: folder / name for name in found}
    # Tokenizers do not read the processors' own file.
    files.pop(PROCESSOR_TEMPLATE, None)
    own = job_template_file(prepared, workspace)
    if own is not None:
        files[TEMPLATE_FILE] = own
    elif not has_tokenizer_template(folder) and (template := processor_template(folder)) is not None:
        files[TEMPLATE_FILE] = template.encode()
    return files


def has_chat_template(prepared: PrepareRecord, folder: Path) -> bool:
    """Whether the job or the model in the folder has a chat template."""
    return (
        prepared.template_sha256 is not None
        or has_tokenizer_template(folder)
        or (folder / PROCESSOR_TEMPLATE).is_file()
    )
