"""Attaches the resolver to vLLM's API server, and closes the routes that load adapters without a check."""

import os
from functools import partial
from pathlib import Path

from fastapi import FastAPI, HTTPException
from starlette.datastructures import State
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from qlora_vllm.cache import DEFAULT_FOLDER, Layout, provide, remove_partials
from qlora_vllm.resolver import Resolver
from qlora_vllm.served_base import BASE_REVISION, ServedBase, served_base


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
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Register the resolver and the routes. Raises ValueError, which ends the server, for a base of no name."""
        arguments = app.state.args
        layout = Layout(Path(os.environ.get("QLORA_FOLDER") or DEFAULT_FOLDER))
        base = served_base(arguments.model, arguments.revision, os.environ.get(BASE_REVISION))
        remove_partials(layout)
        resolver = Resolver(partial(provide, layout, base, arguments.max_lora_rank))
        LoRAResolverRegistry.register_resolver(self.name, VerifiedAdapters(resolver))
        _attach_status(app, base, resolver)
        for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            app.add_api_route(route, _refuse, methods=["POST"])

    async def init_state(self, engine_client: object, state: State, args: object) -> None:
        """Do nothing: the resolver needs no engine."""


def _attach_status(app: FastAPI, base: ServedBase, resolver: Resolver) -> None:
    """Add GET /v1/qlora/adapters, below /v1 so that it needs the server's API key, if there is one."""

    @app.get("/v1/qlora/adapters")
    def adapters() -> dict[str, object]:
        served = {"sha256": base.sha256} if base.is_measured else {"revision": base.revision}
        outcomes = resolver.outcomes.items()
        named = [{"name": name, "served": each.reason is None, "reason": each.reason} for name, each in outcomes]
        return {"base": served | {"measured": base.is_measured}, "adapters": named}


async def _refuse() -> None:
    raise HTTPException(403, "This server loads verified adapters only, when a request names one.")
