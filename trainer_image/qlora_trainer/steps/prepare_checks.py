"""Checks of prepare: a run's work and its steps, earlier prepared data."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from qlora_api.contract import WorkspaceLayout
from qlora_api.forecast import training_flops
from qlora_api.schema import replace
from qlora_api.spec.job import QLoRAJobSpec
from qlora_api.spec.resolved import ResolvedTraining
from qlora_api.status import DatasetStatus
from qlora_api.steps import EVALUATIONS, STEPS, remarks_on_steps
from qlora_api.usage import WorkStatus
from qlora_trainer.core.completion import PrepareRecord, asked_sha256
from qlora_trainer.core.context import Mounts
from qlora_trainer.core.failures import bad_configuration
from qlora_trainer.core.records import RecordWriter
from qlora_trainer.data.fingerprint import ResolvedInputs
from qlora_trainer.data.prepared import PreparedDataset, guard_split
from qlora_trainer.evaluation.answers import AnswerTexts
from qlora_trainer.evaluation.scorable import SCORE, require_readable, require_scorable
from qlora_trainer.model.adapter.initial import is_unchanged
from qlora_trainer.model.base.artifact import is_present
from qlora_trainer.model.base.cache import is_whole
from qlora_trainer.model.memory.fit import MemoryFit
from qlora_trainer.model.source.files import CONFIG, tokenizer_digests
from qlora_trainer.training.schedule import Schedule

logger = logging.getLogger(__name__)


def planned_work(
    parameters: int | None,
    data: PreparedDataset,
    found: DatasetStatus,
    training: ResolvedTraining,
    recomputed_share: float,
) -> WorkStatus | None:
    """Return the planned run's operations, None if those per token are unknown.

    `recomputed_share`: of the blocks.
    """
    if parameters is None:
        return None
    schedule = Schedule.from_training(len(data), training, data.epoch_offsets)
    tokens = round(found.tokens * schedule.epoch(schedule.total_steps))
    return WorkStatus(parameters=parameters, tokens=tokens, flops=training_flops(parameters, tokens, recomputed_share))


def planned_steps(training: ResolvedTraining, data_folder: Path) -> int:
    """Count the optimizer steps of the planned run."""
    data = PreparedDataset.open(data_folder, "train")
    return Schedule.from_training(len(data), training, data.epoch_offsets).total_steps


def check_steps(training: ResolvedTraining, gpus: int, data_folder: Path) -> tuple[str, ...]:
    """Return remarks on few optimizer steps or evaluations, also logged.

    Raises StepFailure (BAD_CONFIGURATION) for a warm-up that takes the whole run.
    """
    data = PreparedDataset.open(data_folder, "train")
    steps = planned_steps(training, data_folder)
    if training.warmup_steps >= steps:
        raise bad_configuration(
            f"spec.training.warmupSteps is {training.warmup_steps}, and the run makes {steps} optimizer steps, so that "
            f"it never trains at learningRate: set warmupSteps below {steps}, or train for more than "
            f"{training.warmup_steps} steps (a higher epochs or maxSteps, or a lower gradientAccumulationSteps or "
            "batchSize)"
        )
    remarks = remarks_on_steps(training, steps, len(data) // max(1, len(data.epoch_offsets) - 1), gpus)
    for remark in remarks:
        logger.warning("%s", remark)
    return remarks


def refresh_record(
    record: PrepareRecord,
    asked: QLoRAJobSpec,
    workspace: WorkspaceLayout,
    mounts: Mounts,
    group_size: int,
    records: RecordWriter,
) -> PrepareRecord | None:
    """Return the record with a new estimate if it describes the job and its files are whole; else None.

    Raises StepFailure if the job does not fit its GPU, asks for a score that no adapter could have, or only warms up.
    """
    if record.asked != asked_sha256(asked):
        return None
    root, spec = workspace.root, record.resolve(asked)
    resolved, folder = ResolvedInputs.read(root / record.data_path), root / record.model_path
    data, base = root / record.data_path, root / record.base_path
    splits = ("train", *(["eval"] if spec.dataset.holds_out else []), *(guard_split(each.name) for each in spec.guards))
    if resolved is None or not (
        resolved.fingerprint(spec) == record.fingerprint
        and (folder / CONFIG).is_file()
        and _can_be_opened(data, splits)
        and is_unchanged(record.initial_adapter, spec.lora.initial_adapter, workspace.initial_adapter)
        and is_whole(base, mounts.model_cache)
        and is_present(base, record.base_sha256, spec.quantization)
        and tokenizer_digests(folder) == resolved.tokenizer
        and resolved.is_unchanged(spec, mounts)
    ):
        return None
    memory = MemoryFit.from_config(
        folder / CONFIG,
        spec,
        record.target_modules,
        record.recomputation,
        rows_apart=record.rows_apart,
        group_size=group_size,
        earlier=record.measured,
    )
    records.note(memory=memory.status)
    memory.require()
    require_readable(spec.gate)
    texts = partial(AnswerTexts, folder, record.end_of_turn)
    of_score = require_scorable(spec.gate, data, record.dataset, texts, fixed_positions=record.fixed_positions)
    kept = (remark for remark in record.remarks if not remark.startswith((SCORE, EVALUATIONS, STEPS)))
    remarks = (*check_steps(spec.training, spec.resources.gpu_count, data), *kept, *of_score)
    steps = planned_steps(spec.training, data)
    return replace(record, memory=memory.status, measured=memory.measured, remarks=remarks, total_steps=steps)


def _can_be_opened(data_folder: Path, splits: Sequence[str]) -> bool:
    """Whether all prepared rows exist, in files that can be opened."""
    try:
        for split in splits:
            PreparedDataset.open(data_folder, split)
    except (OSError, ValueError):
        return False
    return True
