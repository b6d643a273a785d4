"""Attaches resolver and channels to vLLM's API server, and closes the routes that load adapters without a check."""

import asyncio
import logging
import os
from argparse import Namespace
from functools import partial
from http import HTTPStatus
from math import isfinite, nan
from pathlib import Path
from uuid import uuid4

from fastapi import FastAPI, Response
from starlette.datastructures import State
from vllm import envs
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry
from vllm.sampling_params import SamplingParams

from qlora_vllm.cache import provide, remove_partials
from qlora_vllm.channels import SWITCH_SECONDS, Channels
from qlora_vllm.layout import DEFAULT_FOLDER, Layout
from qlora_vllm.middleware import ChannelNames
from qlora_vllm.resolver import Resolver
from qlora_vllm.served_base import BASE_REVISION, ServedBase, served_base

_LOG = logging.getLogger("vllm.qlora")


class VerifiedAdapters(LoRAResolver):
    """The resolver as vLLM calls it."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request of the verified adapter, or None, which vLLM answers with 404."""
        folder = await self._resolver.resolve(lora_name)
        if folder is None:
            return None
        # vLLM replaces the number.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder), base_model_name=base_model_name)


class Plugin:
    """An endpoint plugin, which vLLM loads only if VLLM_PLUGINS names it, in the process of the API server."""

    name = "qlora"
    # For any: a server without the plugin would load adapters without a check.
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Register resolver, channels and routes. Raises ValueError, which ends the server, for unsafe settings."""
        _require_settings()
        arguments = app.state.args
        layout = Layout(Path(os.environ.get("QLORA_FOLDER") or DEFAULT_FOLDER))
        base = served_base(arguments.model, arguments.revision, os.environ.get(BASE_REVISION))
        remove_partials(layout)
        self._resolver = Resolver(partial(provide, layout, base, arguments.max_lora_rank))
        self._channels = Channels(layout, self._try_adapter)
        LoRAResolverRegistry.register_resolver(self.name, VerifiedAdapters(self._resolver))
        app.add_middleware(ChannelNames, channels=self._channels)
        _attach_status(app, base, self._resolver, self._channels)

    async def init_state(self, engine_client: EngineClient, state: State, args: Namespace) -> None:
        """Reject loading by hand, and follow the channels, as long as the server runs."""
        self._engine, self._models = engine_client, state.openai_serving_models
        self._resolve_lora = self._models.resolve_lora
        # In place of the routes: SageMaker's, which are attached later, load adapters too.
        self._models.load_lora_adapter = self._models.unload_lora_adapter = _reject
        self._models.resolve_lora = self._resolve
        self._following = asyncio.create_task(self._channels.follow())
        self._following.add_done_callback(_log_end)

    async def _resolve(self, name: str) -> LoRARequest | ErrorResponse:
        """Resolve the name as vLLM does, and note if the engine cannot load the verified adapter."""
        found = await self._resolve_lora(name)
        if isinstance(found, ErrorResponse) and found.error.code == HTTPStatus.BAD_REQUEST:
            self._resolver.record(name, "failed", "vLLM cannot load it: its log has the reason")
        return found

    async def _try_adapter(self, name: str) -> str | None:
        """Load the adapter and answer one token with it. Returns why it cannot."""
        settings, logprobs = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1), [nan]
        try:
            if name not in self._models.lora_requests:
                # vLLM's own call waits for a part of this time only.
                await self._resolver.resolve(name, SWITCH_SECONDS)
            loaded = await self._resolve(name)
            if not isinstance(loaded, LoRARequest):
                outcome = self._resolver.outcomes.get(name)
                return str(loaded.error.message if outcome is None or outcome.reason is None else outcome.reason)
            async for answer in self._engine.generate("Hello", settings, f"qlora-{uuid4()}", lora_request=loaded):
                logprobs = [each.logprob for position in answer.outputs[0].logprobs or () for each in position.values()]
        # The engine raises errors of many kinds, and with any of them the old adapter continues to answer.
        except Exception as error:  # noqa: BLE001
            return f"its first request failed: {error!r:.500}"
        return None if all(map(isfinite, logprobs)) else "its answer to a first request has no probability"


def _require_settings() -> None:
    """Raise ValueError if vLLM would answer without the adapter that a request names, or with an unverified one."""
    if others := LoRAResolverRegistry.get_supported_resolvers() - {Plugin.name}:
        raise ValueError(f"set VLLM_PLUGINS to qlora only: {', '.join(others)} would load adapters without a check")
    if envs.VLLM_SERVER_DEV_MODE:
        raise ValueError("unset VLLM_SERVER_DEV_MODE: its routes change weights")
    if not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ValueError("set VLLM_ALLOW_RUNTIME_LORA_UPDATING to true: without it, vLLM resolves no adapter")
    if envs.VLLM_SKIP_MODEL_NAME_VALIDATION:
        raise ValueError("unset VLLM_SKIP_MODEL_NAME_VALIDATION: with it, the base answers for an adapter not served")


def _attach_status(app: FastAPI, base: ServedBase, resolver: Resolver, channels: Channels) -> None:
    """Add GET /qlora/ready for probes, and GET /v1/qlora/adapters, which needs the API key, if there is one."""

    @app.get("/qlora/ready")
    async def ready() -> Response:
        return Response(status_code=HTTPStatus.OK if channels.ready.is_set() else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/v1/qlora/adapters")
    async def adapters() -> dict[str, object]:
        served = {"sha256": base.sha256} if base.is_measured else {"revision": base.revision}
        outcomes = resolver.outcomes.items()
        named = [{"name": name, "served": each.reason is None, "reason": each.reason} for name, each in outcomes]
        listed = [channel.dump() for channel in channels.status()]
        return {"base": served | {"measured": base.is_measured}, "channels": listed, "adapters": named}


def _log_end(following: "asyncio.Task[None]") -> None:
    if not following.cancelled():
        _LOG.critical("channels are no longer followed: restart the server", exc_info=following.exception())


async def _reject(_: object) -> ErrorResponse:
    message = "this server loads verified adapters only, when a request names one"
    return create_error_response(message, "ForbiddenError", HTTPStatus.FORBIDDEN)
