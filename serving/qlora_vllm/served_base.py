"""Decides whether an adapter was trained on the base that the server has."""

from dataclasses import dataclass
from pathlib import Path
from re import fullmatch

from qlora_api.lineage import LineageBase
from qlora_trainer.core.file_names import PUBLISHED_MANIFEST
from qlora_trainer.stores.contents import parse_manifest

BASE_REVISION = "QLORA_BASE_REVISION"
"""The environment variable with the revision of a base in a folder that no job has published."""


@dataclass(frozen=True)
class ServedBase:
    """The base model of a server: one of these is set."""

    sha256: str | None = None
    """Of a base that a job has published: that of the 4-bit base it was trained on."""
    revision: str | None = None
    """Of another: its commit, or the digest of the artifact or the content."""

    @property
    def is_measured(self) -> bool:
        """Whether adapters answer on it as they did when their jobs measured them."""
        return self.sha256 is not None

    def difference(self, trained: LineageBase) -> str | None:
        """Return how the base that an adapter was trained on differs from this one, or None."""
        own, other = (self.sha256, trained.sha256) if self.sha256 is not None else (self.revision, trained.revision)
        if own == other:
            return None
        kind = "with SHA-256" if self.is_measured else "of revision"
        return f"it was trained on a base {kind} {other}, and this server has {own}"


def served_base(model: str, revision: str | None, stated_revision: str | None) -> ServedBase:
    """Identify the base of `vllm serve MODEL --revision REVISION`.

    `stated_revision`: the value of QLORA_BASE_REVISION. Raises ValueError for a base whose content nothing identifies.
    """
    file = Path(model) / PUBLISHED_MANIFEST
    manifest = parse_manifest(file.read_bytes()) if file.is_file() else None
    if manifest is not None and manifest.is_shared:
        return ServedBase(sha256=manifest.fingerprint)
    found = stated_revision or revision
    if found is None or (not stated_revision and not fullmatch("[0-9a-f]{40}", found)):
        raise ValueError(
            f"which adapters fit {model} is not known: serve a base that output.base has published, or a model of the "
            f"Hub by its commit (--revision), or set {BASE_REVISION} to status.adapter.baseRevision"
        )
    return ServedBase(revision=found)
