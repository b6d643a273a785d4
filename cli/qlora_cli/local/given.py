"""Reads the manifest that a command shows, or makes the job of rows that a user names without one."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from qlora_api.addresses import advice_on_address
from qlora_api.problems import explain
from qlora_api.schema import replace
from qlora_api.sources import parse_source
from qlora_api.spec.job import API_VERSION, KIND, QLoRAJobDocument, QLoRAJobSpec
from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.manifest import Document, ManifestError, load_manifest
from qlora_trainer.core.context import Mounts

# Endings of rows, also of those that a job does not read: its message has what to do.
_ROWS = re.compile(r"\.(jsonl|json|csv|parquet|arrow|tsv|txt|xlsx?)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE)
# A manifest may be JSON too, and has this name at its beginning. Rows may well have a column `kind`.
_MANIFEST = re.compile(rb'"apiVersion"\s*:')
_BEGINNING = 2**16
# Claims for folders of this machine, which have none.
_ROWS_CLAIM, _MODEL_CLAIM = "local-rows", "local-model"


@dataclass(frozen=True)
class Given:
    """A job or sweep, and the folders in place of its claims."""

    document: Document
    claims: Mapping[str, Path]
    config_maps: Mapping[str, Path]
    local_names: Mapping[str, Path] = field(default_factory=dict)
    """Folders that messages show instead of these claims."""
    is_manifest: bool = True
    has_model: bool = True

    @property
    def spec(self) -> QLoRAJobSpec:
        """The spec of the job, or of the sweep's template."""
        document = self.document
        return document.spec.template.spec if isinstance(document, QLoRASweepDocument) else document.spec

    @property
    def mounts(self) -> Mounts:
        """Where the claims and ConfigMaps are."""
        return Mounts(claims=self.claims, config_map_folders=self.config_maps, local_names=self.local_names)

    def with_memory(self, memory: str | None) -> "Given":
        """Return the same with this host memory, unless the spec sets it."""
        if memory is None or self.spec.resources.memory is not None:
            return self
        document, spec = self.document, replace(self.spec, resources=replace(self.spec.resources, memory=memory))
        if isinstance(document, QLoRASweepDocument):
            template = replace(document.spec.template, spec=spec)
            with_memory: Document = replace(document, spec=replace(document.spec, template=template))
        else:
            with_memory = replace(document, spec=spec)
        return dataclasses.replace(self, document=with_memory)

    @classmethod
    def load(cls, file: str, model: str | None, claims: Mapping[str, Path], config_maps: Mapping[str, Path]) -> "Given":
        """The manifest in `file`, or the job of the rows that it is, with this model. Raises ManifestError."""
        if _names_rows(file):
            return _job_of_rows(file, model, claims, config_maps)
        advice = "" if Path(file).exists() else advice_on_address(file)
        if advice.startswith("did you mean"):
            raise ManifestError(f"{file} does not exist; {advice}")
        if model is not None:
            raise ManifestError(f"--model is for rows without a manifest, and {file} is a manifest: remove it")
        return cls(load_manifest(Path(file)), claims, config_maps)


def _names_rows(file: str) -> bool:
    path = Path(file)
    if "://" in file or path.is_dir():
        return True
    if path.suffix.lower() == ".json" and path.is_file():
        with path.open("rb") as content:
            return _MANIFEST.search(content.read(_BEGINNING)) is None
    return _ROWS.search(path.name) is not None


def _job_of_rows(file: str, model: str | None, claims: Mapping[str, Path], config_maps: Mapping[str, Path]) -> Given:
    folders: dict[str, Path] = {}
    rows, base = file, model or f"pvc://{_MODEL_CLAIM}"
    if "://" not in file:
        path = Path(file)
        folders[_ROWS_CLAIM] = path if path.is_dir() else path.parent
        rows = f"pvc://{_ROWS_CLAIM}" if path.is_dir() else _address(path)
    if model is not None and "://" not in model and Path(model).is_dir():
        folders[_MODEL_CLAIM] = Path(model)
        base = f"pvc://{_MODEL_CLAIM}"
    elif base.startswith((".", "/", "~")) or ("://" not in base and "/" in base and Path(base).parent.is_dir()):
        raise ManifestError(f"--model: {base} is not a folder: name one, or an address such as hf://ORG/NAME")
    body = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "rows"},
        "spec": {"model": {"source": base}, "dataset": {"source": rows}},
    }
    try:
        document = QLoRAJobDocument.model_validate(body, by_alias=True, by_name=False)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = "--model: " if "model" in problem["loc"] else ""
        raise ManifestError(f"{option}{explain(problem, QLoRAJobDocument)}") from error
    local = {_ROWS_CLAIM: folders[_ROWS_CLAIM]} if _ROWS_CLAIM in folders else {}
    return Given(document, {**claims, **folders}, config_maps, local, is_manifest=False, has_model=model is not None)


def _address(path: Path) -> str:
    address = f"pvc://{_ROWS_CLAIM}/{path.name}"
    try:
        parse_source(address)
    except ValueError as error:
        raise ManifestError(
            f"{path}: no address of a job can have this file name: it must have letters, digits, '.', '_', '=' and "
            "'-', with a letter, a digit or '_' first: rename the file"
        ) from error
    return address
