"""Shows the settings that prepare will choose for a job, and its steps, when it is submitted."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from qlora_api.printable import first_line
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.spec.resolved import open_settings, resolve
from qlora_cli.local.given import Given
from qlora_cli.local.quiet import quiet_libraries
from qlora_trainer.core.failures import StepFailure

_NOT_THE_ADAPTER = frozenset({"training.autoMicroBatch", "training.gradientCheckpointing"})
"""Settings that the result does not depend on."""


def show_prospect(
    document: QLoRAJobDocument, claims: Mapping[str, Path], config_maps: Mapping[str, Path], console: Console
) -> None:
    """Print what prepare will choose from the rows and the steps that follow, if rows and model are on this machine.

    `claims` and `config_maps`: folders with their content. Rows elsewhere may take long to read.
    """
    left_open = open_settings(document.spec)
    if not left_open - _NOT_THE_ADAPTER:
        return
    given = Given(document, claims, config_maps)
    try:
        reason = _show_choices(given, console) if claims or config_maps else "`qlora plan --data` reads the rows"
    except StepFailure as failure:
        reason = failure.message
    except (OSError, ValueError) as error:
        reason = first_line(error)
    if reason:
        are = "setting is" if len(left_open) == 1 else "settings are"
        console.print(
            f"{len(left_open)} {are} automatic: prepare chooses by the rows, and status.settings has the values. They "
            f"are not known yet: {reason}.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _show_choices(given: Given, console: Console) -> str:
    """Print the choices and the steps, or return why they are not known here. Raises StepFailure."""
    # These load libraries that many installations of the client lack.
    from qlora_cli.local.automatic_settings import show_settings
    from qlora_cli.local.forecast import show_steps
    from qlora_cli.local.plan import find_config, show_remark
    from qlora_cli.local.rows import RowAccess, counted_rows
    from qlora_cli.local.run import missing_data
    from qlora_trainer.steps.planned import check_config

    if missing := missing_data(given.spec, given.claims, given.config_maps):
        return missing[0]
    if find_spec("torch") is None:
        return "the trainer is not installed"
    quiet_libraries()
    found = find_config(given.spec.model, given.mounts)
    show_remark(found.remark, console)
    traits = check_config(found.path, given.spec)
    context = traits.context_for(given.spec.training)
    with counted_rows(given.spec, RowAccess(given.spec, given.mounts), context) as counted:
        settings = counted.choose(given.spec, traits)
        resolved = resolve(given.spec, settings)
        epoch = counted.epoch(resolved.training, packed=traits.packs(resolved.training))
    show_settings(settings, console)
    show_steps(resolved, epoch, traits, console)
    return ""
