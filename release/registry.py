"""Runs a registry on this machine for the rehearsal of a release."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from devcluster import addresses, images, processes


@contextmanager
def running(storage: Path) -> Iterator[str]:
    """A registry on loopback whose blobs are in `storage`; yields its address."""
    address = f"{addresses.LOOPBACK}:{addresses.free_port()}"
    with TemporaryDirectory(prefix="qlora-registry-") as name:
        folder = Path(name)
        configuration = folder / "registry.yaml"
        configuration.write_text(images.registry_configuration(storage, address))
        command: list[str | Path] = ["docker-registry", "serve", configuration]
        record = processes.start(
            "registry", command, directory=folder / "processes", log=folder / "registry.log", with_parent=True
        )
        try:
            yield address
        finally:
            processes.stop(record)
