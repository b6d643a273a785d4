"""A Python with the packages of some extras only, as on the machine of a user."""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
PACKAGES = ("crds/qlora_api", "cli/qlora_cli", "cli/qlora_client", "trainer_image/qlora_trainer")


@cache
def _project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def _wanted(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that apply here with these extras."""
    environments = [{"extra": extra} for extra in ("", *extras)]
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            yield requirement


def distributions(extras: Iterable[str]) -> dict[str, Distribution]:
    """Installed packages of the extras, with all requirements, by name."""
    declared = _project()
    lists = [declared["dependencies"], *(declared["optional-dependencies"][extra] for extra in extras)]
    pending, found = [each for listed in lists for each in _wanted(listed, ())], {}
    while pending:
        requirement = pending.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        key = f"{name}[{','.join(sorted(requirement.extras))}]"
        if key in found:
            continue
        try:
            found[key] = distribution(name)
        except PackageNotFoundError:
            continue
        pending += _wanted(found[key].requires or (), requirement.extras)
    return found


def install(extras: Iterable[str], folder: Path) -> Path:
    """Make a folder of links to the project's packages and to those of the extras."""
    folder.mkdir()
    for package in PACKAGES:
        (folder / Path(package).name).symlink_to(ROOT / package)
    [metadata] = {file.parts[0] for file in distribution("qlora-operator").files or () if file.name == "METADATA"}
    for each in (*distributions(extras).values(), distribution("qlora-operator")):
        for name in {file.parts[0] for file in each.files or ()} - {"..", "__pycache__", "bin"}:
            target = Path(str(each.locate_file(name)))
            if not name.endswith(".pth") and target.exists() and not (folder / name).exists():
                (folder / name).symlink_to(target)
    assert (folder / metadata).exists()
    return folder


def qlora(installed: Path, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run `qlora` with the packages in the folder only."""
    return python(installed, "from qlora_cli.__main__ import main; main(prog_name='qlora')", *arguments)


def python(installed: Path, program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a Python program so."""
    return subprocess.run(
        # Without the packages of this Python.
        [sys.executable, "-S", "-c", program, *arguments],
        env={"PYTHONPATH": str(installed), "HOME": "/nowhere", "KUBECONFIG": "/nowhere", "PATH": os.environ["PATH"]},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
