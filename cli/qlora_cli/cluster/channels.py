"""The commands about channels: `qlora promote`, `qlora rollback` and `qlora channels`."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qlora_api.channel import DEFAULT_CONFIG_MAP, Channel, ServedChannel, ServedProblem, channel_key
from qlora_api.printable import one_line
from qlora_cli.channel_record import Record, decode, encode
from qlora_cli.cluster.connection import note, promoted_job, with_cluster
from qlora_cli.output import as_json, as_yaml, fail
from qlora_client.channels.config_map import ChannelMap, read_channel_map, write_record
from qlora_client.channels.promotion import Place, promoted, require_promotable, rolled_back
from qlora_client.channels.servers import find_served, read_served, wait_for_server
from qlora_client.jobs.job import Job
from qlora_client.kube.cluster import Cluster
from qlora_client.kube.errors import ClusterError
from qlora_client.kube.resources import JOBS
from qlora_client.waiting import Clock
from qlora_trainer.publishing.signing import PrivateKey, read_private_key

_SHORT = 12
"""Hexadecimal digits of a digest in a table."""
_ANY_WIDTH = 10_000
"""For a file or a pipe, where nothing may be cut."""


def _parse_channel(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        channel_key(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    return value


def _read_key(_context: click.Context, _parameter: click.Parameter, value: Path | None) -> PrivateKey | None:
    try:
        return None if value is None else read_private_key(value.read_bytes())
    except (ValueError, OSError) as error:
        raise click.BadParameter(f"{value}: {error}") from None


_channel = click.argument("channel", metavar="NAME@CHANNEL", callback=_parse_channel)
_config_map = click.option(
    "--config-map",
    default=DEFAULT_CONFIG_MAP,
    show_default=True,
    metavar="NAME",
    help="ConfigMap with the records of the channels.",
)
_servers = click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="URL",
    help="vLLM server with the plugin, such as http://llama; may be repeated. Its API key is read from VLLM_API_KEY.",
)
_key = click.option(
    "--key",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    callback=_read_key,
    metavar="FILE",
    help="Private key (PEM) that signs the record. Servers with a key for channels reject an unsigned one.",
)
_timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="Time to wait for each --server.",
)


@click.command()
@promoted_job
@_channel
@click.option(
    "--percent",
    type=click.IntRange(1, 99),
    metavar="N",
    help="Share of conversations for the adapter; the one before answers the others. All if not set.",
)
@click.option("--no-gate", is_flag=True, help="Also promote a job that has no spec.gate.")
@_config_map
@_key
@_servers
@_timeout
@with_cluster
def promote(cluster: Cluster, job: str, percent: int | None, no_gate: bool, **options: Any) -> None:
    """Lead a channel, such as support-bot@prod, to the adapter of JOB.

    The job must have succeeded with its gate passed, and the adapter's lineage must be signed. The record of the
    channel is in a ConfigMap of the namespace, which servers follow. With --server, the command ends once each server
    has switched, and fails if one does not.
    """
    adapter = require_promotable(Job(cluster.get(JOBS, job)), needs_gate=not no_gate)
    _move(cluster, lambda place: promoted(place, adapter, percent, datetime.now(UTC)), **options)


@click.command()
@_channel
@_config_map
@_key
@_servers
@_timeout
@with_cluster
def rollback(cluster: Cluster, **options: Any) -> None:
    """Lead a channel back to the adapter before, also from a share of conversations.

    A second rollback leads one further back.
    """
    _move(cluster, lambda place: rolled_back(place, datetime.now(UTC)), **options)


def _move(
    cluster: Cluster,
    decide: Callable[[Place], Channel],
    *,
    channel: str,
    config_map: str,
    key: PrivateKey | None,
    servers: tuple[str, ...],
    timeout: float,
) -> None:
    """Write the channel's next record, and wait for the servers."""
    found = read_channel_map(cluster, config_map)
    place = _place(cluster.namespace, channel, found, key)
    moved = decide(place)
    if moved == place.current:
        click.echo(f"{channel} leads to {_described(moved)} already")
    else:
        write_record(cluster, found, channel_key(channel), encode(moved, key))
        click.echo(f"{channel} leads to {_described(moved)}")
    for url in servers:
        try:
            wait_for_server(url, _api_key(), moved, timeout, Clock(time.sleep, time.monotonic))
        except ClusterError as error:
            hint = f"; roll back with: qlora rollback {channel} --namespace {moved.namespace}" if moved.previous else ""
            fail(one_line(f"{url} does not serve promotion {moved.sequence} of {channel}: {error}{hint}"))
        click.echo(f"{url} serves it")


def _place(namespace: str, channel: str, found: ChannelMap, private: PrivateKey | None) -> Place:
    """Return the channel before the move, without the adapters of a record that the key has not signed.

    Otherwise a user who may write the ConfigMap, but has no key, could get a signature for any earlier adapter.
    """
    key = channel_key(channel)
    if key not in found.records:
        return Place(namespace, channel)
    try:
        record = decode(found.records[key], namespace, key)
    except ValueError as error:
        fail(f"{key} of the ConfigMap {found.name} is no record of {channel}: {one_line(str(error))}: remove it")
    if private is None and record.bundle is not None:
        fail(f"the record of {channel} is signed: pass the private key with --key, because servers may reject another")
    is_trusted = private is None or record.is_signed_by(private.public_key())
    if not is_trusted:
        note(f"The record of {channel} is not signed with this key: its earlier adapters are dropped.")
    return Place(namespace, channel, record.channel.sequence, record.channel if is_trusted else None)


def _described(channel: Channel) -> str:
    share = "" if channel.percent is None else f" for {channel.percent}% of conversations"
    return f"{channel.name_of(channel.adapter)}{share} (promotion {channel.sequence})"


def _api_key() -> str | None:
    return os.environ.get("VLLM_API_KEY")


@click.command("channels")
@_config_map
@_servers
@click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Output format, instead of a table.")
@with_cluster
def list_channels(cluster: Cluster, config_map: str, servers: tuple[str, ...], output: str | None) -> None:
    """Show the channels of the namespace and the adapters that they lead to, and with --server what each serves.

    Signatures are not verified: the servers do that.
    """
    records = list(_records(cluster.namespace, read_channel_map(cluster, config_map)))
    served = {url: _served(url, [record.channel for record in records]) for url in servers}
    if output is not None:
        items = [
            record.channel.dump()
            | {"signed": record.bundle is not None}
            | {"servers": {url: channels[index].dump() for url, channels in served.items()}}
            for index, record in enumerate(records)
        ]
        click.echo(as_json({"items": items}) if output == "json" else as_yaml({"items": items}), nl=False)
    elif not records:
        note(f"No channels found in the ConfigMap {config_map} of the namespace {cluster.namespace}.")
    else:
        # URLs and reasons may have brackets.
        console = Console(emoji=False, highlight=False, markup=False)
        if not console.is_terminal:
            console.width = _ANY_WIDTH
        console.print(_table(records, served))


def _records(namespace: str, found: ChannelMap) -> Iterator[Record]:
    """Decode the records of the ConfigMap, with a warning for each value that is none."""
    for key, text in sorted(found.records.items()):
        try:
            yield decode(text, namespace, key)
        except ValueError as error:
            note(f"Warning: {key} of the ConfigMap {found.name} is no record of a channel: {error}")


def _served(url: str, channels: Sequence[Channel]) -> Sequence[ServedChannel]:
    """Ask the server about each channel; why it gives no answer is a problem of each."""
    reason = "it has not seen the record"
    try:
        served = read_served(url, _api_key())
    except ClusterError as error:
        served, reason = (), str(error)
    missing = [ServedChannel(name=each.full_name, problem=ServedProblem(reason=reason)) for each in channels]
    return [find_served(served, each) or other for each, other in zip(channels, missing, strict=True)]


def _table(records: Sequence[Record], served: Mapping[str, Sequence[ServedChannel]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("Channel", "Job", "Digest", "Share", "Promotion", "Promoted at", "Signed", *served):
        table.add_column(title)
    for index, record in enumerate(records):
        channel = record.channel
        table.add_row(
            channel.name,
            one_line(channel.adapter.job),
            channel.adapter.sha256[:_SHORT],
            "100%" if channel.percent is None else f"{channel.percent}%",
            str(channel.sequence),
            one_line(channel.promoted_at),
            "no" if record.bundle is None else "yes",
            *(_cell(channels[index]) for channels in served.values()),
        )
    return table


def _cell(found: ServedChannel) -> str:
    """The digest that a server serves, and its problem."""
    digest = (found.adapter or "-").rpartition(":")[2][:_SHORT]
    return one_line(digest if found.problem is None else f"{digest} ({found.problem.reason})")
