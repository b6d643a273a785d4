"""Names the jobs that their users leave unnamed."""

import re

from qlora_api.spec.job import MAX_NAME_LENGTH


def generated_name(model: str, suffix: str) -> str:
    """Return a name from the last part of the model's address, and a unique `suffix`."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    words = re.sub(r"[^a-z0-9]+", "-", last).strip("-")
    return f"{words[: MAX_NAME_LENGTH - len(suffix) - 1].strip('-') or 'job'}-{suffix}"
