"""Decides by the model's small files whether and how a job is trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from qlora_api.spec.job import QLoRAJobSpec
from qlora_trainer.core.completion import PreparedModel
from qlora_trainer.data.render.chat_template import Tokenizer
from qlora_trainer.data.render.template_source import JobTemplate
from qlora_trainer.history.trackers import require_installed
from qlora_trainer.model.base.layout import BaseLayout
from qlora_trainer.model.families.admission import advise_learning_rate, check_model
from qlora_trainer.model.families.family import Family
from qlora_trainer.model.kernels.attention import ATTENTION
from qlora_trainer.model.memory.dry_run import measure_together_within_limits, measure_within_limits
from qlora_trainer.model.memory.fit import MemoryFit
from qlora_trainer.model.source.files import CONFIG, tokenizer_digests
from qlora_trainer.publishing.gguf import require_convertible
from qlora_trainer.report.serving import warn_if_not_served


@dataclass(frozen=True)
class AdmittedModel:
    """A model that the job can be trained on, before data and weights are fetched."""

    folder: Path
    """With the model's small files."""
    family: Family
    memory: MemoryFit
    tokenizer: Tokenizer
    tokenizer_files: Mapping[str, str]
    """SHA-256 of each of the tokenizer's files."""
    layout: BaseLayout
    rows_apart: bool
    """Whether rows can share a sequence."""
    packed: bool
    """Whether they do."""

    @classmethod
    def from_folder(
        cls, folder: Path, spec: QLoRAJobSpec, family: Family, memory: MemoryFit, template: JobTemplate | None
    ) -> Self:
        """Load the tokenizer of a checked model. Raises StepFailure if it does not fit."""
        memory.require()
        advise_learning_rate(memory.parameters or 0, spec.training.learning_rate)
        return cls(
            folder=folder,
            family=family,
            memory=memory,
            tokenizer=Tokenizer(folder, template),
            tokenizer_files=tokenizer_digests(folder),
            layout=BaseLayout.from_folder(folder, spec.quantization),
            rows_apart=family.keeps_rows_apart(spec.training.max_sequence_length),
            packed=family.packs(spec.training),
        )

    @property
    def parameters(self) -> int | None:
        """Weights that each token is multiplied by, or None if unknown."""
        return self.family.parameters_of_token(self.memory.parameters)

    def record(self) -> PreparedModel:
        """Return the model's part of the completion record."""
        family = self.family
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
        )


def check_settings(folder: Path, spec: QLoRAJobSpec, scratch: Path) -> Family:
    """Check that the model in `folder` can be trained and published as the job asks. Raises StepFailure.

    `scratch` is a folder for a trial conversion to GGUF.
    """
    require_installed(spec.training.report_to)
    family = check_model(folder, spec)
    warn_if_not_served(spec)
    if spec.output.gguf is not None:
        require_convertible(folder, family.target_modules, spec.lora, spec.output.gguf, scratch)
    return family


def measure_memory(folder: Path, spec: QLoRAJobSpec, family: Family, group_size: int) -> MemoryFit:
    """Measure in dry runs the memory that `group_size` such jobs need together."""
    return MemoryFit.from_config(
        folder / CONFIG,
        spec,
        family.target_modules,
        rows_apart=family.keeps_rows_apart(spec.training.max_sequence_length),
        mixture_of_experts=family.mixture_of_experts,
        group_size=group_size,
        measure=partial(measure_within_limits, family=family),
        measure_passes=partial(measure_together_within_limits, family=family),
    )
