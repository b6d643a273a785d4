"""Leaves the curves of a run without `publish` on the page of its sweep."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_api.contract import ExitCode
from qlora_trainer.core.failures import Interrupted, StepFailure
from qlora_trainer.training.prepared_job import PreparedJob

logger = logging.getLogger(__name__)


@contextmanager
def leaving_curves(job: PreparedJob, sweep: Path | None) -> Iterator[None]:
    """Add the curves of a cell whose training, in the body, diverges or may have been stopped by its sweep.

    For the main process only. How the body ends is not changed, also if the page cannot be written.
    """
    try:
        yield
    except Interrupted:
        # Without rungs no sweep stops a cell: it is suspended or moved, and goes on.
        if job.rungs:
            _leave(job, sweep, diverged=False)
        raise
    except StepFailure as failure:
        if failure.exit_code is ExitCode.DIVERGED:
            _leave(job, sweep, diverged=True)
        raise


def _leave(job: PreparedJob, sweep: Path | None, *, diverged: bool) -> None:
    if sweep is None:
        return
    # With what draws: only a cell that ends like this needs it in train.
    from qlora_trainer.report.sweep_page import add_unfinished_to_sweep_report

    try:
        add_unfinished_to_sweep_report(job.name, job.spec, job.workspace.report, sweep, diverged=diverged)
    except (OSError, ValueError) as error:
        # How the run ended must be what the step reports.
        logger.warning("the report of the sweep cannot be written: %s", error)
