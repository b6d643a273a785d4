"""Decides by the model's small files, and then by the rows, whether and how a job is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from qlora_api.automatic import Choose, Limits
from qlora_api.choice import Choice
from qlora_api.memory.training_shape import RECOMPUTE_ALL, Recomputation, TrainingShape
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedSpec, decided_lora, resolve
from qlora_trainer.core.completion import PreparedModel
from qlora_trainer.core.measured_memory import MeasuredMemory
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.render.template_source import JobTemplate
from qlora_trainer.history.trackers import require_installed
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.families.admission import check_model, require_settings
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.memory.dry_run import measure_together_within_limits, measure_within_limits
from qlora_trainer.model.memory.fit import MemoryFit, training_shape
from qlora_trainer.model.memory.fitted import FittedSettings, fit_settings, gib_on_cpu
from qlora_trainer.model.source.files import CONFIG, tokenizer_digests
from qlora_trainer.publishing.gguf import require_convertible
from qlora_trainer.report.serving import warn_if_not_served


@dataclass(frozen=True)
class AdmittedModel:
    """A model that the job may be trained on, before data and weights are fetched."""

    folder: Path
    """With the model's small files."""
    family: Family
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    layout: BaseLayout

    @classmethod
    def from_folder(cls, folder: Path, spec: QLoRAJobSpec, family: Family, template: JobTemplate | None) -> Self:
        """Load the tokenizer of a checked model."""
        return cls(
            folder=folder,
            family=family,
            tokenizer=Tokenizer(folder, template),
            tokenizer_files=tokenizer_digests(folder),
            layout=BaseLayout.from_folder(folder, spec.quantization),
        )


@dataclass(frozen=True)
class FittedModel:
    """A model with all settings of the job, which fit the model and the GPU."""

    admitted: AdmittedModel
    fitted: FittedSettings

    @property
    def spec(self) -> ResolvedSpec:
        """The job's, with the chosen settings."""
        return self.fitted.spec

    @property
    def settings(self) -> tuple[Choice, ...]:
        """The chosen values of open settings."""
        return self.fitted.settings

    @property
    def memory(self) -> MemoryFit:
        """That of the job."""
        return self.fitted.memory

    @property
    def rows_apart(self) -> bool:
        """Whether rows can share a sequence."""
        return self.admitted.family.keeps_rows_apart(self.spec.training.max_sequence_length)

    @property
    def packed(self) -> bool:
        """Whether they do."""
        return self.admitted.family.packs(self.spec.training)

    @property
    def parameters(self) -> int | None:
        """Weights that each token is multiplied by, or None if unknown."""
        return self.admitted.family.parameters_of_token(self.memory.parameters)

    def record(self) -> PreparedModel:
        """Return the model's part of the completion record."""
        family = self.admitted.family
        return PreparedModel(
            target_modules=family.target_modules,
            packed=self.packed,
            rows_apart=self.rows_apart,
            mixture_of_experts=family.mixture_of_experts,
            experts_in_mxfp4=family.experts_in_mxfp4,
            model_type=family.model_type,
            auto_class=family.auto_class,
            attention=None if family.attention == ATTENTION else family.attention,
            fixed_positions=family.fixed_positions,
            memory=self.memory.status,
            measured=self.memory.measured,
            recomputed_blocks=self.fitted.recomputation.blocks,
            offloads_inputs=self.fitted.recomputation.offloads,
        )


def check_settings(folder: Path, spec: QLoRAJobSpec, scratch: Path) -> Family:
    """Check that the model in `folder` can be trained and published as the job asks. Raises StepFailure.

    `scratch` is a folder for a trial conversion to GGUF.
    """
    require_installed(spec.training.report_to)
    family = check_model(folder, spec)
    if spec.output.gguf is not None:
        # The conversion of one rank is like that of every other.
        require_convertible(folder, family.target_modules, decided_lora(spec.lora, 1, 1), spec.output.gguf, scratch)
    return family


def fit_model(model: AdmittedModel, spec: QLoRAJobSpec, choose: Choose, limits: Limits, *, on_gpu: bool) -> FittedModel:
    """Return the model with the chosen settings, the micro batch lowered until it fits the GPU.

    `on_gpu`: whether it is trained on one. Raises StepFailure if the model cannot be trained so.
    """
    family = model.family
    require_settings(family, model.folder / CONFIG, resolve(spec, choose(limits)))

    def shape(resolved: ResolvedSpec, recomputation: Recomputation) -> TrainingShape:
        return training_shape(resolved, family.target_modules, recomputation)

    def measure(resolved: ResolvedSpec, recomputation: Recomputation, earlier: MeasuredMemory | None) -> MemoryFit:
        return measure_memory(model.folder, resolved, family, limits.group_size, recomputation, earlier)

    resources = spec.resources
    cpu_gib = None if on_gpu else gib_on_cpu(resources.memory, resources.gpus)
    fitted = fit_settings(spec, choose, limits, resources.gpu_gib, shape, measure, cpu_gib=cpu_gib)
    warn_if_not_served(fitted.spec)
    return FittedModel(model, fitted)


def measure_memory(
    folder: Path,
    spec: ResolvedSpec,
    family: Family,
    group_size: int,
    recomputation: Recomputation = RECOMPUTE_ALL,
    earlier: MeasuredMemory | None = None,
) -> MemoryFit:
    """Measure in dry runs the memory that `group_size` such jobs need together."""
    return MemoryFit.from_config(
        folder / CONFIG,
        spec,
        family.target_modules,
        recomputation,
        rows_apart=family.keeps_rows_apart(spec.training.max_sequence_length),
        group_size=group_size,
        earlier=earlier,
        measure=partial(measure_within_limits, family=family),
        measure_passes=partial(measure_together_within_limits, family=family),
    )
