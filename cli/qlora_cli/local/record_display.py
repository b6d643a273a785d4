"""Shows a local run to programs: the records of its steps as they are, a line of JSON each, as pods print them."""

from pathlib import Path

import click

from qlora_api.contract import ProgressRecord, ResultRecord, encode_record
from qlora_api.status import StepName


class RecordDisplay:
    """Prints to standard output."""

    def begin(self, step: StepName) -> None:
        """Nothing: the first record of the step says that it runs."""

    def progress(self, record: ProgressRecord) -> None:
        """Print the record."""
        click.echo(encode_record(record))

    def end(self, step: StepName, result: ResultRecord | None, exit_code: int) -> None:
        """Print the result; of a step that has left none, the exit code to standard error."""
        if result is None:
            click.echo(f"{step} has ended with exit code {exit_code} and without a result", err=True)
        else:
            click.echo(encode_record(result))

    def not_trained(self, log: Path) -> None:
        """Nothing: the result of the process that has trained the jobs says it."""

    def stopping(self, *, again: bool) -> None:
        """Nothing: the result of the step says it."""
