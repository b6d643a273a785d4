"""Shows all that is known of a job or sweep before it is applied."""

from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.local.automatic_settings import show_cells, show_settings
from qlora_cli.local.forecast import Epoch, GpuOfPlan, show_forecast
from qlora_cli.local.plan import make_plan, show_plan
from qlora_cli.local.plan_sweep import make_sweep_plan, show_sweep_plan
from qlora_cli.local.rows import RowAccess, RowCounts, show_lengths
from qlora_cli.manifest import Document
from qlora_trainer.steps.planned import assume_settings


def show_whole_plan(
    document: Document, config: Path, gpu: GpuOfPlan, access: RowAccess | None, tokens: int | None, console: Console
) -> int:
    """Print the memory, rows, steps and time, and return the exit code of the verdict.

    `access`: to the rows, to count them. `tokens`: of an epoch. Raises StepFailure.
    """
    with ExitStack() as files:
        counts = None if access is None else RowCounts(access, files)
        choose = assume_settings if counts is None else counts.choose
        if isinstance(document, QLoRASweepDocument):
            sweep = make_sweep_plan(document, config, gpu.gib, choose=choose)
            show_sweep_plan(sweep, console)
            if counts is not None:
                show_cells(sweep, counts, console)
            return sweep.exit_code
        made = make_plan(document.metadata.name, document.spec, config, gpu.gib, choose=choose)
        show_plan(made, console)
        epoch = Epoch(tokens)
        if counts is not None:
            counted = counts.of(document.spec, made.traits)
            show_lengths(document.spec, counted, console)
            if counted.examined.rejection:
                return made.exit_code
            found = counted.epoch(made.spec.training, packed=made.traits.packs(made.spec.training))
            epoch = Epoch(tokens or found.tokens, found.sequences)
        show_settings(made.settings, console)
        show_forecast(made, epoch, gpu, console)
        return made.exit_code
