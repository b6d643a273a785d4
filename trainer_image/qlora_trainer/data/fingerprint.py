"""What decides the prepared data, as one SHA-256: prepared data with the same fingerprint need not be made again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from qlora_api.dataset import DatasetSpec
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.environment import trainer_version
from qlora_trainer.core.filesystem import write_atomically
from qlora_trainer.data.job_template import template_unchanged
from qlora_trainer.data.locate import mounted_data
from qlora_trainer.data.prepared import FORMAT_VERSION, PREPARED_MANIFEST

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


@dataclass(frozen=True)
class ResolvedInputs:
    """The content that a job's addresses had when they were read. With the spec it decides the prepared data."""

    model: str
    """Revision of the model."""
    tokenizer: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    data: str
    """SHA-256 of the training data."""
    eval_data: str | None
    """SHA-256 of the evaluation's own data; None if it has none."""
    template: str | None = None
    """SHA-256 of the job's own chat template; None if it has none."""

    def fingerprint(self, spec: QLoRAJobSpec) -> str:
        """SHA-256 of everything that decides the prepared data of a job with this spec, in hexadecimal."""
        training = spec.training
        inputs = {
            "format": FORMAT_VERSION,
            "libraries": library_versions(),
            "trainer": trainer_version(),
            "resolved": self._dump(),
            "model": {"source": spec.model.source, "revision": spec.model.revision},
            "targetModules": spec.lora.target_modules,
            "layersToTransform": spec.lora.layers_to_transform,
            "dataset": spec.dataset.dump(),
            "maxSequenceLength": training.max_sequence_length,
            "packing": training.packing,
            "trainOn": training.train_on,
            # Which columns are read may depend on it.
            **({"pairs": True} if training.compares_answers else {}),
            # It chooses rows, and which of them share a sequence.
            "seed": training.seed,
        }
        return sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def unchanged(self, dataset: DatasetSpec, mounts: Mounts) -> bool:
        """Whether mounted data still has this content. Data that is gone, or on a server, counts as unchanged."""
        own_evaluation = dataset.eval.source if dataset.eval is not None else None
        for uri, digest in ((dataset.source, self.data), (own_evaluation, self.eval_data)):
            data = None if uri is None else mounted_data(uri, mounts)
            if data is not None and data.sha256() != digest:
                return False
        return template_unchanged(dataset, mounts, self.template)

    def write(self, folder: Path, fingerprint: str) -> None:
        """Write the manifest of a data folder, the last of its files."""
        manifest = {"fingerprint": fingerprint, "resolved": self._dump()}
        write_atomically(folder / PREPARED_MANIFEST, json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")

    @classmethod
    def read(cls, folder: Path) -> "ResolvedInputs | None":
        """The inputs of a data folder by its manifest; None if that is missing or damaged."""
        try:
            found = json.loads((folder / PREPARED_MANIFEST).read_bytes())["resolved"]
            template = found.get("template")
            return cls(found["model"], dict(found["tokenizer"]), found["data"], found["evalData"], template)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _dump(self) -> dict[str, object]:
        return {
            "model": self.model,
            "tokenizer": dict(self.tokenizer),
            "data": self.data,
            "evalData": self.eval_data,
            **({} if self.template is None else {"template": self.template}),
        }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide which tokens a row becomes and which rows are used, by name."""
    return {name: version(name) for name in _LIBRARIES}
