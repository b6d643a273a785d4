"""Jobs that share a cache of 4-bit bases, over a hub with one model."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qlora_api.artifact_status import BaseStatus
from qlora_api.contract import WorkspaceLayout
from qlora_trainer.core.completion import PrepareRecord
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import StepFailure
from qlora_trainer.steps.prepare import prepare
from tests.support.bad_bases import WEIGHTS
from tests.support.fake_hub import FakeHub
from tests.support.models.tiny import Recorded
from tests.support.services.hub_jobs import MODEL


def base_of(record: PrepareRecord) -> BaseStatus:
    """How the job got its base."""
    assert record.base is not None
    return record.base


@dataclass(frozen=True)
class SharedCache:
    """A hub with the model acme/tiny, and the volume of a cache that jobs share."""

    hub: FakeHub
    folder: Path
    _make_context: Callable[..., StepContext]
    _monkeypatch: pytest.MonkeyPatch

    def context(self, name: str = "first", spec: dict[str, Any] | None = None) -> StepContext:
        """The context of a job of that name, in a new pod, over the cache."""
        context = self._make_context({**MODEL, **(spec or {})})
        metadata = context.document.metadata.model_copy(update={"name": name, "uid": name})
        return replace(
            context,
            document=context.document.model_copy(update={"metadata": metadata}),
            workspace=WorkspaceLayout(self.folder.parent / "workspaces" / name),
            mounts=replace(context.mounts, model_cache=self.folder),
            pod_uid=f"{name}-pod",
        )

    def prepare(
        self, name: str = "first", spec: dict[str, Any] | None = None, records: Recorded | None = None
    ) -> PrepareRecord:
        """Prepare a job of that name."""
        return prepare(self.context(name, spec), records or Recorded())

    def prepare_alone(self) -> tuple[StepContext, PrepareRecord]:
        """Prepare a job without the cache."""
        context = self.context("alone")
        context = replace(context, mounts=replace(context.mounts, model_cache=None))
        return context, prepare(context, Recorded())

    @property
    def repository(self) -> Path:
        """The model on the hub."""
        return self.hub.repositories["models/acme/tiny"]

    @property
    def base(self) -> Path:
        """The one base in the cache, which holds nothing else."""
        return only_base(self.folder)

    @property
    def partials(self) -> list[Path]:
        """The folders of pods that make a base."""
        return sorted((self.folder / "quantized").glob("*.partial"))

    def limit_room(self, free: int, *, on_cache: bool) -> None:
        """Leave so many bytes free on the cache's volume, or on all others."""
        usage = shutil.disk_usage

        def limited(path: Any) -> Any:
            is_limited = (self.folder in (path, *Path(path).parents)) == on_cache
            return usage(path)._replace(free=free) if is_limited else usage(path)

        self._monkeypatch.setattr(shutil, "disk_usage", limited)

    def split_weights(self) -> list[str]:
        """Lay out the weights of the hub's model in two files; returns their names."""
        parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        tensors = sorted(load_file(self.repository / WEIGHTS).items())
        (self.repository / WEIGHTS).unlink()
        weight_map: dict[str, str] = {}
        for number, part in enumerate(parts):
            held = dict(tensors[number::2])
            save_file(held, self.repository / part)
            weight_map |= dict.fromkeys(held, part)
        (self.repository / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return parts

    def leave_partial(self) -> Path:
        """Stop a job between the two weight files, and leave its files without a lock."""
        parts = self.split_weights()
        self.hub.corrupt = lambda path: path.endswith(parts[1])
        with pytest.raises(StepFailure):
            self.prepare("stopped")
        self.hub.corrupt = lambda _path: False
        self.hub.requests.clear()
        (partial,) = self.partials
        return partial


def only_base(cache: Path) -> Path:
    """The one base in a cache, which holds nothing else."""
    (folder,) = (path for path in (cache / "quantized").iterdir() if path.name != ".lock")
    assert not folder.name.startswith(".")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def age(partial: Path, seconds: float) -> None:
    """Change the times of the folder as if it had been idle for so long."""
    for path in (partial / ".owner", partial):
        if path.exists():
            at = path.stat().st_mtime - seconds
            os.utime(path, (at, at))
