"""Shows all that is known of a job or sweep before it is applied."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from qlora_api.choice import Choice
from qlora_api.sweep.spec import QLoRASweepDocument
from qlora_cli.local.forecast import Epoch, GpuOfPlan, show_forecast
from qlora_cli.local.plan import make_plan, show_plan
from qlora_cli.local.plan_sweep import make_sweep_plan, show_sweep_plan
from qlora_cli.local.rows import CountedRows, RowAccess, counted_rows, show_lengths
from qlora_cli.manifest import Document
from qlora_trainer.steps.planned import assume_settings, find_traits


def show_whole_plan(
    document: Document, config: Path, gpu: GpuOfPlan, access: RowAccess | None, tokens: int | None, console: Console
) -> int:
    """Print the memory, rows, steps and time, and return the exit code of the verdict.

    `access`: to the rows, to count them. `tokens`: of an epoch. Raises StepFailure.
    """
    spec = document.spec.template.spec if isinstance(document, QLoRASweepDocument) else document.spec
    with ExitStack() as files:
        counted: CountedRows | None = None
        if access is not None:
            context = find_traits(config, spec.lora).context_for(spec.training)
            counted = files.enter_context(counted_rows(spec, access, context))
        choose = assume_settings if counted is None or counted.examined.rejection else counted.choose
        if isinstance(document, QLoRASweepDocument):
            sweep = make_sweep_plan(document, config, gpu.gib, choose=choose)
            show_sweep_plan(sweep, console)
            if counted is not None:
                show_lengths(spec, counted, console)
            return sweep.exit_code
        made = make_plan(document.metadata.name, spec, config, gpu.gib, choose=choose)
        show_plan(made, console)
        epoch = Epoch(tokens)
        if counted is not None:
            show_lengths(spec, counted, console)
            if counted.examined.rejection:
                return made.exit_code
            found = counted.epoch(made.spec.training, packed=made.traits.packs(made.spec.training))
            epoch = Epoch(tokens or found.tokens, found.sequences)
        show_settings(made.settings, console)
        show_forecast(made, epoch, gpu, console)
        return made.exit_code


def show_settings(settings: Iterable[Choice], console: Console) -> None:
    """Print the chosen settings with their reasons."""
    chosen = tuple(settings)
    if not chosen:
        return
    name, value = (max(len(getattr(each, field)) for each in chosen) for field in ("setting", "value"))
    console.print("\n[bold]Automatic settings[/]: set one in the spec, and the others follow it.")
    for each in chosen:
        line = f"  {each.setting:{name}}  {each.value:{value}}  {each.reason}".rstrip()
        console.print(line, highlight=False, markup=False, soft_wrap=True)
