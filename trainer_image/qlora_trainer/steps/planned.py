"""Checks a model by its config.json alone, as prepare does, to plan a job. Loads no torch itself."""

import dataclasses
import importlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from qlora_api.automatic import NO_LIMITS, Limits, ModelFacts, assume
from qlora_api.choice import Choice
from qlora_api.memory.model_shape import mixes_experts
from qlora_api.memory.one_row import ONE_ROW_MODEL_TYPES
from qlora_api.memory.training_shape import Recomputation, TrainingShape
from qlora_api.schema import replace
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.output import GgufSpec
from qlora_api.spec.resolved import ResolvedLora, ResolvedSpec, decided_lora, open_settings
from qlora_api.spec.training import LoraSpec
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.model.families import admission
from qlora_trainer.model.families.family import Family, Traits
from qlora_trainer.model.memory.dry_run import StepSize, measure_within_limits
from qlora_trainer.model.memory.fit import MemoryFit, read_shape, training_shape, type_of_model, weights_of
from qlora_trainer.model.memory.fitted import FittedSettings, fit_settings
from qlora_trainer.model.memory.job_memory import Measure

_CONFIG = "config.json"
# By its name: importers of this module do not load torch.
_GGUF = "qlora_trainer.publishing.gguf"


def check_config(config: Path, spec: QLoRAJobSpec) -> Traits:
    """Return the traits of a job's model. Raises StepFailure as prepare does."""
    traits = find_traits(config, spec.lora)
    require_settings(traits, config, spec)
    return traits


def find_traits(config: Path, lora: LoraSpec) -> Traits:
    """Return the traits of the model with this config.json, from an inspection.

    Without the trainer, from the list of the families that were inspected. Raises StepFailure as prepare does.
    """
    if importlib.util.find_spec("torch") is None:
        model_type = type_of_model(config)
        return Traits(
            model_type=model_type,
            one_row=model_type in ONE_ROW_MODEL_TYPES,
            mixture_of_experts=mixes_experts(json.loads(config.read_bytes())),
            sizes=listed_sizes(config, lora),
        )
    if config.name == _CONFIG:
        return admission.inspect_model(config.parent, lora)
    with TemporaryDirectory() as folder:
        return admission.inspect_model(Path(shutil.copyfile(config, Path(folder) / _CONFIG)).parent, lora)


def require_settings(traits: Traits, config: Path, spec: QLoRAJobSpec) -> None:
    """Raise StepFailure, as prepare does, if the model cannot be trained and published so.

    A trial conversion to GGUF takes seconds, and the trainer: without it there is none.
    """
    admission.require_settings(traits, config, spec)
    if spec.output.gguf is not None and isinstance(traits, Family):
        # The trial has rank 1 for any rank.
        lora = replace(decided_lora(spec.lora, 1, 1), rank=1, alpha=1)
        _require_convertible(config.read_bytes(), traits.target_modules, lora, spec.output.gguf)


@cache
def _require_convertible(config: bytes, target_modules: tuple[str, ...], lora: ResolvedLora, gguf: GgufSpec) -> None:
    """Try once for the equal adapters of a sweep."""
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        (model / _CONFIG).write_bytes(config)
        importlib.import_module(_GGUF).require_convertible(model, target_modules, lora, gguf, Path(folder) / "trial")


def listed_sizes(config: Path, lora: LoraSpec) -> ModelFacts | None:
    """Return the sizes of a model that decide settings, None if its family is not listed. Raises StepFailure."""
    names = frozenset(name.rpartition(".")[2] for name in lora.target_modules)
    blocks = len(set(lora.layers_to_transform or ())) or None
    weights = weights_of(config, TrainingShape(rank=1, target_modules=names, adapted_layers=blocks))
    shape = read_shape(config)
    return None if shape is None or weights is None else ModelFacts(shape.hidden_size, weights.adapter_parameters)


def assume_settings(spec: QLoRAJobSpec, traits: Traits, limits: Limits = NO_LIMITS) -> tuple[Choice, ...]:
    """Assume what a job leaves open, as long as its rows are not known. Raises StepFailure."""
    left_open = open_settings(spec)
    if not left_open:
        return ()
    limits = dataclasses.replace(limits, one_row=not traits.keeps_rows_apart(spec.training.max_sequence_length))
    return assume(spec, traits.require_sizes(left_open), traits.longest_row, limits)


def measure_with(traits: Traits, gpu_gib: float | None) -> Measure:
    """Return the dry run of a model that was inspected. `gpu_gib`: memory of another GPU than the job's."""
    own = partial(measure_within_limits, family=traits if isinstance(traits, Family) else None)
    if gpu_gib is None:
        return own

    def measure(config: Path, spec: ResolvedSpec, sizes: Sequence[StepSize], digest: str) -> MeasuredMemory:
        on_gpu = replace(spec, resources=replace(spec.resources, gpu_memory=f"{int(gpu_gib)}Gi"))
        return own(config, on_gpu, sizes, digest)

    return measure


def plan_memory(config: Path, spec: QLoRAJobSpec, gpu_gib: float | None) -> tuple[Traits, FittedSettings]:
    """Return the model's traits, and the settings and memory of a job whose rows are not known.

    `gpu_gib`: memory of another GPU than the job's. Raises StepFailure as prepare does, unless the job does not fit.
    """
    traits = check_config(config, spec)
    targets = spec.lora.target_modules

    def measure(resolved: ResolvedSpec, recomputation: Recomputation, earlier: MeasuredMemory | None) -> MemoryFit:
        return MemoryFit.from_config(
            config,
            resolved,
            targets,
            recomputation,
            rows_apart=traits.keeps_rows_apart(resolved.training.max_sequence_length),
            gpu_gib=gpu_gib,
            earlier=earlier,
            measure=measure_with(traits, gpu_gib),
        )

    def shape(resolved: ResolvedSpec, recomputation: Recomputation) -> TrainingShape:
        return training_shape(resolved, targets, recomputation)

    gpu_gib = gpu_gib or spec.resources.gpu_gib
    return traits, fit_settings(spec, partial(assume_settings, spec, traits), NO_LIMITS, gpu_gib, shape, measure)
