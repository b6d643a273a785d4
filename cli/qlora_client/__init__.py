"""Submits QLoRAJobs to a cluster and follows them, with the rights of the user who asks.

`from qlora_client import QLoRAClient` is the Python client; it shares the other modules with the command line.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_client.client import ClusterBackendConfig as ClusterBackendConfig
    from qlora_client.client import QLoRAClient as QLoRAClient
    from qlora_client.client_types import Comparison as Comparison
    from qlora_client.client_types import Plan as Plan
    from qlora_client.client_types import QLoRAJob as QLoRAJob
    from qlora_client.client_types import QLoRASweep as QLoRASweep
    from qlora_client.comparison import Row as Row
    from qlora_client.history import LossHistory as LossHistory
    from qlora_client.jobs.pods import Event as Event
    from qlora_client.sweep import Sweep as Sweep

_PUBLIC = {
    "QLoRAClient": "client",
    "ClusterBackendConfig": "client",
    "QLoRAJob": "client_types",
    "Sweep": "sweep",
    "QLoRASweep": "client_types",
    "Plan": "client_types",
    "Comparison": "client_types",
    "Row": "comparison",
    "LossHistory": "history",
    "Event": "jobs.pods",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: commands that need none start faster."""
    from importlib import import_module

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
