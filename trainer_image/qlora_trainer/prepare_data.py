"""The data's part of the step `prepare`: finds the job's data, has it tokenized and tells whether it has changed."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_api.dataset import DatasetSpec
from qlora_api.sources import HubSource, parse_source
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.environment import available_cpus, trainer_version
from qlora_trainer.core.failures import bad_dataset
from qlora_trainer.data_source import DataFiles, find_data, mounted_data
from qlora_trainer.dataset import Dataset, DatasetBuilder
from qlora_trainer.hub_layout import EVALUATION, TRAINING, Wanted
from qlora_trainer.prepared import Split
from qlora_trainer.stores.hub import Hub
from qlora_trainer.stores.s3 import ObjectFolder
from qlora_trainer.templates import Tokenizer

_LOG = logging.getLogger(__name__)

_LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide which tokens a row becomes and which rows are used, by name."""
    return {name: version(name) for name in _LIBRARIES}


def read_dataset(
    context: StepContext,
    hub: Callable[[], Hub],
    tokenizer: Tokenizer,
    *,
    vocabulary: int,
    tokenizer_files: Mapping[str, str],
    scratch: Callable[[str], Path],
    say: Callable[[str], None],
) -> Dataset:
    """The job's data set, tokenized. `scratch` gives folders, by name, for what the next attempt goes on from.

    `vocabulary`: tokens that the model knows. `tokenizer_files`: SHA-256 of each. Raises StepFailure.
    """
    spec = context.spec.dataset
    if spec.shuffle and spec.max_samples is None:
        _LOG.warning(
            "spec.dataset.shuffle does nothing without spec.dataset.maxSamples, whose rows it chooses: set that, or "
            "leave it out; training.seed orders the rows of each epoch anyway"
        )

    def find(uri: str, split: Split) -> DataFiles:
        say("reading the data set")
        return find_data(
            uri,
            wanted_part(context, split),
            revision=_wanted_revision(spec, split),
            mounts=context.mounts,
            hub=hub,
            objects=lambda source: ObjectFolder(source, context.secret("dataset"), refuse=bad_dataset),
            download=scratch(f"download-{split}"),
        )

    builder = DatasetBuilder(
        spec,
        context.spec.training,
        tokenizer,
        vocabulary=vocabulary,
        identity={"tokenizer": tokenizer_files, "libraries": libraries(), "trainer": trainer_version()},
        scratch=scratch("rows"),
        workers=available_cpus(),
        on_rows=lambda rows: say(f"tokenizing: {rows} rows done"),
    )
    return builder.build(find)


def wanted_part(context: StepContext, split: Split) -> Wanted:
    """Which configuration and split of a hub data set the job trains on, or evaluates with."""
    spec = context.spec.dataset
    own = spec.eval if split == "eval" else None
    if own is None:
        return Wanted((spec.split,) if spec.split else TRAINING.splits, spec.config)
    config = own.config or (spec.config if _evaluates_with_itself(spec) else None)
    return replace(EVALUATION, splits=(own.split,) if own.split else EVALUATION.splits, config=config)


def _wanted_revision(spec: DatasetSpec, split: Split) -> str | None:
    """The branch, tag or commit of a hub data set that the job trains on, or evaluates with."""
    own = spec.eval if split == "eval" else None
    if own is None:
        return spec.revision
    return own.revision or (spec.revision if _evaluates_with_itself(spec) else None)


def _evaluates_with_itself(spec: DatasetSpec) -> bool:
    """Whether the evaluation's rows are of the same repository: its revision and configuration hold for both."""
    evaluated = None if spec.eval is None or spec.eval.source is None else _repository(spec.eval.source)
    return evaluated == _repository(spec.source)


def _repository(uri: str) -> str | None:
    source = parse_source(uri)
    return source.repository if isinstance(source, HubSource) else None


def same_data(resolved: Mapping[str, Any], context: StepContext) -> bool:
    """Whether data files on volumes are as they were prepared; what is gone is needed no more."""
    dataset = context.spec.dataset
    own_evaluation = dataset.eval.source if dataset.eval is not None else None
    for uri, digest in ((dataset.source, resolved["data"]), (own_evaluation, resolved["evalData"])):
        data = None if uri is None else mounted_data(uri, context.mounts)
        if data is not None and data.sha256() != digest:
            return False
    return True
