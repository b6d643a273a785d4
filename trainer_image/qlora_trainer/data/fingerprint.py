"""Fingerprints of prepared data: one SHA-256 of everything that decides them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from qlora_api.schema import Decides
from qlora_api.spec.dataset import DatasetSpec
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.environment import trainer_version
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.core.protocols import JsonObject
from qlora_trainer.data.prepared import FORMAT_VERSION, PREPARED_MANIFEST
from qlora_trainer.data.read.locate import mounted_data
from qlora_trainer.data.render.template_source import is_template_unchanged

# Of these the content is known.
_OF_AN_ADDRESS = ("source", "revision", "sha256", "secretRef", "chatTemplate")
_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


@dataclass(frozen=True)
class ResolvedInputs:
    """The content of a job's addresses, which decides the prepared data."""

    model: str
    tokenizer: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    data: tuple[str, ...]
    """SHA-256 of the data of each training source."""
    eval_data: str | None
    """SHA-256 of the evaluation's separate data, or None."""
    template: str | None = None
    """SHA-256 of the job's chat template override, or None."""
    guards: tuple[str, ...] = ()
    """SHA-256 of the data of each guard."""

    def fingerprint(self, spec: ResolvedSpec) -> str:
        """SHA-256, in hexadecimal, of everything that decides a job's prepared data."""
        training = spec.training
        inputs: dict[str, object] = {
            "format": FORMAT_VERSION,
            "libraries": library_versions(),
            "trainer": trainer_version(),
            "resolved": self._dump(),
            "model": {"source": spec.model.source, "revision": spec.model.revision},
            "targetModules": spec.lora.target_modules,
            "layersToTransform": spec.lora.layers_to_transform,
            "dataset": _without_defaults(spec.dataset),
            **Decides.PREPARED_DATA.settings(training),
            # Which columns are read may depend on it.
            **({"pairs": True} if training.compares_answers else {}),
        }
        if spec.guards:
            inputs["guards"] = [[each.name, each.rows.dump(), each.min_score is not None] for each in spec.guards]
        if spec.dataset.mix is not None:
            # So many epochs are drawn.
            inputs["length"] = {
                "epochs": training.epochs,
                "maxSteps": training.max_steps,
                "sequencesPerStep": training.micro_batch_size * training.gradient_accumulation_steps,
            }
        return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def content(self, dataset: DatasetSpec) -> dict[str, object]:
        """Everything besides settings of the training that decides the sequences, by name."""
        optional = {"evalRows": self.eval_data, "template": self.template}
        return {
            "rows": list(self.data),
            **{name: digest for name, digest in optional.items() if digest is not None},
            "tokenizer": dict(self.tokenizer),
            "dataset": dataset_settings(dataset),
            "format": FORMAT_VERSION,
            "libraries": library_versions(),
        }

    def is_unchanged(self, spec: QLoRAJobSpec, mounts: Mounts) -> bool:
        """Whether mounted data still has this content. Data that is gone counts as such."""
        digests = (*self.data, *([] if self.eval_data is None else [self.eval_data]), *self.guards)
        for uri, digest in zip(spec.data_addresses.values(), digests, strict=True):
            data = mounted_data(uri, mounts)
            if data is not None and data.sha256() != digest:
                return False
        return is_template_unchanged(spec.dataset, mounts, self.template)

    def write(self, folder: Path, fingerprint: str) -> None:
        """Write the manifest of a data folder, the last of its files."""
        manifest = {"fingerprint": fingerprint, "resolved": self._dump()}
        write_atomically(folder / PREPARED_MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> "ResolvedInputs | None":
        """Read the inputs from a data folder's manifest. None if missing or damaged."""
        try:
            found = json.loads((folder / PREPARED_MANIFEST).read_bytes())["resolved"]
            data = found["data"]
            of_each = (data,) if isinstance(data, str) else tuple(data)
            template, guards = found.get("template"), tuple(found.get("guards", ()))
            return cls(found["model"], dict(found["tokenizer"]), of_each, found["evalData"], template, guards)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _dump(self) -> dict[str, object]:
        return {
            "model": self.model,
            "tokenizer": dict(self.tokenizer),
            "data": self.data[0] if len(self.data) == 1 else list(self.data),
            "evalData": self.eval_data,
            **({} if self.template is None else {"template": self.template}),
            **({"guards": list(self.guards)} if self.guards else {}),
        }


def _without_defaults(dataset: DatasetSpec) -> JsonObject:
    """The data set without settings that are as if they were not set."""
    described: JsonObject = dataset.dump()
    if not dataset.deduplicate:
        described.pop("deduplicate", None)
    if dataset.eval is not None and dataset.eval.overlap == "report":
        described["eval"] = {name: value for name, value in dataset.eval.dump().items() if name != "overlap"}
    return described


def dataset_settings(dataset: DatasetSpec) -> JsonObject:
    """The settings that decide the rows and their form, with numbers for sources."""
    described = _without_address(_without_defaults(dataset))
    if "eval" in described:
        described["eval"] = _without_address(described["eval"])
    if isinstance(sources := described.get("mix"), list):
        described["mix"] = {str(number): _without_address(source) for number, source in enumerate(sources)}
    return described


def _without_address(part: JsonValue) -> JsonObject:
    kept = {name: value for name, value in cast("JsonObject", part).items() if name not in _OF_AN_ADDRESS}
    # The column of checks decides no sequence.
    if isinstance(columns := kept.get("columns"), dict) and "check" in columns:
        kept["columns"] = {name: value for name, value in columns.items() if name != "check"}
    if kept.get("columns") == {} != cast("JsonObject", part)["columns"]:
        del kept["columns"]
    return kept


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide tokens and rows, by name."""
    return {name: version(name) for name in _LIBRARIES}
