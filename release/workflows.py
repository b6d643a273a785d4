"""Checks the workflows: their actions and images must be pinned, and actionlint must report nothing."""

import re
import subprocess
from pathlib import Path

from release.project import ROOT

FOLDER = Path(".github/workflows")
_USES = re.compile(r"^\s*(?:- )?uses: *(\S+)(.*)$")
_PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
_IMAGE = re.compile(r"^\s*(?:container|image): *([^\s{]+)$")


def unpinned(workflow: str) -> list[str]:
    """Return lines with actions without commit and version, or images without digest."""
    found = []
    for number, line in enumerate(workflow.splitlines(), 1):
        if (used := _USES.match(line)) and not used[1].startswith("./"):
            if not _PINNED.fullmatch(used[1]):
                found.append(f"line {number}: {used[1]}: name the commit, as OWNER/ACTION@40 digits  # vX.Y.Z")
            elif not re.fullmatch(r" +# v\d+(\.\d+)*", used[2]):
                found.append(f"line {number}: {used[1]}: say the version, as in `# v4.2.0`")
        elif (image := _IMAGE.match(line)) and "@sha256:" not in image[1]:
            found.append(f"line {number}: {image[1]}: name the digest, as NAME:TAG@sha256:…")
    return found


def files(root: Path = ROOT) -> list[Path]:
    """All workflows. GitHub runs those with either ending."""
    return sorted(path for path in (root / FOLDER).iterdir() if path.suffix in (".yaml", ".yml"))


def findings(root: Path = ROOT) -> list[str]:
    """The lines that are not pinned, by file."""
    return [f"{path.relative_to(root)}, {finding}" for path in files(root) for finding in unpinned(path.read_text())]


def lint(actionlint: Path, root: Path = ROOT) -> list[str]:
    """The findings of actionlint."""
    done = subprocess.run([actionlint, "-oneline", *files(root)], cwd=root, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).splitlines() if done.returncode else []
