"""Names the plugin's folders in the server's pod."""

from dataclasses import dataclass
from pathlib import Path

DEFAULT_FOLDER = "/qlora"
"""Unless QLORA_FOLDER names another."""


@dataclass(frozen=True)
class Layout:
    """The plugin's folders in the server's pod."""

    root: Path

    @property
    def records(self) -> Path:
        """A folder for each namespace, with its ConfigMaps of channels and of output.announce."""
        return self.root / "records"

    @property
    def claims(self) -> Path:
        """A folder for each claim that adapters are on."""
        return self.root / "claims"

    @property
    def cache(self) -> Path:
        """The verified adapters, and the promotions that were accepted. Only the server may write there."""
        return self.root / "cache"

    def key(self, namespace: str) -> Path:
        """Return the file with the public key that signs adapters of the namespace."""
        return self.root / "keys" / f"{namespace}.pub"
