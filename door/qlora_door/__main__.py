"""Starts the door: `python -m qlora_door --settings FILE`."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from aiohttp import web
from obstore.exceptions import BaseError
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from qlora_door.bucket import Bucket
from qlora_door.identity import Identify, Impersonation, PassedToken
from qlora_door.metrics import RequestMetrics
from qlora_door.server import Door
from qlora_door.settings import ENV_SETTINGS, DoorSettings
from qlora_operator.kube.connection import endpoint_of
from qlora_operator.kube.errors import ClusterError
from qlora_operator.kube.transport import open_transport
from qlora_operator.logs import configure_logging
from qlora_operator.probes import Answer, Health, PortError, listen, serving
from qlora_operator.settings import SettingsError, find_settings, read_settings

logger = logging.getLogger("qlora_door")

FAILED, BAD_SETTINGS = 1, 2
_SECONDS_TO_FINISH = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal.

    Returns the exit status: 0 after a signal, 1 after an error, 2 for bad settings.
    """
    parser = argparse.ArgumentParser(prog="qlora-door", description="OpenAI's fine-tuning API for QLoRAJobs.")
    parser.add_argument(
        "--settings", type=Path, help=f"file with the settings, in YAML; by default the one that {ENV_SETTINGS} names"
    )
    try:
        path = find_settings(parser.parse_args(arguments).settings, variable=ENV_SETTINGS)
        settings = read_settings(path, DoorSettings)
    except SettingsError as error:
        print(f"qlora-door: {error}", file=sys.stderr)  # noqa: T201 - the log is not configured yet
        return BAD_SETTINGS
    configure_logging(settings.log_level)
    try:
        asyncio.run(_serve(settings))
    except (ClusterError, PortError) as error:
        logger.critical("%s", error)
        return FAILED
    except BaseError as error:
        logger.critical("files.bucket cannot be opened: %s", error)
        return FAILED
    return 0


async def _serve(settings: DoorSettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    registry, health = CollectorRegistry(), Health()
    metrics = RequestMetrics(registry)
    ports = {settings.probe_port: {"/healthz": health.liveness, "/readyz": health.readiness}}
    ports.setdefault(settings.metrics_port, {})["/metrics"] = lambda: Answer(
        generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4
    )
    bucket = Bucket(settings.files.bucket) if settings.files.bucket is not None else None
    async with _identity(settings) as identify, serving(ports):
        door = Door(settings, identify, bucket, clock=lambda: datetime.now(UTC), on_answer=metrics.observe)
        runner = web.AppRunner(
            door.application(), handle_signals=False, access_log=None, shutdown_timeout=_SECONDS_TO_FINISH
        )
        await runner.setup()
        try:
            await web.SockSite(runner, listen(settings.port)).start()
            logger.info("serving %s on port %s", ", ".join(settings.models), settings.port)
            await stop.wait()
        finally:
            await runner.cleanup()


@asynccontextmanager
async def _identity(settings: DoorSettings) -> AsyncIterator[Identify]:
    """How users are identified. Raises ClusterError if that is not possible here."""
    passes_token = settings.identity == "token"
    # A certificate of the door's own would stand for every user.
    endpoint = await endpoint_of(has_certificate=not passes_token)
    async with open_transport(endpoint, "qlora-door") as transport:
        if passes_token:
            yield PassedToken(transport).identify
        else:
            impersonation = Impersonation(transport, settings.audience)
            await impersonation.check()
            yield impersonation.identify


if __name__ == "__main__":
    sys.exit(main())
