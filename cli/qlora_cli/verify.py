"""`qlora verify`: shows what an adapter was verified to be, or why it does not verify."""

from collections.abc import Iterator
from pathlib import Path

import click

from qlora_api.contract import ExitCode
from qlora_api.printable import one_line
from qlora_cli.output import fail
from qlora_cli.verification import NotVerified, Verified, verify
from qlora_trainer.core.failures import StepFailure


def shown(found: Verified) -> Iterator[str]:
    """The verified facts, as lines for the terminal."""
    lineage, result = found.lineage, found.lineage.result
    signature = "of the given key" if found.by_key else "not checked, so any user may have written this; pass --key"
    losses = f"{result.loss:.4f} in training"
    if result.initial_eval_loss is not None and result.eval_loss is not None:
        losses += f", {result.initial_eval_loss:.4f} before and {result.eval_loss:.4f} after on held-out rows"
    lines = {
        "Signature": signature,
        "Files": f"{len(found.files)}, each with the SHA-256 that is stated",
        "Job": f"{lineage.job.name} in {lineage.job.namespace} ({lineage.job.uid})",
        "Base": f"{lineage.base.source}, {lineage.base.revision}",
        "Data": f"{', '.join(lineage.data.sources)}, SHA-256 {lineage.data.sha256}",
        "Trainer": lineage.trainer.image or "on a laptop",
        "Loss": losses,
    }
    for name, value in lines.items():
        yield f"{name + ':':<11}{one_line(value)}"


@click.command("verify")
@click.argument("adapter")
@click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Public key (PEM) of the profile's signingKey. Without it only checksums are compared, with an "
    "unverified list.",
)
def verify_adapter(adapter: str, key: Path | None) -> None:
    """Check the files of ADAPTER against its lineage, and the lineage's signature.

    ADAPTER is a folder, or hf://, s3:// or oci:// as in status.adapter.uri, read with this machine's logins. Exits with
    15 if it differs from the published adapter.
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
