"""Builds the images of a commit from a base that is pinned by digest, and pushes them; runs a local registry."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from devcluster import addresses, images, processes
from devcluster.layout import Layout
from devcluster.processes import run
from release import dockerfiles
from release.project import DOCKERFILES, Artifact, Source, image_repository, on_loopback

_START_SECONDS = 60

# Every node with Kubernetes 1.31 can unpack it, and the trainer's image is pulled in half the time.
_COMPRESSION = ("--compression-format", "zstd")
_SECONDS = 3600.0


def publish(
    layout: Layout, source: Source, files: Path, registry: str, name: str, base: str | None
) -> tuple[Artifact, str]:
    """Build an image and push it; what it is now, and the base that it was built on, by digest.

    `base` replaces the base that the Dockerfile pins, by NAME@sha256:DIGEST.
    """
    dockerfile = files / DOCKERFILES[name]
    base = base or dockerfiles.base_image(dockerfile.read_text())
    repository = image_repository(registry, name)
    tag = f"{repository}:{source.version}"
    arguments = {"BASE_IMAGE": base}
    images.build(layout, tag, dockerfile, files, arguments, labels=labels(source, base))
    return Artifact(repository, source.version, push(tag, registry)), base


def labels(source: Source, base: str) -> dict[str, str]:
    """The labels that depend on the commit (OCI image specification, annotations)."""
    return {
        "org.opencontainers.image.created": source.created,
        "org.opencontainers.image.revision": source.revision,
        "org.opencontainers.image.source": source.repository,
        "org.opencontainers.image.base.digest": base.rpartition("@")[2],
    }


def push(tag: str, registry: str) -> str:
    """Push a local image under its name; its digest in the registry."""
    with TemporaryDirectory() as folder:
        digest = Path(folder) / "digest"
        options: list[str | Path] = ["--quiet", *_COMPRESSION, "--digestfile", digest]
        if on_loopback(registry):
            options.append("--tls-verify=false")
        run(["buildah", "push", *options, tag, f"docker://{tag}"], seconds=_SECONDS)
        return digest.read_text().strip()


def local_base(layout: Layout, registry: str) -> str:
    """Push the local base for builds without Docker Hub, and return its digest."""
    made = images.base_image(layout)
    tag = f"{registry}/{made.rpartition('/')[2]}"
    run(["buildah", "tag", made, tag])
    reference = f"{tag.rpartition(':')[0]}@{push(tag, registry)}"
    # A build searches it here first, and would ask for TLS elsewhere.
    run(["buildah", "pull", "--quiet", "--tls-verify=false", reference], seconds=_SECONDS)
    return reference


@contextmanager
def local_registry(storage: Path) -> Iterator[str]:
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
            processes.until(
                lambda: _accepts(address), _START_SECONDS, "the registry", folder / "registry.log", [record]
            )
            yield address
        finally:
            processes.stop(record)


def _accepts(address: str) -> bool:
    host, _, port = address.partition(":")
    with socket.socket() as connection:
        return connection.connect_ex((host, int(port))) == 0
