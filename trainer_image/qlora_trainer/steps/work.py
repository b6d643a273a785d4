"""How much a run has to compute, as far as that is known before it begins."""

from qlora_api.forecast import training_flops
from qlora_api.status import DatasetStatus
from qlora_api.training import TrainingSpec
from qlora_api.usage import WorkStatus
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.training.schedule import Schedule


def work_of(
    parameters: int | None, data: PreparedDataset, found: DatasetStatus, training: TrainingSpec
) -> WorkStatus | None:
    """The operations of the planned run; None if it is not known how many weights a token is multiplied by.

    `parameters`: of the model; None if unknown, or if each token uses some of them only (a mixture of experts).
    """
    if parameters is None:
        return None
    schedule = Schedule.of(len(data), training, data.epoch_offsets)
    tokens = round(found.tokens * schedule.epoch(schedule.total_steps))
    return WorkStatus(parameters=parameters, tokens=tokens, flops=training_flops(parameters, tokens, training))
