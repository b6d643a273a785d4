"""Says in prepare what a user should know of the run that the prepared rows will make."""

import logging
from pathlib import Path

from qlora_api.training import TrainingSpec
from qlora_trainer.data.prepared import PreparedDataset
from qlora_trainer.training.evaluations import too_few_evaluations
from qlora_trainer.training.schedule import Schedule

logger = logging.getLogger(__name__)


def remarks_on_evaluations(training: TrainingSpec, data_folder: Path) -> tuple[str, ...]:
    """What is to be said of the run's evaluations, which is logged too; nothing if all is well."""
    data = PreparedDataset.open(data_folder, "train")
    remark = too_few_evaluations(training, Schedule.of(len(data), training, data.epoch_offsets).total_steps)
    if remark is None:
        return ()
    logger.warning("%s", remark)
    return (remark,)
