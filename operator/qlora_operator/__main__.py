"""Starts the operator: `python -m qlora_operator --settings FILE`."""

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from qlora_operator.cluster import Cluster, ClusterError, NotFoundError, connect
from qlora_operator.handlers import Hooks, watch
from qlora_operator.logs import configure_logging
from qlora_operator.metrics import Metrics
from qlora_operator.progress import ProgressReader
from qlora_operator.reconcile import Reconciler
from qlora_operator.resync import Resync
from qlora_operator.settings import ENV_SETTINGS, Settings, SettingsError, find_settings, load_settings
from qlora_operator.starts import Starts
from qlora_operator.workqueue import WorkQueue

logger = logging.getLogger("qlora_operator")

CLUSTER_UNUSABLE = 1
BAD_SETTINGS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal. Returns the exit status: 0 after a signal, 1 without a usable cluster, 2 for bad settings."""
    parser = argparse.ArgumentParser(prog="qlora-operator", description="Runs QLoRAJobs on Kubernetes.")
    parser.add_argument(
        "--settings", type=Path, help=f"file with the settings, in YAML; by default the one that {ENV_SETTINGS} names"
    )
    try:
        settings = load_settings(find_settings(parser.parse_args(arguments).settings))
    except SettingsError as error:
        print(f"qlora-operator: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return BAD_SETTINGS
    configure_logging(settings.log_level)
    try:
        asyncio.run(_connect_and_run(settings))
    except NotFoundError as error:
        logger.critical("the cluster does not know QLoRAJob, install its CustomResourceDefinition: %s", error)
        return CLUSTER_UNUSABLE
    except ClusterError as error:
        logger.critical("the cluster cannot be used: %s", error)
        return CLUSTER_UNUSABLE
    return 0


async def _connect_and_run(settings: Settings) -> None:
    async with connect() as cluster:
        await _run(settings, cluster)


def _progress_reader(settings: Settings, cluster: Cluster) -> ProgressReader | None:
    if not settings.progress.enabled:
        return None
    return ProgressReader(cluster.read_log, time.monotonic, concurrent=max(1, settings.workers // 2))


async def _run(settings: Settings, cluster: Cluster) -> None:
    metrics = Metrics()
    reconciler = Reconciler(
        cluster=cluster,
        profiles=settings.profiles,
        progress=_progress_reader(settings, cluster),
        metrics=metrics,
        clock=lambda: datetime.now(UTC),
        starts=Starts(cluster.list_qlora_jobs, lambda key: queue.add(key), time.monotonic),
    )
    queue = WorkQueue(
        reconciler.reconcile,
        monotonic=time.monotonic,
        workers=settings.workers,
        on_error=metrics.reconcile_errors.inc,
    )
    resync = Resync(cluster, settings.namespaces, queue.add, interval=settings.resync_seconds, monotonic=time.monotonic)
    await resync.once()
    metrics.serve(settings.metrics_port, lambda: queue.depth)
    hooks = Hooks(queue.add, resync.monitor, metrics.job_is_in, resync.problem)
    where = ", ".join(settings.namespaces) or "all namespaces"
    logger.info("watching %s; profiles: %s", where, ", ".join(sorted(settings.profiles)))
    async with asyncio.TaskGroup() as group:
        background = [group.create_task(queue.run()), group.create_task(resync.run())]
        await watch(settings, hooks)
        for task in background:
            task.cancel()


if __name__ == "__main__":
    sys.exit(main())
