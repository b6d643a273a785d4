"""`qlora submit`: creates a job from a file, or from options without one."""

import secrets
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
from rich.console import Console

from qlora_api.contract import ExitCode
from qlora_api.spec.job import QLoRAJobDocument
from qlora_api.sweep.spec import SWEEP_KIND
from qlora_cli.cluster.connection import Connection, with_connection
from qlora_cli.cluster.job_options import OptionError, given, job_of, with_job_options
from qlora_cli.cluster.watch import watch_job
from qlora_cli.local import shared_options
from qlora_cli.manifest import ManifestError, load_object
from qlora_cli.output import as_json, as_yaml, fail
from qlora_client.kube.cluster import Cluster, Object
from qlora_client.kube.resources import JOBS, SWEEPS

_STANDARD_INPUT = Path("/dev/stdin")


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option(
    "-f",
    "--filename",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Manifest to create, as in `kubectl create -f`.",
)
@with_job_options
@shared_options.volume
@shared_options.config_map
@click.option("--watch", is_flag=True, help="Show its progress until it has ended; exits with the code of its step.")
@click.option("--dry-run", type=click.Choice(["client", "server"]), help="Validate only, on the client or the server.")
@click.option(
    "-o", "--output", type=click.Choice(["name", "yaml", "json"]), help="Output format, instead of a sentence."
)
@with_connection
def submit(
    connection: Connection,
    file: Path | None,
    filename: Path | None,
    name: str | None,
    watch: bool,
    dry_run: Literal["client", "server"] | None,
    output: str | None,
    claims: dict[str, Path],
    config_maps: dict[str, Path],
    **values: Any,
) -> None:
    """Create the QLoRAJob or QLoRASweep in FILE, or without one the job that the options describe.

    FILE may be - for standard input. With --dry-run=client nothing is sent, and -o yaml prints the manifest to start a
    file with. Of a job that leaves settings open, it prints those that prepare will choose, if --volume and
    --config-map give folders with the rows.
    """
    body = _job(file or filename, name, values)
    if watch and (dry_run is not None or body["kind"] == SWEEP_KIND):
        raise click.UsageError("--watch shows a job that is created: leave it out for a dry run or a sweep")
    show_prospect = partial(_show_prospect, body, claims, config_maps, quiet=output is not None)
    if dry_run == "client":
        _show(body, "created (dry run)", output)
        show_prospect()
        return
    cluster = _cluster(connection, body)
    kind = SWEEPS if body["kind"] == SWEEP_KIND else JOBS
    stored = cluster.create(kind, body, dry_run=dry_run == "server")
    _show(stored, "created" if dry_run is None else "created (server dry run)", output)
    show_prospect()
    if watch:
        sys.exit(watch_job(cluster, stored["metadata"]["name"], Console(emoji=False, highlight=False)))


def _job(file: Path | None, name: str | None, values: dict[str, Any]) -> Object:
    """The job of the file or of the options, after the schema's checks."""
    try:
        if file is None:
            return job_of(name, values, secrets.token_hex(3))
        if needless := given({"name": name, **values}):
            raise click.UsageError(f"FILE has the whole job: remove {', '.join(needless)}, or change the file")
        return load_object(_STANDARD_INPUT if file == Path("-") else file)
    except (OptionError, ManifestError) as error:
        fail(str(error), ExitCode.BAD_CONFIGURATION)


def _cluster(connection: Connection, body: Object) -> Cluster:
    """The cluster, in the manifest's namespace if it names one."""
    named = body["metadata"].get("namespace")
    cluster = connection.open(named)
    if named is not None and named != cluster.namespace:
        fail(f"--namespace is {cluster.namespace}, and the manifest names the namespace {named}: leave one of them out")
    return cluster


def _show_prospect(body: Object, claims: Mapping[str, Path], config_maps: Mapping[str, Path], *, quiet: bool) -> None:
    """Print what prepare will choose for a job, unless the output is for a program."""
    if quiet or body["kind"] == SWEEP_KIND:
        return
    # It takes a second to import.
    from qlora_cli.local.prospect import show_prospect

    # A script reads the first line only.
    console = Console(emoji=False, stderr=True)
    show_prospect(QLoRAJobDocument.model_validate(body), claims, config_maps, console)


def _show(body: Object, done: str, output: str | None) -> None:
    name = f"{body['kind'].lower()}.qlora.dev/{body['metadata']['name']}"
    if output in ("yaml", "json"):
        click.echo(as_yaml(body) if output == "yaml" else as_json(body), nl=False)
    else:
        click.echo(name if output == "name" else f"{name} {done}")
