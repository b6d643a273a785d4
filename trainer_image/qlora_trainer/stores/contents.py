"""Describes the files of a folder to publish: sizes and digests."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from qlora_api.schema import ApiModel
from qlora_trainer.core.filesystem import file_sha256

Contents = Mapping[str, Path | bytes]
"""Paths or contents of files, by their names in the published folder."""


class PublishedFile(ApiModel):
    """One file of a published folder."""

    sha256: str
    size: int


def describe_files(contents: Contents) -> dict[str, PublishedFile]:
    """SHA-256 and size of each file by its name."""
    described = {}
    for name, content in sorted(contents.items()):
        if isinstance(content, bytes):
            described[name] = PublishedFile(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
        else:
            described[name] = PublishedFile(sha256=file_sha256(content), size=content.stat().st_size)
    return described
