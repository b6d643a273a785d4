"""Access to the stores that a job's spec names."""

from collections.abc import Callable
from dataclasses import dataclass

from qlora_trainer.core.context import Mounts
from qlora_trainer.core.credentials import Secret
from qlora_trainer.stores.hub import Hub


@dataclass(frozen=True)
class StoreAccess:
    """Access to the stores that one part of a job's spec names."""

    mounts: Mounts
    hub: Callable[[], Hub]
    """Opens the hub's client, only if an address needs it."""
    secret: Secret
    """Credentials of object stores and registries."""
    registries: tuple[str, ...] = ()
    """OCI registries that the profile allows."""
