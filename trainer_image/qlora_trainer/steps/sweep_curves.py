"""Leaves the curves of a run without `publish` on the page of its sweep."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from qlora_api.contract import ExitCode
from qlora_trainer.core.context import StepContext
from qlora_trainer.core.failures import Interrupted, StepFailure

logger = logging.getLogger(__name__)


@contextmanager
def leaving_curves(context: StepContext) -> Iterator[None]:
    """On the page, if the job is a cell whose training, in the body, diverges or may have been stopped by its sweep.

    For the main process only. How the body ends is not changed, also if the page cannot be written.
    """
    try:
        yield
    except Interrupted:
        # Without rungs no sweep stops a cell: it is suspended or moved, and continues.
        if context.rungs:
            _leave(context, diverged=False)
        raise
    except StepFailure as failure:
        if failure.exit_code is ExitCode.DIVERGED:
            _leave(context, diverged=True)
        raise


def _leave(context: StepContext, *, diverged: bool) -> None:
    if context.mounts.sweep is None:
        return
    # With what draws: only a cell that ends like this needs it in train.
    from qlora_trainer.report.sweep_page import add_unfinished_to_sweep_report

    try:
        add_unfinished_to_sweep_report(
            context.document.metadata.name,
            context.spec,
            context.workspace.report,
            context.mounts.sweep,
            diverged=diverged,
        )
    except (OSError, ValueError) as error:
        # How the run ended must be what the step reports.
        logger.warning("the report of the sweep cannot be written: %s", error)
