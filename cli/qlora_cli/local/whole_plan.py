"""Shows all that is known of a job or sweep before it is applied."""

from pathlib import Path

from rich.console import Console

from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.local.forecast import Epoch, GpuOfPlan, show_forecast
from qlora_cli.local.plan import make_plan, show_plan
from qlora_cli.local.plan_sweep import make_sweep_plan, show_sweep_plan
from qlora_cli.local.rows import RowAccess, show_lengths
from qlora_cli.manifest import Document


def show_whole_plan(
    document: Document, config: Path, gpu: GpuOfPlan, access: RowAccess | None, tokens: int | None, console: Console
) -> int:
    """Print the memory, rows, steps and time, and return the exit code of the verdict.

    `access`: to the rows, to count them. `tokens`: of an epoch. Raises StepFailure.
    """
    if isinstance(document, QLoRASweepDocument):
        sweep = make_sweep_plan(document, config, gpu.gib)
        show_sweep_plan(sweep, console)
        if access is not None:
            show_lengths(document.spec.template.spec, access, console)
        return sweep.exit_code
    spec = document.spec
    made = make_plan(document.metadata.name, spec, config, gpu.gib)
    show_plan(made, console)
    epoch = Epoch(tokens)
    if access is not None:
        counted = show_lengths(spec, access, console, packed=made.traits.packs(spec.training))
        epoch = Epoch(tokens or counted.tokens, counted.sequences)
    show_forecast(made, spec, epoch, gpu, console)
    return made.exit_code
