"""Defines the program `qlora`, also `kubectl qlora`. A command's module is imported when it is used."""

import importlib
from typing import Any, NoReturn, cast

import click
from click.shell_completion import CompletionItem

_COMMANDS = {
    "submit": ("cluster.submit:submit", "Create a job from a file, or from options without one."),
    "list": ("cluster.listing:list_jobs", "Show jobs: phase, progress, loss, time left, recoveries and GPU hours."),
    "watch": ("cluster.watch:watch", "Show a job's progress, its loss curve and its events until it has ended."),
    "logs": ("cluster.watch:logs", "Print the logs of a job's pods, with records as sentences."),
    "suspend": (
        "cluster.control:suspend",
        "Stop jobs at a checkpoint and free their GPUs; `resume` continues them.",
    ),
    "resume": ("cluster.control:resume", "Resume suspended jobs, from their checkpoints."),
    "retry": ("cluster.control:retry", "Retry failed jobs at the step that failed, from their last checkpoints."),
    "cancel": (
        "cluster.control:cancel",
        "End a job for good; its checkpoints and prepared data are deleted.",
    ),
    "adapter": (
        "cluster.downloads:adapter",
        "Download a job's adapter, and verify it.",
    ),
    "report": ("cluster.downloads:report", "Save a job's report, and open it in the browser."),
    "compare": (
        "cluster.compare:compare",
        "Compare jobs: settings that differ, losses, time and GPU hours, and curves.",
    ),
    "promote": ("cluster.channels:promote", "Lead a channel, such as support-bot@prod, to a job's adapter."),
    "rollback": ("cluster.channels:rollback", "Lead a channel back to the adapter before."),
    "channels": ("cluster.channels:list_channels", "Show channels: adapters, shares, and what servers serve."),
    "verify": ("verify:verify_adapter", "Check an adapter against its lineage, and the lineage's signature."),
    "doctor": ("cluster.doctor:doctor", "Check whether the cluster and the namespace are ready for jobs."),
    "plan": ("local.commands:plan", "Show the GPU memory that a job needs, without a cluster."),
    "data": ("local.commands:data", "Show rows as the model sees them, without a cluster."),
    "run": ("local.commands:run", "Run a job on this machine."),
    "completion": (
        "completion:completion",
        "Print a script for shell completion of commands and jobs.",
    ),
}
"""By name, in the order of the help: the command's module, and a summary in one line."""

# The extra of the project with the libraries of a command.
_EXTRAS = {"verify": "cli,stores", "plan": "cli,trainer", "data": "cli,trainer", "run": "cli,trainer"}
_ASKS_A_CLUSTER = "cli,client"


def _explain_missing_library(command: str, error: ModuleNotFoundError) -> NoReturn:
    """Raise a ClickException with the library's extra, or the project's own error."""
    if error.name is None or error.name.startswith("qlora_"):
        raise error
    install = f"run `pip install '.[{_EXTRAS.get(command, _ASKS_A_CLUSTER)}]'` in a checkout of the repository"
    library = error.name.partition(".")[0]
    raise click.ClickException(f"`{command}` takes the library {library}, which is not installed: {install}") from None


class _Commands(click.Group):
    """Lists the commands without importing them: some take long to import."""

    def list_commands(self, context: click.Context) -> list[str]:
        """All names, in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Import and return the called command."""
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name][0].partition(":")
        try:
            return cast("click.Command", getattr(importlib.import_module(f"qlora_cli.{module}"), attribute))
        except ModuleNotFoundError as error:
            _explain_missing_library(name, error)

    def invoke(self, context: click.Context) -> Any:
        """Run the command; a library that it imports only now may be missing too."""
        try:
            return super().invoke(context)
        except ModuleNotFoundError as error:
            _explain_missing_library(context.invoked_subcommand or "", error)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """The commands and options of the program that begin so, for shell completion."""
        names = [
            CompletionItem(name, help=text) for name, (_, text) in _COMMANDS.items() if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, context, incomplete)]

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qlora-operator")
def main() -> None:
    """Fine-tune language models with QLoRAJobs, on a cluster or on this machine."""


def plugin() -> None:
    """Run the program as a plugin of kubectl, with that name in its help."""
    main(prog_name="kubectl qlora")


if __name__ == "__main__":
    main()
