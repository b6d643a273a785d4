"""Reads the section of a version in CHANGELOG.md."""

import re
from dataclasses import dataclass

from release.project import ReleaseError

# Headings of Keep a Changelog, which are also the kinds of Artifact Hub.
_KINDS = {name.capitalize(): name for name in ("added", "changed", "deprecated", "removed", "fixed", "security")}
_HEADING = re.compile(r"## (?P<version>\d+\.\d+\.\d+), (?P<date>\d{4}-\d{2}-\d{2}|not yet released)")


@dataclass(frozen=True)
class Entry:
    """A change. Kinds: added, changed, deprecated, removed, fixed, security."""

    kind: str
    text: str


@dataclass(frozen=True)
class Section:
    """The changes of a version; `date` is None before its release."""

    version: str
    date: str | None
    entries: tuple[Entry, ...]


def newest(text: str) -> Section:
    """Return the section at the top. Raises ReleaseError with a bad line."""
    section: tuple[str, str | None] | None = None
    kind = ""
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("## "):
            if section:
                break
            heading = _HEADING.fullmatch(line)
            if not heading:
                raise ReleaseError(f"CHANGELOG.md, line {number}: expected `## X.Y.Z, DATE`, found `{line}`")
            section = heading["version"], heading["date"] if heading["date"][0].isdigit() else None
        elif line.startswith("### "):
            if line.removeprefix("### ") not in _KINDS:
                raise ReleaseError(f"CHANGELOG.md, line {number}: {line} is none of {', '.join(_KINDS)}")
            kind = _KINDS[line.removeprefix("### ")]
        elif line.startswith("- ") and section:
            if not kind:
                raise ReleaseError(f"CHANGELOG.md, line {number}: an entry above the first `### ` heading")
            entries.append(Entry(kind, line.removeprefix("- ")))
    if section is None:
        raise ReleaseError("CHANGELOG.md: no section of a version")
    return Section(*section, tuple(entries))
