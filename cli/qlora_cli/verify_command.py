"""The command `verify`: its options, what it prints, and the code with which it exits."""

from pathlib import Path

import click

from qlora_api.contract import ExitCode
from qlora_cli.endings import fail
from qlora_cli.verify import NotVerified, shown, verify
from qlora_trainer.core.failures import StepFailure


@click.command("verify")
@click.argument("adapter")
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Public key (PEM) of the profile's signingKey. Without it only the sums are compared, with what anybody may "
    "have written.",
)
def verify_adapter(adapter: str, key: Path | None) -> None:
    """Check that the files of ADAPTER are those that its lineage states, and who has signed that.

    ADAPTER is a folder, or hf://, s3:// or oci:// as in status.adapter.uri, read with this machine's logins. Exits with
    15 if it is not what was published.
    """
    try:
        found = verify(adapter, key)
    except NotVerified as difference:
        fail(f"not verified: {difference}", ExitCode.UNSAFE_ARTIFACT)
    except StepFailure as failure:
        fail(failure.message, failure.exit_code)
    except (ValueError, OSError) as error:
        fail(str(error), ExitCode.BAD_CONFIGURATION)
    for line in shown(found):
        click.echo(line)
