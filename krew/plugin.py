"""Makes the kubectl plugin that krew installs: an archive for this platform, and the manifest of all archives.

`make plugin` does both for one platform. An archive must be made on its platform; `--archives` then writes the manifest
of all of them. No workflow publishes them yet.
"""

import argparse
import hashlib
import json
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
NAME, PROGRAM, DISTRIBUTION = "qlora", "kubectl-qlora", "qlora-operator"
_ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
# What trains and operates is not part of it: `qlora run` needs a Python with PyTorch, and says so.
_LEFT_OUT = ("torch", "transformers", "kopf", "tkinter")
_ENTRY = "from qlora_cli.__main__ import plugin\n\nplugin()\n"


@dataclass(frozen=True)
class Archive:
    """An archive by its name: `kubectl-qlora-v0.1.0-linux-amd64.tar.gz`."""

    version: str
    system: str
    architecture: str

    @classmethod
    def here(cls) -> Self:
        """That of this machine. Raises LookupError for one that krew does not know."""
        return cls(f"v{version(DISTRIBUTION)}", platform.system().lower(), _ARCHITECTURES[platform.machine().lower()])

    @classmethod
    def of(cls, file: Path) -> Self:
        """Raises ValueError if the file has another name."""
        match = re.fullmatch(rf"{PROGRAM}-(v[^-]+)-(\w+)-(\w+)\.tar\.gz", file.name)
        if match is None:
            raise ValueError(f"{file}: must be named {PROGRAM}-vVERSION-SYSTEM-ARCHITECTURE.tar.gz")
        return cls(*match.groups())

    @property
    def name(self) -> str:
        """Its file name."""
        return f"{PROGRAM}-{self.version}-{self.system}-{self.architecture}.tar.gz"

    @property
    def program(self) -> str:
        """The program in it."""
        return f"{PROGRAM}.exe" if self.system == "windows" else PROGRAM


def manifest(sums: Mapping[Archive, str], address: str) -> dict[str, Any]:
    """Krew's manifest of archives below `address`, by their SHA-256.

    Raises ValueError if there is none, or they are of several versions. Source of the format:
    https://krew.sigs.k8s.io/docs/developer-guide/plugin-manifest/
    """
    versions = {archive.version for archive in sums}
    if len(versions) != 1:
        raise ValueError(f"found archives of {sorted(versions) or 'no version'}, must be of one version")
    platforms = [
        {
            "selector": {"matchLabels": {"os": archive.system, "arch": archive.architecture}},
            "uri": f"{address.rstrip('/')}/{archive.name}",
            "sha256": digest,
            "bin": archive.program,
        }
        for archive, digest in sorted(sums.items(), key=lambda item: item[0].name)
    ]
    return {
        "apiVersion": "krew.googlecontainertools.github.com/v1alpha2",
        "kind": "Plugin",
        "metadata": {"name": NAME},
        "spec": {
            "version": versions.pop(),
            "shortDescription": "Fine-tune language models with QLoRAJobs",
            "description": "Submits QLoRAJobs, lists and watches them with their loss curves, reads their logs, and "
            "suspends, resumes, retries and cancels them. Needs the QLoRA operator in the cluster.",
            "platforms": platforms,
        },
    }


def pack(folder: Path, target: Path) -> None:
    """Write the folder's content and the license as an archive. Links are followed: krew extracts none."""
    with tarfile.open(target, "w:gz", dereference=True) as archive:
        archive.add(ROOT / "LICENSE", "LICENSE")
        for part in sorted(folder.iterdir()):
            archive.add(part, part.name)


def build(target: Path) -> Path:
    """The archive with the program and a Python of its own, in the folder `target`.

    Runs PyInstaller on the environment of this process, which has the extras cli, client, stores and plugin. Raises
    CalledProcessError, and LookupError on a machine that krew does not know.
    """
    archive = target / Archive.here().name
    with tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-") as name:
        folder = Path(name)
        entry = folder / f"{PROGRAM}.py"
        entry.write_text(_ENTRY)
        command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--onedir", "--log-level=WARN"]
        # The commands are imported by name, which PyInstaller cannot see; the version is read from the metadata.
        command += ["--collect-submodules=qlora_cli", f"--copy-metadata={DISTRIBUTION}"]
        command += [f"--exclude-module={module}" for module in _LEFT_OUT]
        folders = [f"--{kind}path={folder / kind}" for kind in ("dist", "work", "spec")]
        subprocess.run([*command, *folders, f"--name={PROGRAM}", str(entry)], check=True, cwd=folder)
        target.mkdir(parents=True, exist_ok=True)
        pack(folder / "dist" / PROGRAM, archive)
    return archive


def write_manifest(archives: Sequence[Path], address: str, target: Path) -> Path:
    """Krew's manifest of these files, in the folder `target`. Raises ValueError for a file that is no archive."""
    sums = {Archive.of(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in archives}
    file = target / f"{NAME}.yaml"
    # JSON is YAML, and needs no library where archives are built.
    file.write_text(json.dumps(manifest(sums, address), indent=2) + "\n")
    return file


def main() -> None:
    """Build the archive of this platform, or write the manifest of the archives that are given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path, help="folder of the results")
    parser.add_argument("--address", required=True, help="URL below which the archives are published")
    parser.add_argument("--archives", type=Path, nargs="+", help="write the manifest of these, and build none")
    options = parser.parse_args()
    print(write_manifest(options.archives or [build(options.target)], options.address, options.target))


if __name__ == "__main__":
    main()
