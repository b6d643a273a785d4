"""Reads the chat template of a multimodal model whose processor has it, where tokenizers do not look."""

import json
from pathlib import Path

from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.data.job_template import MAX_TEMPLATE_BYTES

PROCESSOR_TEMPLATE = "chat_template.json"
"""Where processors kept their template before chat_template.jinja."""


def processor_template(folder: Path) -> str | None:
    """The template in the model's folder; None if there is no such file.

    Raises StepFailure BAD_CONFIGURATION if the file has none.
    """
    path = folder / PROCESSOR_TEMPLATE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_TEMPLATE_BYTES))
    except (ValueError, RecursionError) as error:
        raise bad_configuration(
            f"the model's {path.name} is not JSON of at most {MAX_TEMPLATE_BYTES} bytes ({error})"
        ) from error
    template = content.get("chat_template") if isinstance(content, dict) else None
    if not isinstance(template, str):
        raise bad_configuration(f"the model's {path.name} has no chat_template that is text: use another model")
    return template
