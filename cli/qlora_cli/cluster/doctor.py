"""`qlora doctor`: checks whether a cluster is ready for QLoRAJobs, and reports a fix for each finding."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora_cli.cluster.connection import with_cluster
from qlora_cli.output import as_json, as_yaml
from qlora_client.doctor.facts import Check, Verdict
from qlora_client.doctor.gathering import examine, gather
from qlora_client.kube.cluster import Cluster

_COLORS: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "problem": "red bold", "unknown": "dim"}
_PLURALS: dict[Verdict, str] = {"warning": "warnings", "problem": "problems"}
_ANY_WIDTH = 10_000
"""For a file or a pipe, where nothing may be cut."""


@click.command()
@click.option(
    "--operator-namespace",
    default="qlora-system",
    show_default=True,
    metavar="NAME",
    help="Namespace of the operator; used if you may not list Deployments of all namespaces.",
)
@click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Output format, instead of a table.")
@with_cluster
def doctor(cluster: Cluster, operator_namespace: str, output: str | None) -> None:
    """Check whether the cluster and the namespace are ready for jobs, and report each problem with a fix.

    It changes nothing and uses your rights only: a check that takes a right that you lack is `unknown` and names the
    rule. Exits with 1 if there is a problem.
    """
    checks = examine(gather(cluster, operator_namespace))
    found = any(check.verdict == "problem" for check in checks)
    if output is not None:
        listed = {"ready": not found, "checks": [asdict(check) for check in checks]}
        click.echo(as_json(listed) if output == "json" else as_yaml(listed), nl=False)
    else:
        _show(checks)
    sys.exit(1 if found else 0)


def _show(checks: Sequence[Check]) -> None:
    console = Console(emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _ANY_WIDTH
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row(Text(check.verdict, style=_COLORS[check.verdict]), Text(check.name), Text(check.message))
    console.print(table)
    counts = ", ".join(
        f"{count} {_PLURALS.get(verdict, verdict) if count > 1 else verdict}"
        for verdict in _COLORS
        if (count := sum(check.verdict == verdict for check in checks))
    )
    console.print(f"\n{counts}")
