"""Builds the previous release from this repository's history, for the tests of upgrades."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from devcluster import console, images
from devcluster.errors import ClusterError
from devcluster.layout import Layout
from devcluster.processes import run
from devcluster.product import ROOT, Images

COMMIT = "06a30d3e0b503eb93df7418c0949e2e4201e71b8"
"""The start of upgrades. Raise it with each release, and `tests/support/previous_release` with it."""
_BUILD_SECONDS = 3600.0


@dataclass(frozen=True)
class Release:
    """A release that can be installed."""

    chart: Path
    images: Images


def build(layout: Layout) -> Release:
    """Build the release's images if missing. Raises ClusterError without its commit."""
    if not _is_built(layout):
        console.say(f"building the previous release, {COMMIT[:7]}")
        _extract(_folder(layout))
        folder = str(_folder(layout))
        command = ["env", f"--chdir={folder}", f"PYTHONPATH={folder}", sys.executable, "-m", "devcluster", "images"]
        names = run(command, seconds=_BUILD_SECONDS)
        _names(layout).write_text("\n".join(line for line in names.splitlines() if line.startswith("localhost/")))
    return built(layout)


def built(layout: Layout) -> Release:
    """Return the release that tests use. Raises ClusterError if it is not built."""
    if not _is_built(layout):
        raise ClusterError("the previous release is not built: run `python -m devcluster prepare --slow`")
    operator, trainer = _names(layout).read_text().splitlines()
    return Release(_folder(layout) / "helm" / "qlora-operator", Images(operator, trainer))


def _is_built(layout: Layout) -> bool:
    """Whether the images exist; a user may have removed them to free space."""
    names = _names(layout)
    return names.exists() and all(images.exists(name) for name in names.read_text().splitlines())


def _folder(layout: Layout) -> Path:
    return layout.cache / f"previous-{COMMIT[:12]}"


def _names(layout: Layout) -> Path:
    return _folder(layout) / "image-names"


def _extract(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        archive = Path(temporary) / "release.tar"
        try:
            run(["git", "-C", str(ROOT), "archive", f"--output={archive}", COMMIT])
        except ClusterError as error:
            raise ClusterError(f"commit {COMMIT[:7]} is not in this clone: run `git fetch --unshallow`") from error
        run(["tar", "--extract", f"--file={archive}", f"--directory={folder}"])
