"""Gets the 4-bit base of a job from the workspace, or makes it there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qlora_trainer.core.filesystem import bytes_below, partial_path, remove, require_space
from qlora_trainer.model.base.artifact import BaseManifest, has_files, read_manifest
from qlora_trainer.model.base.conversion import BaseConversion
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.source.files import OnBytes
from qlora_trainer.model.source.models import ModelSource, Origin


@dataclass(frozen=True)
class Base:
    """A base that is complete."""

    folder: Path
    manifest: BaseManifest
    revision: str
    """Of the original: commit, or sha256:… of the content."""


class BaseSource(Protocol):
    """A source of the base. Call its methods in this order. They raise StepFailure."""

    @property
    def activity(self) -> str:
        """The activity of `base`, for the progress record."""

    @property
    def origin(self) -> Origin:
        """Where the base came from, once `base` has returned."""

    @property
    def remark(self) -> str:
        """Why a cache was not used, for the user. Empty without such a reason."""

    def require_room(self) -> None:
        """Check, without reading the weights, that they are complete, safe, and fit."""

    def base(self, on_bytes: OnBytes) -> Base:
        """Return the base, and make it if it is missing."""


class WorkspaceBase:
    """A base of the job's own, in its workspace. See BaseSource."""

    remark = ""

    def __init__(self, source: ModelSource, target: Path, settings: Path, layout: BaseLayout) -> None:
        """`target`: the base's folder. `settings`: that of the model's config.json."""
        self._source, self._target, self._settings, self._layout = source, target, settings, layout

    @property
    def activity(self) -> str:
        """See BaseSource."""
        return self._source.activity

    @property
    def origin(self) -> Origin:
        """See BaseSource."""
        return self._source.origin

    def is_complete(self, version: str) -> bool:
        """Whether an earlier attempt has made it, of this version of the original."""
        found = read_manifest(self._target)
        if found is None or (found.version, found.quantization) != (version, self._layout.quantization):
            return False
        return has_files(self._target, found)

    def require_room(self) -> None:
        """See BaseSource."""
        held = bytes_below(partial_path(self._target)) + bytes_below(self._target)
        missing = max(0, self._layout.bytes - held)
        self._source.check_weights(missing)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        require_space(self._target.parent, missing, "the 4-bit base")

    def base(self, on_bytes: OnBytes) -> Base:
        """See BaseSource."""
        version = self._source.version(on_bytes)
        conversion = BaseConversion(self._target, self._settings, version, self._layout)
        revision = self._source.weights(conversion, on_bytes)
        return Base(self._target, conversion.complete(), revision)

    def discard(self) -> None:
        """Delete the workspace's part of it: the base is elsewhere."""
        remove(self._target)
        remove(partial_path(self._target))
