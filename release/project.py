"""The version and commit of this checkout, and the names that a release gets in a registry."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from devcluster.processes import run


class ReleaseError(Exception):
    """A step of a release failed; the message has the finding and the remedy."""


ROOT = Path(__file__).parent.parent
CHART = Path("helm/qlora-operator")
DOCKERFILES = {
    "qlora-operator": Path("operator/Dockerfile"),
    "qlora-trainer": Path("trainer_image/Dockerfile"),
}


@dataclass(frozen=True)
class Source:
    """The commit that a release is made of."""

    version: str
    # The address of the repository, without a trailing slash.
    repository: str
    revision: str
    # When it was committed, in seconds since 1970.
    committed: int

    @property
    def created(self) -> str:
        """When it was committed, in RFC 3339."""
        return datetime.fromtimestamp(self.committed, UTC).isoformat().replace("+00:00", "Z")


@dataclass(frozen=True)
class Artifact:
    """Something in a registry, named by its digest and not by a tag."""

    repository: str
    version: str
    digest: str

    @property
    def reference(self) -> str:
        """The name for signing and verifying."""
        return f"{self.repository}@{self.digest}"

    @property
    def name(self) -> str:
        """The last part of the repository: `qlora-operator`."""
        return self.repository.rpartition("/")[2]


def image_repository(registry: str, name: str) -> str:
    """The repository of an image: `ghcr.io/OWNER/qlora-operator`."""
    return f"{registry}/{name}"


def chart_repository(registry: str) -> str:
    """Return the chart's folder in the registry, without the name that Helm adds."""
    return f"{registry}/charts/{CHART.name}"


def on_loopback(registry: str) -> bool:
    """Whether the registry is one of this machine, which is used without TLS."""
    return re.match(r"(localhost|127(\.\d+){3}|\[::1\])(:|/|$)", registry) is not None


def version(root: Path = ROOT) -> str:
    """The version of the project."""
    return str(_project(root)["version"])


def repository(root: Path = ROOT) -> str:
    """The address of the source repository that `pyproject.toml` states."""
    urls = _project(root).get("urls")
    if not isinstance(urls, dict) or "Repository" not in urls:
        raise ReleaseError("pyproject.toml: project.urls.Repository is missing; labels and provenance state it")
    return str(urls["Repository"])


def committed_source(root: Path = ROOT) -> Source:
    """Return the checked-out commit. Raises ReleaseError where files differ from it."""
    if changed := run(["git", "-C", root, "status", "--porcelain"]).splitlines():
        raise ReleaseError(f"{len(changed)} files differ from the commit, such as {changed[0].strip()}: commit them")
    revision, committed = run(["git", "-C", root, "log", "-1", "--format=%H %ct"]).split()
    return Source(version(root), repository(root), revision, int(committed))


@contextmanager
def exported(source: Source, root: Path = ROOT) -> Iterator[Path]:
    """Return a folder with the commit's files, all of its time, and no others."""
    with TemporaryDirectory(prefix="qlora-release-") as folder:
        archive = Path(folder) / "source.tar"
        files = Path(folder) / "source"
        files.mkdir()
        run(["git", "-C", root, "archive", f"--output={archive}", source.revision])
        run(["tar", "--extract", f"--file={archive}", f"--directory={files}"])
        archive.unlink()
        yield files


def _project(root: Path) -> dict[str, object]:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return dict(project)
