"""Makes the 4-bit base of a job from the files of the original, one at a time, and resumes after any of them."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_api.training import QuantizationSpec
from qlora_trainer.core.failures import model_unavailable
from qlora_trainer.core.filesystem import (
    complete_folder,
    file_sha256,
    new_folder,
    partial_path,
    remove,
    remove_partials,
    sync,
)
from qlora_trainer.model.base_artifact import BaseManifest, has_files, has_size, read_manifest, write_manifest
from qlora_trainer.model.base_layout import BaseLayout, Part
from qlora_trainer.model.four_bit import quantize
from qlora_trainer.model.mxfp4_stack import Mxfp4Tensor
from qlora_trainer.model.source import CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX
from qlora_trainer.model.source_quantization import ORIGINAL
from qlora_trainer.model.stored_layer import StoredTensor
from qlora_trainer.model.weights_file import DTYPES, write_weights
from qlora_trainer.stores.contents import PublishedFile


class BaseConversion:
    """The base in `target`, which is complete or absent, and what an earlier attempt has made of it. See Conversion."""

    def __init__(self, target: Path, settings: Path, version: str, layout: BaseLayout) -> None:
        """Delete what was made of another original: there may be no room for both.

        A base that has lost a file is incomplete again. `settings` is the folder with the model's config.json,
        `version` identifies the original.
        """
        self._target, self._settings, self._layout = target, settings, layout
        self._folder = target
        found = read_manifest(target)
        if found is None or not _is_of(found, version, layout.quantization) or not has_files(target, found):
            self._folder = partial_path(target)
            if found is not None and _is_of(found, version, layout.quantization):
                remove(self._folder)
                target.rename(self._folder)
            remove(target)
            found = read_manifest(self._folder)
        if found is None or not _is_of(found, version, layout.quantization):
            new_folder(self._folder)
            found = BaseManifest(version=version, quantization=layout.quantization, sources={}, files={})
        # Of an attempt that was killed while it wrote one of them: the folder may have nothing else in it.
        remove_partials(self._folder)
        self._manifest = found

    @property
    def digests(self) -> Mapping[str, str]:
        """See Conversion."""
        return {
            name: sha256
            for name, sha256 in self._manifest.sources.items()
            if has_size(self._folder / name, self._manifest.files[name].size)
        }

    def convert(self, path: Path, sha256: str) -> None:
        """See Conversion."""
        partial = partial_path(self._folder / path.name)
        try:
            with cast("Any", safe_open(path, framework="pt")) as opened:
                stored = {name: _described(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
                parts = self._layout.parts(stored, path.name)
                entries = [entry for part in parts for entry in part.entries]
                written = write_weights(partial, entries, self._tensors(opened, parts, path.name))
        except SafetensorError as error:
            raise model_unavailable(f"{path.name} cannot be read: {error}") from error
        partial.rename(self._folder / path.name)
        sync(self._folder)
        self._note({path.name: written}, {path.name: sha256})

    def complete(self) -> BaseManifest:
        """Add the configuration and the index, and give the folder its name; returns what is in it.

        Raises StepFailure MODEL_UNAVAILABLE if the original lacks a tensor of the model.
        """
        if self._folder == self._target:
            return self._manifest
        files = {name: _names(self._folder / name) for name in self._manifest.sources}
        self._layout.require_complete({name for names in files.values() for name in names})
        if files.keys() != {WEIGHTS}:
            weight_map = {name: file for file, names in sorted(files.items()) for name in names}
            total = sum(self._manifest.files[name].size for name in files)
            self._add(WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        settings = json.loads((self._settings / CONFIG).read_bytes())
        self._add(CONFIG, settings | {"quantization_config": self._layout.library_config().to_dict()})
        generation = self._settings / GENERATION_CONFIG
        if generation.is_file():
            self._write(GENERATION_CONFIG, generation.read_bytes())
        complete_folder(self._folder, self._target)
        self._folder = self._target
        return self._manifest

    def _tensors(self, opened: Any, parts: list[Part], file: str) -> Iterator[Tensor]:
        for part in parts:
            if part.layer is not None:
                tensor = _ours(part.layer, part.stored, opened.get_tensor(part.stored), file)
                yield _filled(tensor, part.entries[0].shape)
                continue
            if not part.four_bit:
                yield opened.get_tensor(part.stored).to(DTYPES[part.entries[0].dtype])
                continue
            entries = iter(part.entries)
            for name, matrix in self._layout.matrices(opened, part):
                try:
                    layer = quantize(matrix, self._layout.quantization)
                except ValueError as error:
                    raise model_unavailable(
                        f"{part.stored} in {file} cannot be quantized: {error}; use another revision of the model"
                    ) from error
                for entry in islice(entries, len(layer)):
                    yield _filled(layer[entry.name.removeprefix(name)], entry.shape)

    def _add(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2).encode() + b"\n")

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.write_bytes(content)
        self._note({name: PublishedFile(sha256=file_sha256(path), size=path.stat().st_size)}, {})

    def _note(self, files: Mapping[str, PublishedFile], sources: Mapping[str, str]) -> None:
        known = self._manifest
        self._manifest = known.model_copy(
            update={"files": known.files | dict(files), "sources": known.sources | dict(sources)}
        )
        write_manifest(self._folder, self._manifest)


def _is_of(manifest: BaseManifest | None, version: str, quantization: QuantizationSpec) -> bool:
    return manifest is not None and (manifest.version, manifest.quantization) == (version, quantization)


def _described(tensor: Any) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a tensor in a file, as its header has them."""
    return tensor.get_dtype(), tuple(tensor.get_shape())


def _ours(layer: StoredTensor | Mxfp4Tensor, stored: str, tensor: Tensor, file: str) -> Tensor:
    try:
        return layer.ours(tensor)
    except ValueError as error:
        raise model_unavailable(f"{stored} in {file} is no part of a 4-bit layer: {error}; {ORIGINAL}") from error


def _filled(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, a description in JSON with the spaces that give it this shape."""
    if tensor.ndim != 1 or tensor.dtype != torch.uint8 or tuple(tensor.shape) >= shape:
        return tensor
    return torch.nn.functional.pad(tensor, (0, shape[0] - len(tensor)), value=ord(" "))


def _names(path: Path) -> list[str]:
    with cast("Any", safe_open(path, framework="pt")) as opened:
        return sorted(opened.keys())
