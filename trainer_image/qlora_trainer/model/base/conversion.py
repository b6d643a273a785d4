"""Makes the 4-bit base of a job, one original file at a time, and resumes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from qlora_trainer.model.base.layout import ALIGNMENT, DTYPES, BaseLayout, Entry, Part
from qlora_trainer.model.nf4.quantization import quantize
from qlora_trainer.model.nf4.stored_layer import StoredTensor
from qlora_trainer.model.source.files import CONFIG, GENERATION_CONFIG, WEIGHTS, WEIGHTS_INDEX, OnBytes
from qlora_trainer.model.source.quantization import ORIGINAL
from qlora_trainer.stores.contents import PublishedFile


class BaseConversion:
    """The base in `target`, and an earlier attempt's part of it. See Conversion."""

    def __init__(self, target: Path, settings: Path, version: str, layout: BaseLayout, address: str = "") -> None:
        """Delete what was made of another original: there may be no room for both."""
        self._target, self._settings, self._layout = target, settings, layout
        self._folder = target
        origin = {"version": version, "quantization": layout.quantization, "in_16_bit": layout.in_16_bit}
        found = _read_of(target, origin)
        if found is None or not has_files(target, found):
            self._folder = partial_path(target)
            if found is not None:
                remove(self._folder)
                target.rename(self._folder)
            remove(target)
            found = _read_of(self._folder, origin)
        if found is None:
            new_folder(self._folder)
            found = BaseManifest.model_validate({"address": address, **origin, "sources": {}, "files": {}})
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
        """Delete all but sound files of these originals, by name with SHA-256."""
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
        """Complete the folder. Raises StepFailure if the original lacks a tensor."""
        if self._folder == self._target:
            return self._manifest
        for name, content in small_files(self._folder, self._manifest, self._settings, self._layout).items():
            path = self._folder / name
            path.write_bytes(content)
            self._note({name: PublishedFile(sha256=file_sha256(path), size=path.stat().st_size)}, {})
        complete_folder(self._folder, self._target)
        self._folder = self._target
        return self._manifest

    def _tensors(self, opened: TensorFile[Tensor], parts: list[Part], file: str) -> Iterator[Tensor]:
        for part in parts:
            if part.layer is not None:
                try:
                    tensor = part.layer.ours(opened.get_tensor(part.stored))
                except ValueError as error:
                    raise model_unavailable(
                        f"{part.stored} in {file} is no part of a 4-bit layer: {error}; {ORIGINAL}"
                    ) from error
                yield _fill(tensor, part.entries[0].shape)
                continue
            if not part.is_four_bit:
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

    def _note(self, files: Mapping[str, PublishedFile], sources: Mapping[str, str]) -> None:
        known = self._manifest
        self._manifest = replace(known, files=known.files | dict(files), sources=known.sources | dict(sources))
        write_manifest(self._folder, self._manifest)


def write_weights(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> PublishedFile:
    """Write a durable safetensors file with the tensors. Raises OSError."""
    header = _header(entries)
    digest, size = hashlib.sha256(header), len(header)
    with path.open("wb") as file:
        file.write(header)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tensor.dtype != DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
                raise AssertionError(f"{entry} was announced, and {tensor.dtype} {list(tensor.shape)} has come")
            content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            size += file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return PublishedFile(sha256=digest.hexdigest(), size=size)


def _header(entries: Sequence[Entry]) -> bytes:
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.bytes
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    content = json.dumps(described, separators=(",", ":")).encode()
    content += b" " * (-len(content) % ALIGNMENT)
    return len(content).to_bytes(8, "little") + content


def small_files(folder: Path, manifest: BaseManifest, settings: Path, layout: BaseLayout) -> Mapping[str, bytes]:
    """Configuration and index of a base. Raises StepFailure for a missing tensor."""
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


def _read_of(folder: Path, origin: Mapping[str, object]) -> BaseManifest | None:
    """The folder's manifest, or None unless it has these fields."""
    found = read_manifest(folder)
    return found if found and all(getattr(found, name) == value for name, value in origin.items()) else None


def _fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor, a description in JSON with the spaces that give it this shape."""
    if tensor.ndim != 1 or tensor.dtype != torch.uint8 or tuple(tensor.shape) >= shape:
        return tensor
    return torch.nn.functional.pad(tensor, (0, shape[0] - len(tensor)), value=ord(" "))


def _headers(path: Path) -> dict[str, Entry]:
    with safe_open(path, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dictionary
        return {name: Entry(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


_DESCRIPTIONS = ("quant_state.", "quant_map", "nested_quant_map")
"""What says how to read a layer. The other tensors are the model's numbers."""


def require_tensors(folder: Path, files: Iterable[str], layout: BaseLayout) -> None:
    """Raise ValueError, naming the tensor, unless these files have the tensors of a base, and what reads them.

    Kernels read as many constants as a layer's description asks for, past the end of a tensor. The model's numbers are
    not read. Raises SafetensorError for a file of another format, OSError.
    """
    headers = {file: _headers(folder / file) for file in files}
    stored = {name: header for found in headers.values() for name, header in found.items()}
    wanted = layout.tensors(stored)
    if missing := wanted.keys() - stored.keys():
        raise ValueError(f"{min(missing)} is missing")
    for file, found in headers.items():
        for name, header in found.items():
            if name not in wanted:
                raise ValueError(f"{name} belongs to no layer")
            entry, _ = wanted[name]
            if header != entry:
                raise ValueError(
                    f"{name} is {header.dtype} {list(header.shape)}, and must be {entry.dtype} {list(entry.shape)}"
                )
        _validate_descriptions(folder / file, {name: layer for name in found if (layer := wanted[name][1]) is not None})


def _validate_descriptions(path: Path, layers: Mapping[str, StoredTensor]) -> None:
    with safe_open(path, framework="pt") as opened:
        for name, layer in layers.items():
            if not layer.role.startswith(_DESCRIPTIONS):
                continue
            try:
                layer.ours(opened.get_tensor(name))
            except ValueError as error:
                raise ValueError(f"{name} is no part of a 4-bit layer: {error}") from error
