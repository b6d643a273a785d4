"""Makes the 4-bit base of a job, one original file at a time, and resumes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qlora_api.schema import replace
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
from qlora_trainer.core.protocols import TensorFile
from qlora_trainer.model.base.artifact import MANIFEST, BaseManifest, has_files, has_size, read_manifest, write_manifest
from qlora_trainer.model.base.layout import BaseLayout, Part
from qlora_trainer.model.base.weights_file import DTYPES, write_weights
from qlora_trainer.model.experts.mxfp4_stack import Mxfp4Tensor
from qlora_trainer.model.nf4.quantization import quantize
from qlora_trainer.model.nf4.stored_layer import StoredTensor
from qlora_trainer.model.source.files import CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX, OnBytes
from qlora_trainer.model.source.quantization import ORIGINAL
from qlora_trainer.stores.contents import PublishedFile


class BaseConversion:
    """The base in `target`, and an earlier attempt's part of it. See Conversion."""

    def __init__(self, target: Path, settings: Path, version: str, layout: BaseLayout, address: str = "") -> None:
        """Delete what was made of another original: there may be no room for both.

        A base that has lost a file is incomplete again. `settings` is the folder with the model's config.json,
        `version` identifies the original, which people know by its `address`.
        """
        self._target, self._settings, self._layout = target, settings, layout
        self._folder = target
        found = read_manifest(target)
        if found is None or not _is_of(found, version, layout) or not has_files(target, found):
            self._folder = partial_path(target)
            if found is not None and _is_of(found, version, layout):
                remove(self._folder)
                target.rename(self._folder)
            remove(target)
            found = read_manifest(self._folder)
        if found is None or not _is_of(found, version, layout):
            new_folder(self._folder)
            found = BaseManifest(
                address=address,
                version=version,
                quantization=layout.quantization,
                in_16_bit=layout.in_16_bit,
                sources={},
                files={},
            )
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
            parts = self._layout.parts(_headers(path), path.name)
            with safe_open(path, framework="pt") as opened:
                entries = [entry for part in parts for entry in part.entries]
                written = write_weights(partial, entries, self._tensors(opened, parts, path.name))
        except SafetensorError as error:
            raise model_unavailable(f"{path.name} cannot be read: {error}") from error
        partial.rename(self._folder / path.name)
        sync(self._folder)
        self._note({path.name: written}, {path.name: sha256})

    def keep_sound(self, originals: Mapping[str, str | None], on_bytes: OnBytes) -> None:
        """Delete all but sound files that were made of these originals, by name with SHA-256.

        For a folder that others can write to. Where the server does not report a digest, any counts. The base is
        incomplete afterwards.
        """
        if self._folder == self._target:
            self._folder = partial_path(self._target)
            remove(self._folder)
            self._target.rename(self._folder)
        known, sources = self._manifest.files, self.digests
        total, finished, sound = sum(known[name].size for name in sources), 0, {}
        for name, original in sources.items():
            read = file_sha256(self._folder / name)
            if read == known[name].sha256 and name in originals and (originals[name] or original) == original:
                sound[name] = original
            finished += known[name].size
            on_bytes(finished, total)
        for path in self._folder.iterdir():
            if path.name not in sound and path.name != MANIFEST:
                remove(path)
        self._manifest = replace(self._manifest, files={name: known[name] for name in sound}, sources=sound)
        write_manifest(self._folder, self._manifest)

    def complete(self) -> BaseManifest:
        """Add the configuration and the index, give the folder its name, and return its manifest.

        Raises StepFailure MODEL_UNAVAILABLE if the original lacks a tensor of the model.
        """
        if self._folder == self._target:
            return self._manifest
        for name, content in small_files(self._folder, self._manifest, self._settings, self._layout).items():
            self._write(name, content)
        complete_folder(self._folder, self._target)
        self._folder = self._target
        return self._manifest

    def _tensors(self, opened: TensorFile[Tensor], parts: list[Part], file: str) -> Iterator[Tensor]:
        for part in parts:
            if part.layer is not None:
                tensor = _ours(part.layer, part.stored, opened.get_tensor(part.stored), file)
                yield _fill(tensor, part.entries[0].shape)
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
                    yield _fill(layer[entry.name.removeprefix(name)], entry.shape)

    def _write(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.write_bytes(content)
        self._note({name: PublishedFile(sha256=file_sha256(path), size=path.stat().st_size)}, {})

    def _note(self, files: Mapping[str, PublishedFile], sources: Mapping[str, str]) -> None:
        known = self._manifest
        self._manifest = replace(known, files=known.files | dict(files), sources=known.sources | dict(sources))
        write_manifest(self._folder, self._manifest)


def small_files(folder: Path, manifest: BaseManifest, settings: Path, layout: BaseLayout) -> Mapping[str, bytes]:
    """The files of a base besides the weights: its configuration and, with several files, an index.

    Raises StepFailure MODEL_UNAVAILABLE if the weights lack a tensor of the model.
    """
    files = {name: sorted(_headers(folder / name)) for name in manifest.sources}
    layout.require_complete({name for names in files.values() for name in names})
    config = json.loads((settings / CONFIG).read_bytes())
    found = {CONFIG: _json(config | {"quantization_config": layout.library_config().to_dict()})}
    if files.keys() != {WEIGHTS}:
        weight_map = {name: file for file, names in sorted(files.items()) for name in names}
        total = sum(manifest.files[name].size for name in files)
        found[WEIGHTS_INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    if (settings / GENERATION_CONFIG).is_file():
        found[GENERATION_CONFIG] = (settings / GENERATION_CONFIG).read_bytes()
    return found


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, indent=2).encode() + b"\n"


def _is_of(manifest: BaseManifest, version: str, layout: BaseLayout) -> bool:
    found = (manifest.version, manifest.quantization, manifest.in_16_bit)
    return found == (version, layout.quantization, layout.in_16_bit)


def _ours(layer: StoredTensor | Mxfp4Tensor, stored: str, tensor: Tensor, file: str) -> Tensor:
    try:
        return layer.ours(tensor)
    except ValueError as error:
        raise model_unavailable(f"{stored} in {file} is no part of a 4-bit layer: {error}; {ORIGINAL}") from error


def _fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, a description in JSON with the spaces that give it this shape."""
    if tensor.ndim != 1 or tensor.dtype != torch.uint8 or tuple(tensor.shape) >= shape:
        return tensor
    return torch.nn.functional.pad(tensor, (0, shape[0] - len(tensor)), value=ord(" "))


def _headers(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of each tensor in a file, by name."""
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
        return {name: (header.get_dtype(), tuple(header.get_shape())) for name, header in slices.items()}


_DESCRIPTIONS = ("quant_state.", "quant_map", "nested_quant_map")
"""What says how to read a layer. The other tensors are the model's numbers."""


def require_tensors(folder: Path, files: Iterable[str], layout: BaseLayout) -> None:
    """Raise ValueError, naming the tensor, unless these files have the tensors of a base, and what reads them.

    Compared are names, types and shapes, and of each 4-bit layer its description and its tables: kernels read as many
    constants as the description asks for, and do not look where a tensor ends. The model's numbers are not read.
    Raises SafetensorError for a file of another format, OSError.
    """
    headers = {file: _headers(folder / file) for file in files}
    stored = {name: header for found in headers.values() for name, header in found.items()}
    wanted = layout.tensors(stored)
    if missing := wanted.keys() - stored.keys():
        raise ValueError(f"{min(missing)} is missing")
    for file, found in headers.items():
        for name, (dtype, shape) in found.items():
            if name not in wanted:
                raise ValueError(f"{name} belongs to no layer")
            entry, _ = wanted[name]
            if (dtype, shape) != (entry.dtype, entry.shape):
                raise ValueError(f"{name} is {dtype} {list(shape)}, and must be {entry.dtype} {list(entry.shape)}")
        _require_descriptions(folder / file, {name: layer for name in found if (layer := wanted[name][1]) is not None})


def _require_descriptions(path: Path, layers: Mapping[str, StoredTensor]) -> None:
    with safe_open(path, framework="pt") as opened:
        for name, layer in layers.items():
            if not layer.role.startswith(_DESCRIPTIONS):
                continue
            try:
                layer.ours(opened.get_tensor(name))
            except ValueError as error:
                raise ValueError(f"{name} is no part of a 4-bit layer: {error}") from error
