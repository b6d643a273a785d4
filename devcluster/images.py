"""Builds container images with buildah and brings them to containerd through a registry on loopback."""

import configparser
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from devcluster import addresses, console
from devcluster.addresses import Ports
from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.node import ctr
from devcluster.processes import Record, run

_REPOSITORY_ROOT = Path(__file__).parent.parent
_BASE_SUITE = "bookworm"
_BASE_PACKAGES = ("python3", "python3-venv", "ca-certificates")
_BASE_DOCKERFILE = 'FROM scratch\nADD root.tar /\nCMD ["/bin/bash"]\n'
_BUSYBOX = Path("/bin/busybox")
_SMALL_DOCKERFILE = 'FROM scratch\nCOPY root /\nCMD ["/bin/sleep", "2147483647"]\n'
_SYSTEM_CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
_LONGEST_BUILD_SECONDS = 3600
# 1 January 1980, the oldest that a ZIP archive can have. Layers and images of equal files are equal.
_TIME_OF_FILES = 315_532_800
# For tests and demonstrations that need a shell and nothing else.
BUSYBOX_NAME = "localhost/busybox:stable"


def start_registry(layout: Layout, ports: Ports, start: Callable[[str, list[str]], Record]) -> Record:
    """Start the registry, whose blobs stay in the cache: images are pushed once."""
    layout.registry.mkdir(parents=True, exist_ok=True)
    path = layout.cluster / "registry.yaml"
    path.write_text(registry_configuration(layout.registry, f"{addresses.LOOPBACK}:{ports.registry}"))
    return start("docker-registry", ["serve", str(path)])


def registry_configuration(storage: Path, address: str) -> str:
    """The configuration file of docker-registry, in YAML."""
    configuration = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": {"addr": address},
    }
    return yaml.safe_dump(configuration)


def load(layout: Layout, ports: Ports, image: str) -> str:
    """Make an image of buildah's storage startable by pods and return the name that containerd has for it.

    Only layers that the registry and containerd lack are copied; an unchanged image costs two look-ups.
    """
    name = qualified(image)
    identity = _local_identity(image)
    if _loaded_identity(layout, name) == identity:
        return name
    on_registry = f"{addresses.LOOPBACK}:{ports.registry}/{name.partition('/')[2]}"
    # buildah compresses whatever goes to a registry; gzip, its default, takes several times as long.
    fast = ["--compression-format", "zstd", "--compression-level", "1"]
    push = ["buildah", "push", "--quiet", "--tls-verify=false", *fast, image, f"docker://{on_registry}"]
    run(push, seconds=_LONGEST_BUILD_SECONDS)
    ctr(layout, "images", "pull", "--plain-http", on_registry, seconds=_LONGEST_BUILD_SECONDS)
    ctr(layout, "images", "tag", "--force", on_registry, name)
    ctr(layout, "images", "remove", on_registry)
    return name


def qualified(image: str) -> str:
    """The name that the kubelet uses for the pod's image `image`.

    Names without a registry belong to docker.io, those without a tag are `latest` (distribution/reference).
    """
    if "@" in image:
        raise ClusterError(f"image {image}: give a tag, not a digest; a digest is made when the image is pushed")
    name = image if ":" in image.rpartition("/")[2] else f"{image}:latest"
    first, slash, _ = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


def build(
    layout: Layout,
    tag: str,
    dockerfile: Path,
    context: Path | None,
    arguments: Mapping[str, str],
    *,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Build one of the project's Dockerfiles; the base image is made here unless BASE_IMAGE names another.

    pip inside the build sees this machine's pip configuration and CA bundle, read-only. `labels` are added to those of
    the Dockerfile.
    """
    arguments = dict(arguments)
    if "BASE_IMAGE" not in arguments and re.search(r"^ARG BASE_IMAGE\b", dockerfile.read_text(), re.MULTILINE):
        arguments["BASE_IMAGE"] = base_image(layout)
    with tempfile.TemporaryDirectory(prefix="qlora-image-") as folder:
        configuration = Path(folder) / "pip.conf"
        configuration.write_text(pip_configuration(os.environ, _pip_files(os.environ)))
        bundle = Path(os.environ.get("SSL_CERT_FILE", _SYSTEM_CA_BUNDLE))
        volumes = [f"{configuration}:/etc/pip.conf:ro"]
        if bundle.exists():
            volumes.append(f"{bundle.resolve()}:{_SYSTEM_CA_BUNDLE}:ro")
        command = ["buildah", "bud", "--isolation", "chroot", "--network", "host", "--layers", "--tag", tag]
        command += ["--timestamp", str(_TIME_OF_FILES)]
        command += [f"--label={name}={value}" for name, value in (labels or {}).items()]
        command += [f"--volume={volume}" for volume in volumes]
        command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        command += ["--file", str(dockerfile), str(context or _REPOSITORY_ROOT)]
        console.run_noisy(layout, command, seconds=_LONGEST_BUILD_SECONDS, env=os.environ)


def base_image(layout: Layout) -> str:
    """Return the name of a minimal Debian with Python, built on first use."""
    recipe = f"{_BASE_SUITE} {_BASE_PACKAGES} {_BASE_DOCKERFILE}"
    name = f"localhost/qlora-base:{_key(recipe.encode())}"
    if not exists(name):
        console.say(f"making {name} with mmdebstrap")
        layout.cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="base-", dir=layout.cache) as folder:
            include = f"--include={','.join(_BASE_PACKAGES)}"
            mmdebstrap = ["mmdebstrap", "--variant=minbase", include, _BASE_SUITE, f"{folder}/root.tar"]
            console.run_noisy(layout, mmdebstrap, seconds=_LONGEST_BUILD_SECONDS)
            _build_from_scratch(Path(folder), _BASE_DOCKERFILE, name)
    return name


def busybox_image() -> str:
    """Return the name of an image with a shell, also the pods' sandbox."""
    name = f"localhost/qlora-busybox:{_key(_BUSYBOX.read_bytes() + _SMALL_DOCKERFILE.encode())}"
    if not exists(name):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "root"
            for directory in ("bin", "etc", "tmp"):
                (root / directory).mkdir(parents=True)
            (root / "tmp").chmod(0o1777)
            (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
            (root / "bin/busybox").write_bytes(_BUSYBOX.read_bytes())
            (root / "bin/busybox").chmod(0o755)
            for applet in run([_BUSYBOX, "--list"]).split():
                if applet != "busybox":
                    (root / "bin" / applet).symlink_to("busybox")
            _build_from_scratch(Path(folder), _SMALL_DOCKERFILE, name)
    run(["buildah", "tag", name, BUSYBOX_NAME])
    return name


def program_image(program: Path) -> str:
    """The name of an image that holds one static program, at /NAME."""
    name = f"localhost/qlora-{program.name}:{program.parent.name}"
    if not exists(name):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "root"
            root.mkdir()
            (root / program.name).write_bytes(program.read_bytes())
            (root / program.name).chmod(0o755)
            _build_from_scratch(Path(folder), _SMALL_DOCKERFILE, name)
    return name


def pip_configuration(environ: Mapping[str, str], files: Sequence[Path]) -> str:
    """One pip.conf with the settings of this machine's files and PIP_… variables; later files and variables win.

    The certificate is left out: it is mounted at the system's path.
    """
    parser = configparser.RawConfigParser()
    parser.read(files)
    if not parser.has_section("global"):
        parser.add_section("global")
    for variable, value in environ.items():
        if variable.startswith("PIP_") and variable != "PIP_CONFIG_FILE":
            parser.set("global", variable.removeprefix("PIP_").lower().replace("_", "-"), value)
    parser.set("global", "cert", str(_SYSTEM_CA_BUNDLE))
    lines: list[str] = []
    for section in parser.sections():
        lines.append(f"[{section}]")
        # A value of several lines, such as a list of indexes, continues in indented ones.
        lines += [f"{key} = {value}".replace("\n", "\n  ") for key, value in parser.items(section)]
    return "\n".join([*lines, ""])


def _pip_files(environ: Mapping[str, str]) -> list[Path]:
    """Return pip's configuration files, lowest priority first, as in its guide."""
    home = Path.home()
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip/pip.conf"
    files = [Path("/etc/pip.conf"), home / ".pip/pip.conf", user]
    return [*files, Path(environ["PIP_CONFIG_FILE"])] if environ.get("PIP_CONFIG_FILE") else files


def _build_from_scratch(context: Path, dockerfile: str, name: str) -> None:
    (context / "Dockerfile").write_text(dockerfile)
    run(["buildah", "bud", "--quiet", "--isolation", "chroot", "--tag", name, str(context)])


def exists(name: str) -> bool:
    """Whether buildah's storage holds an image of this full name."""
    return bool(json.loads(run(["buildah", "images", "--json", "--filter", f"reference={name}"]) or "[]"))


def _local_identity(image: str) -> str:
    identity = run(["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", image]).strip()
    return identity if identity.startswith("sha256:") else f"sha256:{identity}"


def _loaded_identity(layout: Layout, name: str) -> str | None:
    """Return the configuration digest of an image in containerd, buildah's id."""
    lines = ctr(layout, "images", "list", f"name=={name}").splitlines()[1:]
    if not lines:
        return None
    manifest = json.loads(ctr(layout, "content", "get", lines[0].split()[2]))
    return str(manifest["config"]["digest"])


def _key(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
