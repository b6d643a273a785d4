"""Writes and reads the CNCF's ModelPack format: an artifact with files as layers.

See github.com/modelpack/model-spec v1.
"""

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from qlora_trainer.stores.contents import PublishedFile
from qlora_trainer.stores.registry import MANIFEST_TYPE, Blob, ImageManifest, Layer, digest_of

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
_WEIGHT = "application/vnd.cncf.model.weight.v1.raw"
_WEIGHT_CONFIG = "application/vnd.cncf.model.weight.config.v1.raw"
_DOCUMENT = "application/vnd.cncf.model.doc.v1.raw"
_NO_MODEL = tuple(f"application/vnd.cncf.model.{part}." for part in ("doc", "code", "dataset"))
_FILE_PATH = "org.cncf.model.filepath"
# The name that `oras pull` gives the file.
_TITLE = "org.opencontainers.image.title"
_DOCUMENTS = frozenset({"README.md", "manifest.json"})


def pack(name: str, files: Mapping[str, PublishedFile]) -> tuple[bytes, bytes]:
    """Configuration and manifest of the artifact of these files. Each is one layer, unchanged.

    The same files give the same bytes.
    """
    digests = {file: f"sha256:{described.sha256}" for file, described in sorted(files.items())}
    config = _json(
        {
            "descriptor": {"name": name},
            "config": {"format": "safetensors"},
            "modelfs": {"type": "layers", "diffIds": list(digests.values())},
        }
    )
    layers = [
        {
            "mediaType": _media_type(file),
            "digest": digest,
            "size": files[file].size,
            "annotations": {_FILE_PATH: file, _TITLE: file},
        }
        for file, digest in digests.items()
    ]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": _CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
        "layers": layers,
    }
    return config, _json(manifest)


def unpack(manifest: ImageManifest) -> dict[str, Blob]:
    """The files of an artifact by their names: layers that are one file. Others, such as archives, are left out.

    Raises ValueError if two layers have the same name, or one has a wrong type of annotations, digest or size.
    """
    files: dict[str, Blob] = {}
    for layer in manifest["layers"]:
        name = _name(layer)
        if not isinstance(name, str) or _is_archive(layer):
            continue
        if name in files:
            raise ValueError(f"two layers are called {name[:80]!r}")
        digest, size = layer.get("digest"), layer.get("size")
        if not (isinstance(digest, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", digest)):
            raise ValueError(f"the layer {name[:80]!r} has no SHA-256")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"the layer {name[:80]!r} has no size")
        files[name] = Blob(digest, size)
    return files


def archives(manifest: ImageManifest) -> list[str]:
    """Names of the layers that are archives and may have files of a model. `manifest` is one that `unpack` accepts.

    Layers of documentation, code and data are left out: the format has types for them, and a model needs none.
    """
    return [
        str(_name(layer) or layer.get("mediaType"))[:80]
        for layer in manifest["layers"]
        if _is_archive(layer) and not str(layer.get("mediaType")).startswith(_NO_MODEL)
    ]


def _name(layer: Layer) -> object:
    """The name of the file in the layer, if its annotations have one."""
    annotations = layer.get("annotations") or {}
    if not isinstance(annotations, Mapping):
        raise ValueError("the annotations of a layer are not an object")  # noqa: TRY004 - of what the registry sent
    return annotations.get(_FILE_PATH) or annotations.get(_TITLE)


def _is_archive(layer: Layer) -> bool:
    """Whether a layer is compressed, encrypted or packed, and not simply a file."""
    return "+" in str(layer.get("mediaType")) or ".tar" in str(layer.get("mediaType"))


def _media_type(file: str) -> str:
    if file.endswith((".safetensors", ".gguf")):
        return _WEIGHT
    document = file in _DOCUMENTS or PurePosixPath(file).suffix not in (".json", ".jinja", ".model", ".txt")
    return _DOCUMENT if document else _WEIGHT_CONFIG


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
