"""Shared by the commands that read a cluster: its options, completion of job names, and errors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import click

from qlora_api.printable import one_line
from qlora_cli.output import fail
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError
from qlora_client.kube.resources import JOBS


def note(text: str) -> None:
    """Print progress, such as the reason for waiting, to standard error."""
    click.echo(one_line(text), err=True)


@dataclass(frozen=True)
class Connection:
    """How to reach the cluster that a command's options name."""

    context: str | None
    namespace: str | None
    """The value of the option."""
    kubeconfig: str | None

    def open(self, namespace: str | None = None) -> Cluster:
        """The cluster; `namespace` is the default of the option."""
        return Cluster.connect(
            context=self.context,
            namespace=self.namespace or namespace,
            kubeconfig=self.kubeconfig,
            warn=lambda text: note(f"Warning: {text}"),
        )


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command kubectl's options for the cluster, and as first argument the Connection that they describe.

    A ClusterError ends the command with its message.
    """

    @click.option("-n", "--namespace", metavar="NAME", help="Namespace; that of the context if not set.")
    @click.option("--context", metavar="NAME", help="Context of the kubeconfig; the current one if not set.")
    @click.option("--kubeconfig", metavar="FILE", help="Kubeconfig; as kubectl finds it if not set.")
    @wraps(command)
    def with_options(context: str | None, namespace: str | None, kubeconfig: str | None, **options: Any) -> None:
        try:
            command(Connection(context, namespace, kubeconfig), **options)
        except ClusterError as error:
            fail(one_line(str(error)))

    return with_options


def with_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the cluster as first argument, and kubectl's options for it."""

    @wraps(command)
    def connected(connection: Connection, **options: Any) -> None:
        command(connection.open(), **options)

    return with_connection(connected)


def _names_of_jobs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete jobs' names in the shell, without any if the cluster does not answer."""
    given = context.params
    try:
        cluster = Connection(given.get("context"), given.get("namespace"), given.get("kubeconfig")).open()
        names = [str(job["metadata"]["name"]) for job in cluster.find(JOBS)]
    except ClusterError:
        return []
    known = given.get(parameter.name or "") or ()
    return sorted(name for name in names if name.startswith(incomplete) and name not in known)


job_name = click.argument("name", shell_complete=_names_of_jobs)
promoted_job = click.argument("job", shell_complete=_names_of_jobs)
job_names = click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=_names_of_jobs)
