"""Damage to a 4-bit base on a volume, with and without a manifest that fits."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.model.base.artifact import MANIFEST
from qlora_trainer.stores.contents import describe_files

WEIGHTS = "model.safetensors"
Harm = Callable[[Path], object]
Change = Callable[[torch.Tensor], torch.Tensor]
Tensors = dict[str, torch.Tensor]


def write(path: Path, content: bytes) -> None:
    """Replace a file that the cache has made read-only."""
    path.chmod(0o644)
    path.write_bytes(content)


def _in_manifest(folder: Path, name: str) -> None:
    """Write the file's new sum to the manifest, as an informed user would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = describe_files({name: folder / name})[name].dump()
    write(folder / MANIFEST, json.dumps(manifest).encode())


def _with_file(folder: Path, name: str, content: bytes) -> None:
    write(folder / name, content) if (folder / name).exists() else (folder / name).write_bytes(content)
    _in_manifest(folder, name)


def _in_other_manifest(part: str, key: str, value: str) -> Harm:
    def harm(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest[part][key] = value
        write(folder / MANIFEST, json.dumps(manifest).encode())

    return harm


def _with_tensors(folder: Path, name: str, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a file, in the valid format."""
    tensors = load_file(folder / name)
    (folder / name).unlink()
    save_file(change(tensors), folder / name)
    _in_manifest(folder, name)


def _with_constants(folder: Path, name: str, role: str, change: Change) -> None:
    """Change the first of the layers' tensors of that role."""

    def replace(tensors: Tensors) -> Tensors:
        chosen = min(tensor for tensor in tensors if f".weight.{role}" in tensor)
        return tensors | {chosen: change(tensors[chosen])}

    _with_tensors(folder, name, replace)


def overwrite(folder: Path, name: str = WEIGHTS) -> None:
    """Change the last byte of the file."""
    content = (folder / name).read_bytes()
    write(folder / name, content[:-1] + bytes([content[-1] ^ 1]))


def overwrite_with_manifest(folder: Path) -> None:
    """Change the last byte of the weights, and their sum."""
    overwrite(folder)
    _in_manifest(folder, WEIGHTS)


def rename_tensors(folder: Path, name: str = WEIGHTS) -> None:
    """Give the file the tensors of another model."""
    _with_tensors(folder, name, lambda tensors: {f"other.{key}": tensor for key, tensor in tensors.items()})


def cut_constants(folder: Path, name: str = WEIGHTS) -> None:
    """Leave too few constants: a kernel would read memory outside the tensor."""
    _with_constants(folder, name, "absmax", lambda tensor: tensor[:1].clone())


def describe_as_larger(folder: Path, name: str = WEIGHTS) -> None:
    """Keep the lengths of all tensors, and describe another shape."""

    def larger(tensor: torch.Tensor) -> torch.Tensor:
        described = json.loads(bytes(tensor.tolist()))
        described["shape"][0] *= 4
        return torch.tensor([*json.dumps(described).encode().ljust(len(tensor))], dtype=torch.uint8)

    _with_constants(folder, name, "quant_state", larger)


def _without_constants(tensors: Tensors) -> Tensors:
    chosen = min(name for name in tensors if name.endswith(".absmax"))
    return {name: tensor for name, tensor in tensors.items() if name != chosen}


def _with_another_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_bytes()) | {"rms_norm_eps": 0.5}
    _with_file(folder, "config.json", json.dumps(config).encode())


def _replace_by_link(path: Path, to: Path) -> None:
    path.rename(to)
    path.symlink_to(to)


def _replace_by_pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def _replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


HARMS: dict[str, Harm] = {
    "another byte": overwrite,
    "another configuration": _with_another_configuration,
    "one more setting": lambda folder: _with_file(folder, "generation_config.json", b'{"temperature": 9}'),
    "tensors of another model": rename_tensors,
    "too few constants": cut_constants,
    "constants of another type": lambda folder: _with_constants(folder, WEIGHTS, "nested_absmax", torch.Tensor.half),
    "no constants": lambda folder: _with_tensors(folder, WEIGHTS, _without_constants),
    "a larger shape": describe_as_larger,
    "another table": lambda folder: _with_constants(folder, WEIGHTS, "quant_map", lambda tensor: tensor * 2),
    "another original": _in_other_manifest("sources", WEIGHTS, "0" * 64),
    "another quantization": _in_other_manifest("quantization", "type", "fp4"),
    "shorter weights": lambda folder: write(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-1]),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a broken manifest": lambda folder: write(folder / MANIFEST, b"{"),
    "an adapter": lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "a bad name": lambda folder: (folder / os.fsdecode(b"\xff\n\x1b[2J" + b"x" * 200)).write_text(""),
    "a link": lambda folder: _replace_by_link(folder / WEIGHTS, folder.parent.parent / "elsewhere"),
    "a pipe": _replace_by_pipe,
    "a link to a folder": lambda folder: _replace_by_link(folder, folder.parent.parent / "elsewhere"),
    "a file as folder": _replace_by_file,
}
"""What can be wrong with a base, by name."""
