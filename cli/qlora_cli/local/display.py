"""Shows a local run: a progress bar on a terminal, a line per record elsewhere, or the records themselves."""

from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from qlora_api.contract import ProgressRecord, ResultRecord, encode_record
from qlora_api.duration import format_duration
from qlora_api.status import StepName

_DOING: dict[StepName, str] = {"prepare": "Preparing", "train": "Training", "publish": "Publishing"}


def progress_bar(console: Console) -> Progress:
    """A bar on a terminal for each job with a running step."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[details]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class ConsoleDisplay:
    """Draws on a console. `logs`: folder of the steps' logs, named when a step fails.

    Where several jobs run, each has a display with the `job`'s name, and they share a `bar`.
    """

    def __init__(self, console: Console, logs: Path, *, job: str = "", bar: Progress | None = None) -> None:
        self._console = console
        self._logs = logs
        self._job = f"{job}: " if job else ""
        self._bar = bar or progress_bar(console)
        self._task: TaskID | None = None
        self._printed = ""

    def begin(self, step: StepName) -> None:
        """Start the step's bar, without a total until the number of steps is known."""
        self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(escape(self._job) + _DOING[step], total=None, details="starting")

    def progress(self, record: ProgressRecord) -> None:
        """Move the bar; where there is no terminal, print a line."""
        details = describe(record)
        if self._task is not None:
            total = record.total_steps or None
            self._bar.update(self._task, total=total, completed=record.training_step, details=escape(details))
        line = f"{self._job}{record.step}: {details}"
        # A record of other news, such as a saved checkpoint, has the same figures.
        if not self._console.is_terminal and line != self._printed:
            self._console.print(line, markup=False, soft_wrap=True)
            self._printed = line

    def end(self, step: StepName, result: ResultRecord | None, exit_code: int) -> None:
        """Remove the bar and print the step's result."""
        self._remove_bar()
        if result is None:
            sign, text = "[red]✗[/]", f"ended with exit code {exit_code} and without a result; see {self._log(step)}"
        elif result.outcome == "succeeded":
            sign, text = "[green]✓[/]", result.message
        elif result.outcome == "interrupted":
            sign, text = "[yellow]■[/]", result.message
        else:
            sign, text = "[red]✗[/]", f"{result.reason}: {result.message} (log: {self._log(step)})"
        self._console.print(f"{sign} {escape(self._job)}{step}: {escape(text)}", highlight=False, soft_wrap=True)

    def not_trained(self, log: Path) -> None:
        """Remove the bar and print the path of the log."""
        self._remove_bar()
        text = f"training did not finish; see {log}. `--resume` continues from the latest checkpoint"
        self._console.print(f"[red]✗[/] {escape(self._job)}train: {escape(text)}", highlight=False, soft_wrap=True)

    def _remove_bar(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if not self._bar.tasks:
            self._bar.stop()

    def stopping(self, *, again: bool) -> None:
        """Print what is being stopped, and the effect of another Ctrl-C."""
        if again:
            self._console.print("Stopping immediately; steps after the last checkpoint are lost.")
        else:
            self._console.print("Stopping: training saves a checkpoint first. Ctrl-C again stops it immediately.")

    def _log(self, step: StepName) -> Path:
        return self._logs / f"{step}.log"


def describe(record: ProgressRecord) -> str:
    """Return the record in a line: `training 420/1000, loss 1.234, 850 tokens/s, ...`."""
    parts = [record.activity or record.step]
    if record.total_steps:
        parts[0] += f" {record.training_step}/{record.total_steps}"
    if record.loss is not None:
        parts.append(f"loss {record.loss:.3f}")
    if record.eval_loss is not None:
        parts.append(f"held-out {record.eval_loss:.3f}")
    if record.eval_accuracy is not None:
        parts.append(f"held-out accuracy {record.eval_accuracy:.0%}")
    if record.tokens_per_second is not None:
        parts.append(f"{record.tokens_per_second:.0f} tokens/s")
    if record.remaining_seconds:
        parts.append(f"{format_duration(record.remaining_seconds)} left")
    return ", ".join(parts)


class RecordDisplay:
    """Prints to standard output."""

    def begin(self, step: StepName) -> None:
        """Print nothing: the step's first record shows that it runs."""

    def progress(self, record: ProgressRecord) -> None:
        """Print the record."""
        click.echo(encode_record(record))

    def end(self, step: StepName, result: ResultRecord | None, exit_code: int) -> None:
        """Print the result, or to standard error the exit code of a step without one."""
        if result is None:
            click.echo(f"{step} has ended with exit code {exit_code} and without a result", err=True)
        else:
            click.echo(encode_record(result))

    def not_trained(self, log: Path) -> None:
        """Print nothing: the result of the process that trains the jobs has it."""

    def stopping(self, *, again: bool) -> None:
        """Print nothing: the step's result has it."""
