"""Makes the manifests of what a job publishes."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from qlora_api.schema import replace
from qlora_api.spec.job import MUTABLE_FIELDS
from qlora_api.spec.output import BaseType
from qlora_trainer.core.trained_job import TrainedJob
from qlora_trainer.model.source.files import tokenizer_and_processor
from qlora_trainer.stores.contents import SHARED_BASES, Contents, Manifest, Publisher, describe_files

_LIBRARIES = ("qlora-operator", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


def base_publisher(base_type: BaseType, base_sha256: str, model: Path) -> Publisher:
    """The publisher of the base of this type and sum with the tokenizer in `model`."""
    return Publisher(SHARED_BASES[base_type], base_sha256, describe_files(tokenizer_and_processor(model)))


def run_manifest(job: TrainedJob, contents: Contents) -> Manifest:
    """The manifest of these files of a job. Raises OSError if a file cannot be read."""
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=set(MUTABLE_FIELDS))
    return Manifest(
        job_uid=job.uid,
        job_name=job.name,
        fingerprint=job.trained.fingerprint,
        spec_sha256=hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest(),
        base_model=job.spec.model.source,
        base_revision=job.prepared.model_revision,
        libraries={name: version(name) for name in _LIBRARIES},
        files=describe_files(contents),
        initial_adapter=job.prepared.initial_adapter,
    )


def base_manifest(job: TrainedJob, base_type: BaseType, contents: Contents) -> Manifest:
    """The manifest of the job's published base, which names no job: all that were trained on it share it.

    Raises OSError if a file cannot be read.
    """
    quantization = json.dumps(job.spec.quantization.dump(), sort_keys=True)
    return replace(
        run_manifest(job, contents),
        job_uid=SHARED_BASES[base_type],
        job_name=SHARED_BASES[base_type],
        fingerprint=job.trained.base_sha256,
        spec_sha256=hashlib.sha256(quantization.encode()).hexdigest(),
        initial_adapter=None,
    )
